"""AP, PQ and mIoU of every decoder layer on plain tensors, at mask-feature resolution.

For models that come without an evaluator. Predictions are formed as Mask2Former does (Cheng et al., CVPR 2022,
section 3 and appendix) and scored by COCO's, panoptic segmentation's and mIoU's own rules, but on the cells of the
mask features and without crowd regions: the numbers compare layers and models with each other, and are close to,
but not, those of the full-resolution scorers.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from analysis.matching import ImagePrediction, ground_truth_cells
from analysis.scores import IOU_THRESHOLDS, ClassCounts, build_detections, mean_iou, panoptic_quality


@dataclass(frozen=True)
class InferenceSettings:
    """How predictions are formed; the defaults are Mask2Former's for COCO."""

    detections: int = 100
    object_mask_threshold: float = 0.8
    overlap_threshold: float = 0.8


@dataclass
class _Lines:
    """What one layer has collected: lists of arrays by column."""

    found: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    panoptic: list[np.ndarray] = field(default_factory=list)
    semantic: list[np.ndarray] = field(default_factory=list)


class LayerQuality:
    """Streams over images; :meth:`scores` gives AP, AP50, AP75, PQ, SQ, RQ and mIoU per layer, in percent.

    ``things`` tells for each class whether it is a thing: AP and PQ's separation of instances are for things,
    segments of stuff are merged.
    """

    def __init__(self, things: list[bool], settings: InferenceSettings | None = None) -> None:
        self.things = np.asarray(things, dtype=bool)
        self.settings = settings or InferenceSettings()
        self.images = 0
        self._truth: list[tuple[np.ndarray, np.ndarray]] = []
        self._layers: list[_Lines] = []

    @torch.no_grad()
    def add(self, prediction: ImagePrediction, gt_masks: Tensor, gt_labels: Tensor) -> None:
        """Score one image at every layer; gt_masks (n, H, W) bool, disjoint for PQ and mIoU, gt_labels (n,) int.

        Raises ValueError if the class logits do not fit the classes.
        """
        if prediction.class_logits.shape[-1] != len(self.things) + 1:
            raise ValueError(f"{prediction.class_logits.shape[-1]} class logits for {len(self.things)} classes")
        cells = ground_truth_cells(gt_masks.bool(), prediction.grid).cpu().numpy()
        labels = gt_labels.cpu().numpy()
        self._layers = self._layers or [_Lines() for _ in range(prediction.layers)]
        thing = self.things[labels]
        self._truth.append((np.full(thing.sum(), self.images), labels[thing]))
        for layer, lines in enumerate(self._layers):
            logits = prediction.logits(layer, layer + 1, slice(None))[0].float().cpu()
            probability = prediction.class_logits[layer].float().softmax(-1).cpu()
            self._add_layer(lines, logits, probability, cells, labels)
        self.images += 1

    def scores(self) -> list[dict[str, float]]:
        """One dict per layer; NaN where a score does not exist. Empty before the first image."""
        return [self._layer_scores(lines) for lines in self._layers]

    def _add_layer(
        self, lines: _Lines, logits: Tensor, probability: Tensor, cells: np.ndarray, labels: np.ndarray
    ) -> None:
        thing = self.things[labels]
        masks, scores, classes = instances(logits, probability[:, :-1], self.things, self.settings.detections)
        match = match_detections(masks, scores, classes, cells[thing], labels[thing])
        lines.found.append((np.full(len(scores), self.images), classes, scores, match.T))
        segments = panoptic_segments(logits, probability, self.things, self.settings)
        lines.panoptic.append(panoptic_counts(*segments, cells, labels, len(self.things)))
        lines.semantic.append(semantic_counts(logits, probability[:, :-1], cells, labels))

    def _layer_scores(self, lines: _Lines) -> dict[str, float]:
        image, category, score, match = (np.concatenate(column) for column in zip(*lines.found, strict=True))
        truth_image, truth_category = (np.concatenate(column) for column in zip(*self._truth, strict=True))
        detections = build_detections(
            images=self.images,
            truth_image=truth_image,
            truth_category=truth_category,
            image=image,
            category=category,
            score=score,
            match=match.T,
            ignore=np.zeros_like(match.T),
        )
        panoptic = self._counts(lines.panoptic, ("tp", "fp", "fn", "iou"))
        semantic = self._counts(lines.semantic, ("intersection", "union", "ground_truth"))
        return detections.scores() | panoptic_quality(panoptic) | mean_iou(semantic)

    def _counts(self, parts: list[np.ndarray], names: tuple[str, ...]) -> ClassCounts:
        """Per-image (classes, values) arrays as one line per image and class."""
        classes = len(self.things)
        table = np.concatenate(parts)
        image, category = np.divmod(np.arange(len(table)), classes)
        values = {name: table[:, column] for column, name in enumerate(names)}
        return ClassCounts(self.images, np.arange(classes), image, category, values)


