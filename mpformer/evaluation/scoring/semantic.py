"""Mean intersection over union of semantic maps, as detectron2's SemSegEvaluator counts it (agreement is tested).

Pixels without a label are left out altogether; the mean is over the classes that occur in the ground truth.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpformer.data.targets import IGNORE_LABEL
from mpformer.data.validation import GroundTruth

#: per class: intersection, union, pixels in the ground truth
Counts = NDArray[np.int64]


@dataclass
class SemanticScorer:
    """Adds up intersections and unions over images."""

    classes: int
    images: dict[int, Counts] = field(default_factory=dict)

    def add(self, sem_seg: Any, truth: GroundTruth) -> None:
        """Add one image: scores (C, H, W), of which the largest counts, or a map of classes (H, W)."""
        assert truth.semantic is not None
        self.images[truth.image_id] = counts(class_map(sem_seg), truth.semantic, self.classes)

    def state(self) -> dict[str, Any]:
        """What has been added, as plain data and arrays."""
        return {"images": self.images}

    def absorb(self, state: Mapping[str, Any]) -> None:
        """Add what another scorer has counted."""
        self.images |= state["images"]

    def result(self) -> dict[str, float]:
        """mIoU in percent; left out if no pixel has a label."""
        total = sum(self.images.values(), np.zeros((3, self.classes), dtype=np.int64))
        present = total[2] > 0
        return {"mIoU": 100 * float(np.mean(total[0][present] / total[1][present]))} if present.any() else {}

    def per_image(self) -> dict[int, dict[str, Any]]:
        """Columns of per_image.parquet by image id, for the classes that an image touches."""
        return {image_id: columns_of_counts(found) for image_id, found in self.images.items()}


def class_map(sem_seg: Any) -> NDArray[Any]:
    """Scores (C, H, W) of either library, or a map already, as a map of classes (H, W)."""
    classes = sem_seg.argmax(0) if sem_seg.ndim == 3 else sem_seg
    return classes.detach().cpu().numpy() if hasattr(classes, "detach") else np.asarray(classes)


def columns_of_counts(found: Counts) -> dict[str, Any]:
    """One image's columns of per_image.parquet."""
    touched = np.flatnonzero(found[1])
    columns: dict[str, Any] = {"sem_category": touched.tolist()}
    for key, values in zip(("intersection", "union", "ground_truth"), found, strict=True):
        columns[f"sem_{key}"] = values[touched].tolist()
    return columns


def counts(predicted: NDArray[Any], true: NDArray[np.uint8], classes: int) -> Counts:
    """Intersection, union and ground-truth pixels (3, C) of two maps (H, W)."""
    labelled = true != IGNORE_LABEL
    p, t = predicted[labelled].astype(np.int64), true[labelled].astype(np.int64)
    return counts_of(np.bincount(p * classes + t, minlength=classes * classes).reshape(classes, classes))


def counts_of(confusion: NDArray[np.int64]) -> Counts:
    """Intersection, union and ground-truth pixels (3, C) from pixels by predicted and true class (C, C)."""
    intersection, of_true, of_predicted = confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)
    return np.stack([intersection, of_true + of_predicted - intersection, of_true])
