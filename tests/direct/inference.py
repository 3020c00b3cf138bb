"""The three post-processings (Mask2Former, section 3.4 and appendix), query by query."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Rules:
    """Thresholds and which classes are things."""

    classes: int
    things: tuple[int, ...]
    detections: int
    object_mask_threshold: float
    overlap_threshold: float


def resize(maps: Tensor, image: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Crop padded maps (n, H, W) to the image, then resize bilinearly to the wanted size."""
    cropped = maps[:, : image[0], : image[1]]
    return F.interpolate(cropped[None], size=wanted, mode="bilinear", align_corners=False)[0]


def semantic(logits: Tensor, masks: Tensor) -> Tensor:
    """logits (Q, C + 1), mask logits (Q, H, W) -> class map (C, H, W)."""
    probability = logits.softmax(-1)[:, :-1]
    result = torch.zeros(probability.shape[1], *masks.shape[1:])
    for q in range(len(masks)):
        result += probability[q][:, None, None] * masks[q].sigmoid()
    return result


def instance(rules: Rules, logits: Tensor, masks: Tensor, only_things: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (n,), classes (n,) and boolean masks (n, H, W) of the best query-class pairs."""
    flat = logits.softmax(-1)[:, :-1].flatten()
    best = flat.topk(min(rules.detections, len(flat)))
    rows = []
    for score, index in zip(best.values, best.indices, strict=True):
        query, label = int(index) // rules.classes, int(index) % rules.classes
        if only_things and label not in rules.things:
            continue
        mask = masks[query] > 0
        quality = (masks[query].sigmoid() * mask).sum() / (mask.sum() + 1e-6)
        rows.append((score * quality, label, mask))
    if not rows:
        return torch.zeros(0), torch.zeros(0, dtype=torch.long), masks[:0] > 0
    scores, labels, chosen = zip(*rows, strict=True)
    return torch.stack(scores), torch.tensor(labels), torch.stack(chosen)


def panoptic(rules: Rules, logits: Tensor, masks: Tensor) -> tuple[Tensor, list[tuple[int, int, bool]]]:
    """Segment map (H, W) int32 and its (segment id, class, is thing) rows."""
    scores, labels = logits.softmax(-1).max(-1)
    kept = [q for q in range(len(logits)) if labels[q] != rules.classes and scores[q] > rules.object_mask_threshold]
    segments = torch.zeros(masks.shape[1:], dtype=torch.int32)
    info: list[tuple[int, int, bool]] = []
    if not kept:
        return segments, info
    probability = masks[kept].sigmoid()
    owner = (scores[kept][:, None, None] * probability).argmax(0)
    stuff: dict[int, int] = {}
    for k, q in enumerate(kept):
        label = int(labels[q])
        own, full = owner == k, probability[k] >= 0.5
        visible = own & full
        if not own.any() or not full.any() or not visible.any() or own.sum() / full.sum() < rules.overlap_threshold:
            continue
        if label in stuff:
            segments[visible] = stuff[label]
            continue
        info.append((len(info) + 1, label, label in rules.things))
        segments[visible] = len(info)
        if label not in rules.things:
            stuff[label] = len(info)
    return segments, info