def instances(
    logits: Tensor, probability: Tensor, things: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Instance predictions: the ``limit`` best (query, thing class) pairs by class probability.

    Shapes: logits (Q, h, w), probability (Q, C) without "no object". Returns masks (m, h, w) bool, scores (m,) =
    class probability times the mean mask probability inside the mask, classes (m,).
    """
    masked = probability.masked_fill(~torch.from_numpy(things), -1)
    count = min(limit, len(probability) * int(things.sum()))
    best = masked.flatten().topk(count)
    queries, classes = best.indices // probability.shape[1], best.indices % probability.shape[1]
    masks = logits > 0
    inside = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    return masks[queries].numpy(), (best.values * inside[queries]).numpy(), classes.numpy()


def match_detections(
    masks: np.ndarray, scores: np.ndarray, classes: np.ndarray, truth: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """COCO's greedy matching within each class, by falling score: (10, m) bool, matched at each IoU threshold.

    Shapes: masks (m, h, w), scores, classes (m,), truth (n, h, w), labels (n,). A detection takes the free object
    of the largest IoU that reaches the threshold; of equal ones the last, as pycocotools does.
    """
    ious = pairwise_iou(masks, truth) * (classes[:, None] == labels)
    matched = np.zeros((len(IOU_THRESHOLDS), len(scores)), dtype=bool)
    free = np.ones((len(IOU_THRESHOLDS), len(labels)), dtype=bool)
    if len(labels) == 0:
        return matched
    rows = np.arange(len(IOU_THRESHOLDS))
    for detection in np.argsort(-scores, kind="stable"):
        offered = np.where(free, ious[detection], 0)
        best = len(labels) - 1 - offered[:, ::-1].argmax(1)
        hit = offered[rows, best] >= IOU_THRESHOLDS
        matched[:, detection] = hit
        free[rows[hit], best[hit]] = False
    return matched


def panoptic_segments(
    logits: Tensor, probability: Tensor, things: np.ndarray, settings: InferenceSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Panoptic prediction: segment number of each cell (h, w) int64, −1 for none, and each segment's class (s,).

    Confident queries compete for each cell by class probability × mask probability; a query that keeps less than
    the overlap threshold of its own mask is dropped; the queries of one stuff class share a segment. Shapes: logits
    (Q, h, w), probability (Q, C + 1).
    """
    scores, classes = probability.max(-1)
    kept = (classes < len(things)) & (scores > settings.object_mask_threshold)
    canvas = np.full(tuple(logits.shape[1:]), -1, dtype=np.int64)
    names: list[int] = []
    if not kept.any():
        return canvas, np.zeros(0, dtype=np.int64)
    mask = logits[kept].sigmoid().numpy()
    owner = (mask * scores[kept].numpy()[:, None, None]).argmax(0)
    stuff: dict[int, int] = {}
    for query, label in enumerate(classes[kept].tolist()):
        own, whole = owner == query, mask[query] >= 0.5
        area = whole.sum()
        if area == 0 or not (own & whole).any() or own.sum() / area < settings.overlap_threshold:
            continue
        known = None if things[label] else stuff.get(label)
        number = len(names) if known is None else known
        if known is None:
            names.append(label)
            if not things[label]:
                stuff[label] = number
        canvas[own & whole] = number
    return canvas, np.asarray(names, dtype=np.int64)


def panoptic_counts(
    canvas: np.ndarray, names: np.ndarray, truth: np.ndarray, labels: np.ndarray, classes: int
) -> np.ndarray:
    """TP, FP, FN and sum of IoU per class: (classes, 4). Segments match where IoU > 0.5; cells without ground truth
    do not count.

    Shapes: canvas (h, w) and names (s,) of :func:`panoptic_segments`, truth (n, h, w) bool, labels (n,). As in
    panoptic segmentation's evaluation (Kirillov et al., CVPR 2019) a segment lying to more than half on cells
    without ground truth is no false positive.
    """
    kept = truth.any((1, 2))
    truth, labels = truth[kept], labels[kept]
    void = ~truth.any(0)
    segments = canvas[None] == np.arange(len(names))[:, None, None]
    inside = segments & ~void
    same = names[:, None] == labels
    ious = pairwise_iou(inside, truth) * same
    first, second = np.nonzero(ious > 0.5)
    mostly_void = (segments & void).sum((1, 2)) > 0.5 * segments.sum((1, 2))
    wrong = np.setdiff1d(np.flatnonzero(~mostly_void), first)
    columns = [
        np.bincount(names[first], minlength=classes),
        np.bincount(names[wrong], minlength=classes),
        np.bincount(np.delete(labels, second), minlength=classes),
        np.bincount(names[first], ious[first, second], minlength=classes),
    ]
    return np.stack(columns, 1).astype(np.float64)


def semantic_counts(logits: Tensor, probability: Tensor, truth: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Intersection, union and ground-truth cells per class: (C, 3), over cells with ground truth.

    A cell's class is the largest Σ_q p_q(c) σ_q. Shapes: logits (Q, h, w), probability (Q, C), truth (n, h, w)
    bool, labels (n,).
    """
    classes = probability.shape[1]
    predicted = torch.einsum("qc,qhw->chw", probability, logits.sigmoid()).argmax(0).numpy()
    known = truth.any(0)
    wanted = labels[truth.argmax(0)][known] if len(labels) else np.zeros(0, dtype=np.int64)
    confusion = np.bincount(classes * wanted + predicted[known], minlength=classes**2).reshape(classes, classes)
    intersection = np.diag(confusion)
    objects = confusion.sum(1)
    return np.stack([intersection, objects + confusion.sum(0) - intersection, objects], 1)


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of every pair of masks (m, h, w) and (n, h, w) bool: (m, n) float64; 0 for two empty masks."""
    one = first.reshape(len(first), np.prod(first.shape[1:], dtype=int)).astype(np.float64)
    other = second.reshape(len(second), np.prod(second.shape[1:], dtype=int)).astype(np.float64)
    intersection = one @ other.T
    union = one.sum(1)[:, None] + other.sum(1) - intersection
    return intersection / np.maximum(union, 1)
