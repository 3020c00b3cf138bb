"""Hungarian matching of all layers and images of a batch in one go (Mask2Former, section 3.3)."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mpformer.modeling.outputs import DecoderOutput, Targets
from mpformer.modeling.points import SharedPoints, cell_centres, sample

_CHUNK = 1 << 21
"""Logits worked on at a time: enough to keep the cores busy, little enough to stay in the cache."""
_ALIGNED = 16
"""Rows come in multiples of a cache line: a matrix product with odd rows takes half as long again."""
_SMALLEST = -80.0
"""Smaller logits count as this one, whose sigmoid still has a logarithm."""
_HUGE = 1e6
"""Stands for a non-finite cost, so that a diverged run reaches the loss, where it is reported."""


@dataclass(frozen=True)
class CostWeights:
    """Weights of the matching cost, which are those of the loss."""

    classes: float = 2.0
    mask: float = 5.0
    dice: float = 5.0


@dataclass(frozen=True)
class Matching:
    """Matched pairs; m = min(Q, n) of each image, ascending in the object index."""

    queries: tuple[Tensor, ...]
    """Per image (L+1, m) int64."""
    objects: tuple[Tensor, ...]
    """Per image (L+1, m) int64."""

    def pairs(self, layer: int, image: int) -> tuple[Tensor, Tensor]:
        """Matched (queries, objects) of one image at one layer."""
        return self.queries[image][layer], self.objects[image][layer]


@torch.no_grad()
def match(output: DecoderOutput, targets: Targets, points: Tensor | None, weights: CostWeights) -> Matching:
    """Match every layer's predictions to the objects of every image.

    ``points`` (1 or L+1, B, K, 2) are where masks are compared; None: at the centre of every cell.
    """
    costs = [image_costs(output, targets, points, weights, image) for image in range(len(targets.labels))]
    # One transfer to the host for the whole batch.
    flat = torch.cat([cost.flatten() for cost in costs]).nan_to_num(_HUGE, _HUGE, -_HUGE).cpu().numpy()
    ends = np.cumsum([cost.numel() for cost in costs])[:-1]
    pairs = [_assign(part.reshape(cost.shape)) for part, cost in zip(np.split(flat, ends), costs, strict=True)]
    device = output.logits.device
    queries = tuple(torch.from_numpy(pair[0]).to(device) for pair in pairs)
    return Matching(queries, tuple(torch.from_numpy(pair[1]).to(device) for pair in pairs))


def image_costs(
    output: DecoderOutput, targets: Targets, points: Tensor | None, weights: CostWeights, image: int
) -> Tensor:
    """Cost (L+1, Q, n) of giving each query of each layer each object of one image, in float32."""
    with torch.autocast(output.logits.device.type, enabled=False):
        labels, masks = targets.labels[image], targets.masks[image].float()
        probability = output.logits[:, image].float().softmax(-1)
        classes = -probability[..., labels]
        features = output.mask_features[image].float()
        embed = output.mask_embed[:, image].float()
        if points is None:
            centres = cell_centres((features.shape[1], features.shape[2]), features.device)
            mask, dice = _mask_costs(embed, features.flatten(1), sample(masks[None], centres[None])[0])
        elif len(points) == 1:
            mask, dice = _costs_at(embed, features, masks, points[0, image])
        else:
            each = [_costs_at(e, features, masks, p[image]) for e, p in zip(embed, points, strict=True)]
            mask, dice = (torch.stack(part) for part in zip(*each, strict=True))
        return weights.classes * classes + weights.mask * mask + weights.dice * dice


def _costs_at(embed: Tensor, features: Tensor, masks: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and dice costs (..., n) of embed (..., D) x features (D, h, w) against masks (n, H, W) at points (K, 2).

    Sampling is linear: whichever are fewer, cells or points, the query-feature product is made at.
    """
    shared = SharedPoints.at(points, (features.shape[-2], features.shape[-1]))
    truth = sample(masks[None], points[None])[0]
    if shared.cells < len(points):
        return _mask_costs(embed, features.flatten(1), truth, shared)
    return _mask_costs(embed, shared.sample(features), truth)


def _mask_costs(
    embed: Tensor, features: Tensor, masks: Tensor, points: SharedPoints | None = None
) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy and dice cost (..., n) of embed (..., D) x features (D, S) against masks (n, K).

    With ``points`` the S places are cells that the K points are sampled from; otherwise S is K. BCE(x, t) =
    softplus(x) - x t: the first term is a sum per query, the second is linear in x, so that the masks can be summed
    over the places before they meet the queries.
    """
    rows = embed.flatten(0, -2)
    linear = rows @ ((masks if points is None else points.scatter(masks)) @ features.T).T
    step = _ALIGNED * max(1, _CHUNK // masks.shape[1] // _ALIGNED)
    parts = [_row_sums(_logits(part, features, points), masks) for part in rows.split(step)]
    softplus, overlap, area = (torch.cat(part) for part in zip(*parts, strict=True))
    mask = (softplus[:, None] - linear) / masks.shape[1]
    dice = 1 - (2 * overlap + 1) / (area[:, None] + masks.sum(1) + 1)
    shape = (*embed.shape[:-1], len(masks))
    return mask.view(shape), dice.view(shape)


def _logits(rows: Tensor, features: Tensor, points: SharedPoints | None) -> Tensor:
    """Logits (K, R) of rows (R, D): points first, the layout that sampling wants."""
    logits = features.T @ rows.T
    return logits if points is None else points.look_up(logits)


def _row_sums(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits (K, R), overwritten: the sum of softplus (R,), the overlap with masks (R, n), and the area (R,).

    softplus(x) = x - log sigmoid(x), and the sigmoid is needed anyway; PyTorch's softplus takes ten times as long.
    """
    total = logits.clamp_(min=_SMALLEST).sum(0)
    probability = logits.sigmoid_()
    overlap, area = (masks @ probability).T, probability.sum(0)
    return total - probability.log_().sum(0), overlap, area


def _assign(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve each layer of costs (L+1, Q, n); returns queries and objects (L+1, m), ascending in the object."""
    pairs = [linear_sum_assignment(cost.T) for cost in costs]
    objects, queries = (np.stack(part).astype(np.int64) for part in zip(*pairs, strict=True))
    return queries, objects
