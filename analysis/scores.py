"""AP, PQ and mIoU accumulated again from ``per_image.parquet``, each image weighted. No torch, no model, no scorer.

With all weights 1 the numbers are those of pycocotools, panopticapi and the usual confusion matrix (AP exactly, bit
for bit). A bootstrap resample is a vector of integer weights, how often each image was drawn: nothing is copied,
and the detections are sorted once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

#: COCO's thresholds, as pycocotools makes them.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Detections:
    """All detections of a set of images, sorted once by category and falling score.

    A *group* is a pair (IoU threshold t, category k), t-major. A *hit* is a detection that counts as true positive
    in its group; only at hits can the precision envelope rise, so nothing else is touched per threshold. Indices
    count hits over all groups; N detections, M hits.
    """

    images: int
    categories: np.ndarray  # (K,) sorted; those with ground truth
    truth_image: np.ndarray  # (G,) image of each ground-truth object that is not ignored
    truth_category: np.ndarray  # (G,) index into categories
    image: np.ndarray  # (N,) image of each detection
    category_start: np.ndarray  # (K,) first detection of each category
    hit: np.ndarray  # (M,) index of the hit's detection
    hit_category: np.ndarray  # (M,)
    hit_group: np.ndarray  # (M,)
    group_start: np.ndarray  # (10 · K + 1,) first hit of each group
    ignored: np.ndarray  # (J,) index of the detection of each ignored (group, detection)
    ignored_before: np.ndarray  # (M,) how many of the ignored come no later than the hit, over all groups
    ignored_start: np.ndarray  # (10 · K,) first ignored of each group

    def precision(self, weights: np.ndarray | None = None) -> np.ndarray:
        """COCO's interpolated precision (10, 101, K'), K' the categories with ground truth among the images of
        positive weight.

        ``weights`` (images,) are integers ≥ 0, how often each image counts; None: once.
        """
        weights = check_weights(weights, self.images)
        truths = np.bincount(self.truth_category, weights[self.truth_image], len(self.categories)).astype(np.int64)
        hits = _sums(weights[self.image[self.hit]])
        values = self._hit_precision(weights, hits)
        first = self._first_hits(hits, truths)
        ends = self.group_start[1:, None]
        # The best of each stretch between two recall thresholds, then of all stretches from there on.
        best = np.maximum.reduceat(np.append(values, 0.0), first.ravel()).reshape(first.shape)
        best = np.where(first < ends, best, 0.0)
        best = np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1]
        shape = (len(IOU_THRESHOLDS), len(self.categories), len(RECALL_THRESHOLDS))
        grid = best.reshape(shape).transpose(0, 2, 1)
        return np.ascontiguousarray(grid[:, :, truths > 0])

    def scores(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """AP, AP50 and AP75 over all areas in percent; NaN if no image of positive weight has ground truth."""
        precision = self.precision(weights)
        if precision.size == 0:
            return dict.fromkeys(("AP", "AP50", "AP75"), float("nan"))
        means = {"AP": precision, "AP50": precision[:1], "AP75": precision[5:6]}
        return {name: float(np.mean(part.ravel()) * 100) for name, part in means.items()}

    def by_category(self) -> dict[int, float]:
        """AP over all areas in percent of each category with ground truth."""
        values = 100 * self.precision().mean((0, 1))
        return dict(zip(self.categories.tolist(), values.tolist(), strict=True))

    def _hit_precision(self, weights: np.ndarray, hits: np.ndarray) -> np.ndarray:
        """Precision right after each hit: (M,). ``hits`` (M + 1,) are running sums of the hits' weights."""
        true = (hits[1:] - hits[self.group_start[self.hit_group]]).astype(np.float64)
        passed = _sums(weights[self.image])
        total = passed[self.hit + 1] - passed[self.category_start[self.hit_category]]
        if len(self.ignored):
            skipped = _sums(weights[self.image[self.ignored]])
            total = total - (skipped[self.ignored_before] - skipped[self.ignored_start[self.hit_group]])
        return true / (total + np.spacing(1))

    def _first_hits(self, hits: np.ndarray, truths: np.ndarray) -> np.ndarray:
        """First hit at which each recall threshold is reached: (groups, 101), the group's end if it never is."""
        needed = np.tile(_needed(truths), (len(IOU_THRESHOLDS), 1))
        starts, ends = self.group_start[:-1, None], self.group_start[1:, None]
        found = np.searchsorted(hits[1:], hits[starts] + needed, side="left")
        return np.clip(found, starts, ends)


def _sums(values: np.ndarray) -> np.ndarray:
    """Running sums with a leading 0."""
    result = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=result[1:])
    return result


def _needed(truths: np.ndarray) -> np.ndarray:
    """Smallest count c with c / truths ≥ threshold, as floats compare: (K, 101); 0 where truths is 0."""
    size = np.maximum(truths, 1)[:, None].astype(np.float64)
    count = np.ceil(RECALL_THRESHOLDS * size)
    count = np.where((count - 1) / size >= RECALL_THRESHOLDS, count - 1, count)
    count = np.where(count / size < RECALL_THRESHOLDS, count + 1, count)
    return np.where(truths[:, None] > 0, count, 0).astype(np.int64)


