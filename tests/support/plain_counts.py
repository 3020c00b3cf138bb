"""Counts of pixels made of whole masks, one at a time: what the decoder layers' scores are fed with, the plain way."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpformer.data.validation import GroundTruth
from mpformer.evaluation.scoring.from_counts import Detected, LayerCounts, TruthMaps
from mpformer.evaluation.scoring.panoptic import ByClass, parts_of
from mpformer.evaluation.scoring.semantic import class_map

Prediction = dict[str, Any]


def counted(prediction: Prediction, maps: TruthMaps, classes: int) -> LayerCounts:
    """The counts of instances and semantic map of a prediction in detectron2's format."""
    confusion = None
    if maps.classes is not None:
        confusion = np.zeros((classes, classes + 1), dtype=np.int64)
        np.add.at(confusion, (class_map(prediction["sem_seg"]), maps.classes), 1)
    return LayerCounts(
        None if maps.objects is None else detected(prediction["instances"], maps.objects), None, confusion
    )


def detected(instances: Any, objects: NDArray[np.bool_]) -> Detected:
    """Each detection's pixels, mask by mask."""
    masks = np.asarray(instances.pred_masks).astype(bool)
    shared = [[int((mask & one).sum()) for one in objects] for mask in masks]
    return Detected(
        np.arange(len(masks)),
        np.asarray(instances.pred_classes),
        np.asarray(instances.scores, dtype=np.float32),
        masks.sum((1, 2)),
        np.array(shared, dtype=np.int64).reshape(len(masks), len(objects)),
    )


def compared(ids: NDArray[np.int64], segments: dict[int, int], truth: GroundTruth) -> ByClass:
    """Panoptic parts of an id map (H, W), whose overlaps are counted pair by pair of ids."""
    assert truth.ids is not None
    pairs = np.stack([truth.ids.ravel().astype(np.int64), ids.ravel()])
    found, counts = np.unique(pairs, axis=1, return_counts=True)
    return parts_of({(int(t), int(p)): int(n) for t, p, n in zip(*found, counts, strict=True)}, segments, truth)
