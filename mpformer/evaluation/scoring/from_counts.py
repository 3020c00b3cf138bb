"""Scores of decoder layers from counts of pixels: AP, PQ and mIoU by the rules of the recorded scorers, without a mask.

Every image leaves one line a layer, in the columns of ``per_image.parquet``; :mod:`analysis.scores` makes the scores of
them. On Cityscapes AP and mIoU are its own benchmark's. Tests hold the numbers to those of the recorded scorers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpformer.config.classes import class_table
from mpformer.config.datasets import dataset
from mpformer.config.schema import Config
from mpformer.data.targets import IGNORE_LABEL, to_rle
from mpformer.data.validation import GroundTruth
from mpformer.evaluation.scoring import per_image
from mpformer.evaluation.scoring.cityscapes import (
    CityscapesInstances,
    CityscapesSemantic,
    CountedDetection,
    region_masks,
)
from mpformer.evaluation.scoring.coco import MAX_DETECTIONS, match_by_counts
from mpformer.evaluation.scoring.panoptic import VOID, columns_of_parts, parts_of
from mpformer.evaluation.scoring.semantic import columns_of_counts, counts_of


@dataclass(frozen=True)
class TruthMaps:
    """An image's ground truth as what pixels are counted against; parts that are not scored are None.

    objects: (n, H, W) bool. segments: (H, W) index into the image's sorted panoptic ids, ``segment_ids``.
    classes: (H, W) class indices, the number of classes where a pixel has no label.
    """

    objects: NDArray[np.bool_] | None = None
    segments: NDArray[np.int64] | None = None
    segment_ids: NDArray[np.int64] | None = None
    classes: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Detected:
    """The detections of one layer, m in number, in the order of their class probabilities.

    queries, classes (m,); scores (m,) float32, class probability times mean mask probability inside the mask; area
    (m,) pixels; shared (m, n) pixels that a detection has in common with each object.
    """

    queries: NDArray[np.int64]
    classes: NDArray[np.int64]
    scores: NDArray[np.float32]
    area: NDArray[np.int64]
    shared: NDArray[np.int64]


@dataclass(frozen=True)
class Owned:
    """The confident queries of one layer, k in number.

    classes (k,); whole (k,) pixels of their masks; pixels (k, 2, T) that they win of each true segment, outside and
    inside their own mask.
    """

    classes: NDArray[np.int64]
    whole: NDArray[np.int64]
    pixels: NDArray[np.int64]


@dataclass(frozen=True)
class LayerCounts:
    """One image's counts at one layer; parts that are not scored are None.

    confusion: (C, C + 1) pixels by predicted class and true class, the last column without label.
    """

    detected: Detected | None = None
    owned: Owned | None = None
    confusion: NDArray[np.int64] | None = None


class CountScorer:
    """Fed image by image with the counts of A layers; ``results()`` gives percentages by name, one dict a layer."""

    def __init__(self, config: Config, layers: int) -> None:
        table, wanted = class_table(config.dataset.name, config.dataset.task), config.evaluation
        self.wanted, self.classes = wanted, len(table)
        self.things = dict(enumerate(table.is_thing))
        self.rows: list[list[dict[str, Any]]] = [[] for _ in range(layers)]
        self.cityscapes = dataset(config.dataset.name).evaluator == "cityscapes"
        self.instances = [CityscapesInstances(config.dataset.task) for _ in range(layers if self.cityscapes else 0)]
        self.semantics = [CityscapesSemantic(self.classes) for _ in range(layers if self.cityscapes else 0)]

    def maps(self, truth: GroundTruth) -> TruthMaps:
        """What an image's pixels are to be counted against."""
        objects = segments = ids = classes = None
        if self.wanted.instance:
            objects = region_masks(truth) if self.cityscapes else _object_masks(truth)
        if self.wanted.panoptic:
            assert truth.ids is not None
            ids, segments = np.unique(truth.ids.astype(np.int64), return_inverse=True)
            segments = segments.reshape(truth.ids.shape)
        if self.wanted.semantic:
            assert truth.semantic is not None
            classes = np.where(truth.semantic == IGNORE_LABEL, self.classes, truth.semantic).astype(np.int64)
        return TruthMaps(objects, segments, ids, classes)

    def add(self, truth: GroundTruth, maps: TruthMaps, layers: Sequence[LayerCounts]) -> None:
        """Add one image's counts at every layer."""
        rows: list[dict[str, Any]] = [{"image_id": truth.image_id} for _ in layers]
        detected = [counts.detected for counts in layers if counts.detected is not None]
        if detected and self.cityscapes:
            for scorer, found in zip(self.instances, detected, strict=True):
                scorer.add_counted(_listed(found), truth)
        elif detected:
            assert maps.objects is not None
            pixels = maps.objects.sum((1, 2))
            for row, columns in zip(rows, detection_columns(detected, truth, pixels), strict=True):
                row |= columns
        for layer, (row, counts) in enumerate(zip(rows, layers, strict=True)):
            if counts.owned is not None:
                assert maps.segment_ids is not None
                row |= columns_of_parts(self._parts(counts.owned, maps.segment_ids, truth))
            if counts.confusion is not None:
                row |= columns_of_counts(counts_of(counts.confusion[:, : self.classes]))
                if self.cityscapes:
                    self.semantics[layer].add_confusion(counts.confusion[:, : self.classes])
            self.rows[layer].append(row)

    def _parts(self, owned: Owned, ids: NDArray[np.int64], truth: GroundTruth) -> Any:
        """Panoptic quality's parts of one image, segments made as by :func:`mpformer.modeling.inference.panoptic`."""
        segments: dict[int, int] = {}
        overlap: dict[tuple[int, int], int] = {}
        stuff: dict[int, int] = {}
        left = owned.pixels.sum((0, 1))
        for category, whole, pixels in zip(owned.classes.tolist(), owned.whole.tolist(), owned.pixels, strict=True):
            visible, own = pixels[1], pixels.sum()
            if not visible.any() or np.float32(own) / np.float32(whole) < np.float32(self.wanted.overlap_threshold):
                continue
            number = stuff.get(category, len(segments) + 1)
            if not self.things[category]:
                stuff[category] = number
            segments[number] = category
            left = left - visible
            for t in np.flatnonzero(visible):
                pair = (int(ids[t]), number)
                overlap[pair] = overlap.get(pair, 0) + int(visible[t])
        overlap |= {(int(ids[t]), VOID): int(left[t]) for t in np.flatnonzero(left)}
        return parts_of(overlap, segments, truth)

    def state(self) -> dict[str, Any]:
        """What has been added, as plain data and arrays."""
        benchmark = ([part.state() for part in parts] for parts in (self.instances, self.semantics))
        return dict(zip(("rows", "instances", "semantics"), (self.rows, *benchmark), strict=True))

    def absorb(self, state: Mapping[str, Any]) -> None:
        """Add what another scorer was fed with."""
        for mine, theirs in zip(self.rows, state["rows"], strict=True):
            mine += theirs
        for name in ("instances", "semantics"):
            for part, found in zip(getattr(self, name), state[name], strict=True):
                part.absorb(found)

    def results(self) -> list[dict[str, float]]:
        """AP, AP50, AP75, PQ ..., mIoU of each layer in percent; what has no ground truth at all is left out."""
        return [self._result(layer) for layer in range(len(self.rows))]

    def _result(self, layer: int) -> dict[str, float]:
        from analysis import scores

        found = scores.from_table(per_image.table(self.rows[layer]), self.things).scores()
        if self.instances:
            found |= self.instances[layer].result() if self.wanted.instance else {}
            found |= self.semantics[layer].result() if self.wanted.semantic else {}
        return {name: value for name, value in found.items() if not np.isnan(value)}