@dataclass(frozen=True)
class ClassCounts:
    """Sums per (image, class) line: ``image`` (R,) and ``category`` (R,) index, ``values`` name → (R,) numbers."""

    images: int
    categories: np.ndarray
    image: np.ndarray
    category: np.ndarray
    values: Mapping[str, np.ndarray]

    def total(self, name: str, weights: np.ndarray) -> np.ndarray:
        """Weighted sum over images of one value per class: (K,) float64."""
        return np.bincount(self.category, weights[self.image] * self.values[name], len(self.categories))


def panoptic_quality(
    counts: ClassCounts, weights: np.ndarray | None = None, things: Mapping[int, bool] | None = None
) -> dict[str, float]:
    """PQ, SQ and RQ in percent, means over the classes with any TP, FP or FN (Kirillov et al., CVPR 2019).

    With ``things`` (category → is it a thing) also PQ_th and PQ_st; NaN where no class is left.
    """
    quality, present = _panoptic_parts(counts, check_weights(weights, counts.images))
    result = {name: _mean(values[present]) for name, values in quality.items()}
    if things is not None:
        thing = np.array([things[int(category)] for category in counts.categories], dtype=bool)
        result["PQ_th"] = _mean(quality["PQ"][present & thing])
        result["PQ_st"] = _mean(quality["PQ"][present & ~thing])
    return result


