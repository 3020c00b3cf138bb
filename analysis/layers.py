"""The layer metrics, as plain functions on tensors of whole images.

The paper names mIoU-L and Util without a formula that public code computes; the formulas here are this project's
definitions. They are the readable reference: :class:`analysis.recorder.LayerRecorder` computes the same numbers in
a stream, and a test holds the two equal.

Letters: A = L + 1 layers, Q queries, n objects. V[a, q] is the object that query q is matched to at layer a, −1 for
none (:func:`analysis.matching.assign`). Every mean pools over (image, query); a mean over nothing is NaN. Shares
and IoUs are in [0, 1].
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageLayers:
    """One image: masks (A, Q, h, w) bool (logit > 0, padding cropped), assignment V (A, Q) int64, ground truth (n,
    h, w) bool.
    """

    masks: Tensor
    assignment: Tensor
    ground_truth: Tensor

    @property
    def final(self) -> Tensor:
        """The queries matched at the last layer: indices (k,), k = min(Q, n)."""
        return torch.nonzero(self.assignment[-1] >= 0).flatten()


def pair_iou(first: Tensor, second: Tensor) -> Tensor:
    """``|a ∧ b| / |a ∨ b|`` of bool masks (…, h, w) → (…) float64 in [0, 1]; NaN where both are empty."""
    intersection = (first & second).sum((-2, -1)).double()
    return intersection / (first | second).sum((-2, -1)).double()


def mean_iou_previous(images: Sequence[ImageLayers]) -> Tensor:
    """mIoU-L^i = mean of IoU(mask_n^{i−1}, mask_n^i) over queries n with V_n^L ≥ 0; (A,) in [0, 1], NaN at layer 0.

    Pairs of two empty masks are left out; their share is :func:`empty_pair_share`. mIoU-L is the mean over i = 1 …
    L, layers without any pair left out.
    """
    pooled = _pool(images, lambda image, masks: pair_iou(masks[:-1], masks[1:]))
    return torch.cat([torch.full((1,), torch.nan, dtype=torch.float64), pooled])


def mean_iou_last(images: Sequence[ImageLayers]) -> Tensor:
    """mIoU-L against the last layer: mean of IoU(mask_n^i, mask_n^L) over n with V_n^L ≥ 0; (A,) in [0, 1], 1 at
    layer L.
    """
    return _pool(images, lambda image, masks: pair_iou(masks, masks[-1:].expand_as(masks)))


def iou_to_ground_truth(images: Sequence[ImageLayers]) -> Tensor:
    """Mean of IoU(mask_n^i, object V_n^L) over n with V_n^L ≥ 0; (A,) in [0, 1]; two empty masks are left out."""

    def to_object(image: ImageLayers, masks: Tensor) -> Tensor:
        objects = image.ground_truth[image.assignment[-1, image.final]]
        return pair_iou(masks, objects.expand_as(masks))

    return _pool(images, to_object)


def empty_pair_share(images: Sequence[ImageLayers]) -> Tensor:
    """Share of the pairs (mask_n^{i−1}, mask_n^i), V_n^L ≥ 0, of two empty masks; (A,) in [0, 1], NaN at layer 0."""
    flags = torch.cat([torch.isnan(pair_iou(m[:-1], m[1:])) for m in map(_final_masks, images)], 1).double()
    return torch.cat([torch.full((1,), torch.nan, dtype=torch.float64), flags.mean(1)])


def utilization(images: Sequence[ImageLayers]) -> Tensor:
    """Util^i = |{n : V_n^i = V_n^L ≥ 0}| / |{n : V_n^L ≥ 0}|; (A,) in [0, 1], Util^L = 1. Util is the mean over i =
    0 … L − 1.
    """
    same = torch.cat([(i.assignment == i.assignment[-1])[:, i.final] for i in images], 1).double()
    return same.mean(1)


def utilization_consecutive(images: Sequence[ImageLayers]) -> Tensor:
    """|{n : V_n^i = V_n^{i+1} ∈ M}| / |M|, M the objects matched at the last layer; (A,) in [0, 1], NaN at layer L.

    With at least as many queries as objects M is every object, and the denominator is |{n : V_n^{i+1} ≥ 0}|.
    """
    kept, matched = torch.zeros(images[0].assignment.shape[0] - 1, dtype=torch.float64), 0
    for image in images:
        before, after = image.assignment[:-1], image.assignment[1:]
        kept += ((before == after) & torch.isin(after, image.assignment[-1, image.final])).sum(1)
        matched += len(image.final)
    return torch.cat([kept / matched, torch.full((1,), torch.nan, dtype=torch.float64)])


def instability(first: Tensor, second: Tensor) -> float:
    """Matching instability between two matchings of the same images (two layers, or one layer of two checkpoints).

    ``|{n : V_n ≠ V'_n}| / |{n : V_n ≥ 0 or V'_n ≥ 0}|`` over assignments of any equal shape; in [0, 1], 0 if
    nothing moved (the idea of DN-DETR's instability, Li et al., CVPR 2022, as a share).
    """
    involved = ((first >= 0) | (second >= 0)).sum()
    return ((first != second).sum().double() / involved).item()


def used_query_share(images: Sequence[ImageLayers]) -> float:
    """Share of the Q queries matched at the last layer in at least one image; in [0, 1]."""
    return (query_counts(images) > 0).double().mean().item()


def effective_queries(counts: Tensor) -> float:
    """``exp(− Σ p_q log p_q)`` with p = counts / Σ counts, counts (Q,): 1 if one query does everything, Q if all do
    alike; NaN if Σ is 0.
    """
    share = counts.double() / counts.sum()
    return torch.special.entr(share).sum().exp().item()


def query_counts(images: Iterable[ImageLayers]) -> Tensor:
    """How often each query is matched at the last layer: (Q,) int64."""
    return torch.stack([image.assignment[-1] >= 0 for image in images]).sum(0)


def _final_masks(image: ImageLayers) -> Tensor:
    return image.masks[:, image.final]


def _pool(images: Sequence[ImageLayers], measure: Callable[[ImageLayers, Tensor], Tensor]) -> Tensor:
    """Mean over (image, query) of a measure giving (layers, k), NaN left out."""
    return torch.cat([measure(image, _final_masks(image)) for image in images], 1).nanmean(1)
