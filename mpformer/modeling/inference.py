"""From one image's class and mask logits to semantic, instance and panoptic results, by Mask2Former's rules."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import Tensor

Size = tuple[int, int]


@dataclass(frozen=True)
class InferenceSettings:
    """Which results are wanted, and Mask2Former's thresholds."""

    things: frozenset[int]
    """Contiguous ids of the thing classes."""
    instance: bool = True
    panoptic: bool = False
    semantic: bool = False
    detections: int = 100
    object_mask_threshold: float = 0.8
    overlap_threshold: float = 0.8


def infer(
    settings: InferenceSettings, logits: Tensor, masks: Tensor, padded: Size, size: Size, output: Size
) -> dict[str, Any]:
    """Make the results of one image in detectron2's format.

    ``logits`` (Q, C+1) and ``masks`` (Q, h, w) come from one head; ``padded`` is the network's input size, ``size``
    the image's part of it, ``output`` the size wanted. Returns any of "sem_seg" (C, H, W), "panoptic_seg"
    (ids (H, W), segments) and "instances".
    """
    logits, masks = logits.float(), masks.float()
    if not (settings.instance or settings.panoptic):
        # For semantics alone Mask2Former resizes the class map, not the masks.
        return {"sem_seg": crop_and_resize(semantic(logits, resize(masks, padded)), size, output)}
    if not settings.semantic:
        keep = relevant(settings, logits)
        logits, masks = logits[keep], masks[keep]
    masks = crop_and_resize(resize(masks, padded), size, output)
    results: dict[str, Any] = {}
    if settings.semantic:
        results["sem_seg"] = semantic(logits, masks)
    if settings.panoptic:
        results["panoptic_seg"] = panoptic(settings, logits, masks)
    if settings.instance:
        results["instances"] = instances(settings, logits, masks)
    return results


def relevant(settings: InferenceSettings, logits: Tensor) -> Tensor:
    """Queries (Q,) bool that an instance or panoptic result can contain: only their masks need resizing."""
    keep = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    if settings.panoptic:
        keep |= confident(settings, logits)
    if settings.instance:
        keep[best_pairs(settings, logits)[1]] = True
    return keep


def crop_and_resize(maps: Tensor, size: Size, output: Size) -> Tensor:
    """Cut the padding off maps (N, H, W) and resize the rest to ``output``, bilinearly."""
    return resize(maps[:, : size[0], : size[1]], output)


def resize(maps: Tensor, size: Size) -> Tensor:
    """Resize maps (N, h, w) bilinearly; N may be 0."""
    if len(maps) == 0:
        return maps.new_zeros(0, *size)
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def semantic(logits: Tensor, masks: Tensor) -> Tensor:
    """Sum over queries of class probability x mask probability; (C, H, W)."""
    return torch.einsum("qc,qhw->chw", logits.softmax(-1)[:, :-1], masks.sigmoid())


def instances(settings: InferenceSettings, logits: Tensor, masks: Tensor) -> Instances:
    """Take the best (query, class) pairs; score = class probability x mean mask probability inside the mask.

    Sorted by falling score. Where panoptic results are wanted too only things are kept, as in Mask2Former.
    """
    scores, queries, classes = best_pairs(settings, logits)
    if settings.panoptic:
        keep = torch.isin(classes, torch.tensor(sorted(settings.things), device=classes.device))
        scores, queries, classes = scores[keep], queries[keep], classes[keep]
    scores = scores * _mask_quality(masks)[queries]
    scores, order = scores.sort(descending=True, stable=True)
    binary = masks > 0
    result = Instances((masks.shape[-2], masks.shape[-1]))
    result.pred_masks = binary[queries[order]]
    result.pred_boxes = Boxes(boxes_of(binary)[queries[order]])
    result.scores = scores
    result.pred_classes = classes[order]
    return result


def best_pairs(settings: InferenceSettings, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The top (query, class) pairs of (..., Q, C+1) logits by probability, never more than there are.

    Returns scores, queries, classes (..., m).
    """
    probability = logits.softmax(-1)[..., :-1]
    pairs = probability.flatten(-2)
    scores, index = pairs.topk(min(settings.detections, pairs.shape[-1]))
    return scores, index // probability.shape[-1], index % probability.shape[-1]


def _mask_quality(masks: Tensor) -> Tensor:
    """Mean probability (N,) inside each binarised mask (N, H, W)."""
    inside = masks > 0
    return (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)


def boxes_of(masks: Tensor) -> Tensor:
    """Boxes (N, 4) x0, y0, x1, y1 around masks (N, H, W) bool; zeros for an empty mask."""
    spans = []
    for occupied in (masks.any(1), masks.any(2)):
        first = occupied.int().argmax(1) if occupied.shape[0] else occupied.new_zeros(0, dtype=torch.long)
        last = occupied.shape[1] - (occupied.flip(1).int().argmax(1) if occupied.shape[0] else first)
        spans.append((first, last))
    boxes = torch.stack([spans[0][0], spans[1][0], spans[0][1], spans[1][1]], dim=1).float()
    return boxes * masks.flatten(1).any(1)[:, None]


def confident(settings: InferenceSettings, logits: Tensor) -> Tensor:
    """Queries (..., Q) bool of logits (..., Q, C+1) whose best class is a class and is likely enough."""
    scores, classes = logits.softmax(-1).max(-1)
    return (classes != logits.shape[-1] - 1) & (scores > settings.object_mask_threshold)


def panoptic(settings: InferenceSettings, logits: Tensor, masks: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """Give each pixel to the confident query with the largest score x mask probability.

    A segment that keeps less than ``overlap_threshold`` of its own mask is dropped; stuff of one class is one
    segment. Returns ids (H, W) int32, 0 = nothing, and the segments.
    """
    keep = confident(settings, logits)
    scores, classes = logits[keep].softmax(-1).max(-1)
    probability = masks[keep].sigmoid()
    ids = torch.zeros(masks.shape[-2:], dtype=torch.int32, device=masks.device)
    segments: list[dict[str, Any]] = []
    if len(scores) == 0:
        return ids, segments
    owner = (scores[:, None, None] * probability).argmax(0)
    stuff: dict[int, int] = {}
    for query, category in enumerate(classes.tolist()):
        own, whole = owner == query, probability[query] >= 0.5
        visible = own & whole
        if not visible.any() or own.sum() / whole.sum() < settings.overlap_threshold:
            continue
        segment = stuff.get(category, len(segments) + 1)
        ids[visible] = segment
        if category not in settings.things:
            stuff[category] = segment
        if segment > len(segments):
            thing = category in settings.things
            segments.append({"id": segment, "isthing": thing, "category_id": category})
    return ids, segments