def _listed(found: Detected) -> Iterator[CountedDetection]:
    """Detections by falling score."""
    order = np.argsort(-found.scores, kind="stable")
    columns = (found.classes, found.scores, found.area, found.shared)
    for line in zip(*(values[order].tolist() for values in columns), strict=True):
        yield CountedDetection(*line)


def _object_masks(truth: GroundTruth) -> NDArray[np.bool_]:
    """(n, H, W) masks of an image's annotations."""
    from pycocotools import mask as coco

    codes = [to_rle(a["segmentation"], truth.height, truth.width) for a in truth.annotations or ()]
    masks = [coco.decode(code).astype(bool) for code in codes]
    return np.stack(masks) if masks else np.zeros((0, truth.height, truth.width), dtype=bool)


def detection_columns(
    layers: Sequence[Detected], truth: GroundTruth, pixels: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """The detections' columns of ``per_image.parquet`` of one image at each layer, matched as COCO matches.

    pixels (n,) are those of the image's annotated objects.
    """
    annotations = truth.annotations or ()
    labels = np.array([a["category_id"] for a in annotations], dtype=np.int64)
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
    layer = np.repeat(np.arange(len(layers)), [len(found.scores) for found in layers])
    category, score, area, shared = (
        np.concatenate([getattr(found, name) for found in layers]) for name in ("classes", "scores", "area", "shared")
    )
    group = layer * (1 + int(max(category.max(initial=0), labels.max(initial=0)))) + category
    order = np.lexsort((-score, group))
    order = order[np.arange(len(order)) - np.searchsorted(group[order], group[order]) < MAX_DETECTIONS]
    layer, category, score, area, shared = (values[order] for values in (layer, category, score, area, shared))
    union = np.where(crowd, area[:, None], area[:, None] + pixels - shared)
    ious = shared / np.maximum(union, 1) * (category[:, None] == labels)
    matched, skipped = match_by_counts(ious, group[order], layer, crowd)
    bounds = np.searchsorted(layer, np.arange(len(layers) + 1))
    return [
        {
            "det_category": category[a:b],
            "det_score": score[a:b],
            "det_match": matched[:, a:b].ravel(),
            "det_ignore": skipped[:, a:b].ravel(),
            "gt_category": labels,
            "gt_ignore": crowd,
        }
        for a, b in pairwise(bounds)
    ]
