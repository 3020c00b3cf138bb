"""How accurate are the gradients that predicted attention masks give? Plain tensors; the model is a callable.

The premise of mask piloting: a predicted mask that misses its object sends the query's cross-attention, and so the
gradient, to the wrong place. Run the decoder twice on the same image, with the same targets and the same matching,
once attending through the masks it predicts and once through the ground truth of the matched objects, and compare
the gradients of the loss with respect to each layer's mask embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: (loss, mask embeddings of the A layers, each (…, Q, D) and part of the loss's graph).
Forward = Callable[[], tuple[Tensor, Sequence[Tensor]]]


@dataclass(frozen=True)
class GradientAccuracy:
    """Per layer, over the compared queries: mean cosine in [−1, 1] and mean relative error ≥ 0; ``compared``
    queries entered the means.
    """

    cosine: Tensor  # (A,)
    relative_error: Tensor  # (A,)
    compared: Tensor  # (A,)


def mask_embedding_gradients(forward: Forward) -> Tensor:
    """Gradient of the loss with respect to every layer's mask embedding: (A, …, Q, D). Layers that the loss does
    not reach give 0.
    """
    with torch.enable_grad():
        loss, embeddings = forward()
        gradients = torch.autograd.grad(loss, list(embeddings), allow_unused=True)
    filled = [torch.zeros_like(e) if g is None else g for e, g in zip(embeddings, gradients, strict=True)]
    return torch.stack(filled).detach()


def compare_gradients(predicted: Tensor, truth: Tensor, queries: Tensor | None = None) -> GradientAccuracy:
    """Compare two sets of gradients (A, …, Q, D), for example under predicted and under ground-truth attention masks.

    Per query ``cosine = ⟨g, g*⟩ / (|g| |g*|)`` and ``relative error = |g − g*| / |g*|``, g* the gradient under
    ground truth; then the mean over queries. ``queries`` (…, Q) or (A, …, Q) bool selects some, such as the matched
    ones; None: all. Queries whose g* is 0 are left out of both means, those whose g is 0 count as cosine 0. Layers
    without any query left give NaN.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"gradients differ in shape: {tuple(predicted.shape)} and {tuple(truth.shape)}")
    predicted, truth = predicted.double(), truth.double()
    norm, other = truth.norm(dim=-1), predicted.norm(dim=-1)
    kept = norm > 0
    if queries is not None:
        kept = kept & queries
    cosine = (predicted * truth).sum(-1) / (norm * other).clamp(min=torch.finfo(torch.float64).tiny)
    error = (predicted - truth).norm(dim=-1) / norm
    return GradientAccuracy(_mean(cosine, kept), _mean(error, kept), kept.flatten(1).sum(1))


def attention_accuracy(predicted: Forward, truth: Forward, queries: Tensor | None = None) -> GradientAccuracy:
    """:func:`compare_gradients` of two forward passes: attending through predicted masks, and through the ground
    truth.
    """
    return compare_gradients(mask_embedding_gradients(predicted), mask_embedding_gradients(truth), queries)


def attention_misses(blocked: Tensor, gt_cells: Tensor, matched: Tensor) -> tuple[Tensor, Tensor]:
    """Which attention masks are empty, and which of the matched queries' have no cell of their object.

    blocked (L, Q, h, w) bool: True where the query may not look, before fully blocked rows are opened; gt_cells (n,
    h, w) bool; matched (L, Q) int64, the object of each query, −1 for none. Returns (share of all masks that are
    empty (L,), share of the matched queries' masks that miss their object, empty ones included (L,); NaN where no
    query is matched).
    """
    looks = ~blocked.flatten(2)
    empty = (~looks.any(-1)).double().mean(1)
    if gt_cells.shape[0] == 0:
        return empty, torch.full_like(empty, torch.nan)
    objects = gt_cells.flatten(1)[matched.clamp(min=0)]
    missed = ~(looks & objects).any(-1)
    return empty, _mean(missed.double(), matched >= 0)


def _mean(values: Tensor, kept: Tensor) -> Tensor:
    """Mean over all but the first dimension of the kept values; NaN where none is kept."""
    chosen = torch.where(kept, values, torch.zeros_like(values)).flatten(1)
    return chosen.sum(1) / kept.flatten(1).sum(1)