def _panoptic_parts(counts: ClassCounts, weights: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """PQ, SQ and RQ of each class (K,) in [0, 1], and which classes (K,) occur at all."""
    tp, fp, fn, iou = (counts.total(name, weights) for name in ("tp", "fp", "fn", "iou"))
    recognised = np.maximum(tp + 0.5 * fp + 0.5 * fn, 0.5)
    return {"PQ": iou / recognised, "SQ": iou / np.maximum(tp, 1), "RQ": tp / recognised}, tp + fp + fn > 0


def _class_ious(counts: ClassCounts, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU (K,) in [0, 1] of each class, and which classes (K,) count."""
    union = counts.total("union", weights)
    present = (counts.total("ground_truth", weights) if "ground_truth" in counts.values else union) > 0
    return counts.total("intersection", weights) / np.maximum(union, 1), present


def mean_iou(counts: ClassCounts, weights: np.ndarray | None = None) -> dict[str, float]:
    """mIoU in percent: mean over classes of Σ intersection / Σ union.

    Where the ground truth's pixels per class are known (value ``ground_truth``), classes without any are left out,
    as detectron2's evaluator does; otherwise classes that neither prediction nor ground truth has.
    """
    ratio, present = _class_ious(counts, check_weights(weights, counts.images))
    return {"mIoU": _mean(ratio[present])}


def _mean(values: np.ndarray) -> float:
    return float(100 * values.mean()) if values.size else float("nan")


@dataclass(frozen=True)
class PerImage:
    """``per_image.parquet`` in memory; a task that was not evaluated is None."""

    image_ids: np.ndarray
    detections: Detections | None = None
    panoptic: ClassCounts | None = None
    semantic: ClassCounts | None = None
    things: Mapping[int, bool] | None = None

    def scores(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Every score that applies, in percent, with the images weighted by integers (images,); None: all once."""
        result: dict[str, float] = {}
        if self.detections is not None:
            result |= self.detections.scores(weights)
        if self.panoptic is not None:
            result |= panoptic_quality(self.panoptic, weights, self.things)
        if self.semantic is not None:
            result |= mean_iou(self.semantic, weights)
        return result

    def class_scores(self) -> dict[str, dict[int, float]]:
        """AP, PQ and IoU of each class that the score's mean is over, in percent, as far as they apply."""
        every = check_weights(None, len(self.image_ids))
        result = {}
        if self.detections is not None:
            result["AP"] = self.detections.by_category()
        if self.panoptic is not None:
            quality, present = _panoptic_parts(self.panoptic, every)
            result["PQ"] = _by_class(self.panoptic, quality["PQ"], present)
        if self.semantic is not None:
            result["IoU"] = _by_class(self.semantic, *_class_ious(self.semantic, every))
        return result


def _by_class(counts: ClassCounts, values: np.ndarray, present: np.ndarray) -> dict[int, float]:
    return dict(zip(counts.categories[present].tolist(), (100 * values[present]).tolist(), strict=True))


def read(path: Path, things: Mapping[int, bool] | None = None) -> PerImage:
    """Read ``per_image.parquet``; ``things`` says which panoptic categories are things. Images are ordered by id."""
    import pyarrow.parquet as pq

    return from_table(pq.read_table(path), things)


def from_table(table: Any, things: Mapping[int, bool] | None = None) -> PerImage:
    """:func:`read` from a pyarrow table. Raises ValueError on a repeated image or lists whose lengths do not fit."""
    table = table.sort_by("image_id").combine_chunks()
    ids = table["image_id"].to_numpy()
    if len(np.unique(ids)) < len(ids):
        raise ValueError("an image occurs twice in per_image.parquet")
    names = set(table.column_names)
    return PerImage(
        image_ids=ids,
        detections=_detections(table) if "det_score" in names else None,
        panoptic=_counts(table, "pq", ("tp", "fp", "fn", "iou")) if "pq_category" in names else None,
        semantic=_semantic(table) if "sem_category" in names else None,
        things=things,
    )


def check_weights(weights: np.ndarray | None, images: int) -> np.ndarray:
    """Image weights as int64 (images,); raises ValueError unless they are integers ≥ 0, one for each image."""
    if weights is None:
        return np.ones(images, dtype=np.int64)
    whole = np.asarray(weights).astype(np.int64)
    if whole.shape != (images,) or (whole < 0).any() or (whole != weights).any():
        raise ValueError(f"weights must be {images} integers >= 0")
    return whole


def _semantic(table: Any) -> ClassCounts:
    extra = ("ground_truth",) if "sem_ground_truth" in table.column_names else ()
    return _counts(table, "sem", ("intersection", "union", *extra))


def _counts(table: Any, prefix: str, values: tuple[str, ...]) -> ClassCounts:
    image, category = _lists(table, f"{prefix}_category")
    columns = {name: _lists(table, f"{prefix}_{name}")[1] for name in values}
    if any(len(column) != len(category) for column in columns.values()):
        raise ValueError(f"the {prefix}_ lists of per_image.parquet differ in length")
    categories, index = np.unique(category, return_inverse=True)
    return ClassCounts(len(table), categories, image, index, columns)


def _lists(table: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column as (image index, value) of every element."""
    array = table[name].chunk(0) if table[name].num_chunks else table[name].combine_chunks()
    lengths = np.diff(array.offsets.to_numpy())
    return np.repeat(np.arange(len(lengths)), lengths), array.flatten().to_numpy(zero_copy_only=False)


def _detections(table: Any) -> Detections:
    truth_image, truth_category = _lists(table, "gt_category")
    real = ~_lists(table, "gt_ignore")[1].astype(bool)
    image, category = _lists(table, "det_category")
    return build_detections(
        images=len(table),
        truth_image=truth_image[real],
        truth_category=truth_category[real],
        image=image,
        category=category,
        score=_lists(table, "det_score")[1],
        match=_by_threshold(_lists(table, "det_match")[1], image),
        ignore=_by_threshold(_lists(table, "det_ignore")[1], image),
    )


def _by_threshold(flat: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Per-image row-major (10, n) flags, one image after another, as one (10, N)."""
    thresholds = len(IOU_THRESHOLDS)
    if len(flat) != thresholds * len(image):
        raise ValueError("det_match and det_ignore must hold 10 flags for each detection")
    count = np.bincount(image, minlength=1)
    start = np.cumsum(count) - count
    inside = np.arange(len(image)) - start[image]
    where = thresholds * start[image] + inside + np.arange(thresholds)[:, None] * count[image]
    return flat[where].astype(bool)


def build_detections(
    *,
    images: int,
    truth_image: np.ndarray,
    truth_category: np.ndarray,
    image: np.ndarray,
    category: np.ndarray,
    score: np.ndarray,
    match: np.ndarray,
    ignore: np.ndarray,
) -> Detections:
    """Sort and index detections given image by image.

    Shapes: truth_image, truth_category (G,) of the ground truth that is not ignored; image (ascending indices),
    category, score (N,); match and ignore (10, N) bool: matched to any object, not to be counted. Detections of
    categories without ground truth are dropped.
    """
    categories = np.unique(truth_category)
    known = np.flatnonzero(np.isin(category, categories))
    # Stable, as pycocotools sorts: equal scores stay in the order of images.
    order = known[np.lexsort((-score[known], category[known]))]
    index = np.searchsorted(categories, category[order])
    match, ignore = match[:, order], ignore[:, order]
    hit_group, hit = _group_lines(match & ~ignore, index, len(categories))
    lost_group, lost = _group_lines(ignore, index, len(categories))
    groups = np.arange(len(IOU_THRESHOLDS) * len(categories) + 1)
    return Detections(
        images=images,
        categories=categories,
        truth_image=truth_image,
        truth_category=np.searchsorted(categories, truth_category),
        image=image[order],
        category_start=np.searchsorted(index, np.arange(len(categories))),
        hit=hit,
        hit_category=index[hit],
        hit_group=hit_group,
        group_start=np.searchsorted(hit_group, groups),
        ignored=lost,
        ignored_before=_count_before(lost_group, lost, hit_group, hit, len(order)),
        ignored_start=np.searchsorted(lost_group, groups[:-1]),
    )


def _group_lines(flags: np.ndarray, index: np.ndarray, categories: int) -> tuple[np.ndarray, np.ndarray]:
    """(group, detection) of every set flag of (10, N), sorted by group, then detection."""
    threshold, detection = np.nonzero(flags)
    return threshold * categories + index[detection], detection


def _count_before(
    lost_group: np.ndarray, lost: np.ndarray, hit_group: np.ndarray, hit: np.ndarray, detections: int
) -> np.ndarray:
    """For each hit, how many lines of ``lost`` come before it in (group, detection) order."""
    return np.searchsorted(lost_group * detections + lost, hit_group * detections + hit)
