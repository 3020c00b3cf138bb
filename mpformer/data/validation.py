"""Validation images with their ground truth, for scoring and for the layer analysis, in the order of image ids."""

from collections.abc import Collection, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data.transforms import ResizeTransform
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mpformer.config.classes import class_table, num_classes
from mpformer.config.schema import Config
from mpformer.data import catalog
from mpformer.data.mappers import pack, shortest_edge, transform_labels
from mpformer.data.targets import (
    CorruptImage,
    panoptic_labels,
    read_image,
    read_labels,
    read_segment_ids,
    read_semantic,
)
from mpformer.runtime.errors import RunFailure


@dataclass(frozen=True)
class Segment:
    """One segment of a panoptic ground truth; category is contiguous over things and stuff."""

    id: int
    category: int
    crowd: bool


@dataclass(frozen=True)
class GroundTruth:
    """What an image is scored against; parts that the evaluation does not need are None.

    annotations: COCO's, with ``category_id`` in the model's contiguous classes. ids: (H, W) integers, 0 is void, with
    the segments. semantic: (H, W) uint8 contiguous classes, 255 is ignored. Sizes are those of the original image.
    """

    image_id: int
    height: int
    width: int
    annotations: tuple[Mapping[str, Any], ...] | None = None
    ids: NDArray[Any] | None = None
    segments: tuple[Segment, ...] = ()
    semantic: NDArray[np.uint8] | None = None
    file_name: str = ""
    """The image's file, beside which Cityscapes' scripts find their own ground truth."""


@dataclass(frozen=True)
class ValidationItem:
    """inputs: a batch item (detectron2's convention), with the targets of the task at the input's size as instances."""

    inputs: dict[str, Any]
    truth: GroundTruth


class ValidationItems:
    """The validation images of a configuration; a sized iterable that reads each image when it is asked for.

    ``skipped`` counts images that could not be read, with ``dataset.on_corrupt: skip``; otherwise RunFailure("data").
    """

    def __init__(self, config: Config, data_root: Path, limit: int | None = None) -> None:
        self.config = config
        self.skipped: list[str] = []
        evaluation = config.evaluation
        scored = {"instance": evaluation.instance, "panoptic": evaluation.panoptic, "semantic": evaluation.semantic}
        self.scored = frozenset(task for task, wanted in scored.items() if wanted)
        found = catalog.records(config, data_root, "val", self.scored | {config.dataset.task})
        limits = [n for n in (limit, evaluation.val_images) if n is not None]
        self.records = found[: min(limits)] if limits else found

    def __len__(self) -> int:
        return len(self.records)

    def only(self, indices: Collection[int]) -> "ValidationItems":
        """The items at some indices, with a list of skipped images of their own."""
        chosen = copy(self)
        chosen.skipped = []
        chosen.records = self.records.only(index for index in range(len(self.records)) if index in indices)
        return chosen

    def __iter__(self) -> Iterator[ValidationItem]:
        """The items in their order, read ahead by ``runtime.workers`` processes if there are any."""
        generator = torch.Generator()  # leaves torch's global random state alone
        for found in DataLoader(_Reads(self), None, num_workers=self._workers, collate_fn=_as_is, generator=generator):
            if isinstance(found, ValidationItem):
                yield found
            elif self.config.dataset.on_corrupt == "fail":
                raise RunFailure("data", f"{found} (dataset.on_corrupt=skip leaves such images out)")
            else:
                self.skipped.append(found)

    @property
    def _workers(self) -> int:
        return min(self.config.runtime.workers, len(self.records))

    def read(self, record: Mapping[str, Any]) -> ValidationItem:
        """Read one image; raises CorruptImage."""
        dataset = self.config.dataset
        image = read_image(record)
        h, w = image.shape[:2]
        sized = {**record, "height": h, "width": w}
        labels = read_labels(sized, dataset.task, num_classes(dataset.name, dataset.task))
        evaluation = self.config.evaluation
        nh, nw = shortest_edge(h, w, evaluation.min_size_test, evaluation.max_size_test)
        if (nh, nw) != (h, w):
            resize = ResizeTransform(h, w, nh, nw)
            image, labels = resize.apply_image(image), transform_labels(labels, [resize])
        names = {"file_name": record["file_name"], "image_id": record["image_id"], "height": h, "width": w}
        return ValidationItem({**pack(image, *labels.masks()), **names}, self._truth(sized))

    def _truth(self, record: Mapping[str, Any]) -> GroundTruth:
        parts: dict[str, Any] = {}
        if "instance" in self.scored:
            parts["annotations"] = self._annotations(record)
        if "panoptic" in self.scored:
            parts["ids"] = read_segment_ids(record)
            parts["segments"] = tuple(
                Segment(s["id"], s["category_id"], bool(s["iscrowd"])) for s in record["segments_info"]
            )
        if "semantic" in self.scored:
            parts["semantic"] = self._semantic(record)
        parts["file_name"] = record["file_name"]
        return GroundTruth(record["image_id"], record["height"], record["width"], **parts)

    def _annotations(self, record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        """COCO annotations with the classes of the task that the model was trained for."""
        dataset = self.config.dataset
        if dataset.task == "instance":
            return tuple(record["annotations"])
        index = class_table(dataset.name, dataset.task).thing_indices
        return tuple({**a, "category_id": index[a["category_id"]]} for a in record["annotations"])

    def _semantic(self, record: Mapping[str, Any]) -> NDArray[np.uint8]:
        if "sem_seg_file_name" in record:
            return read_semantic(record)
        return panoptic_labels(record).classes()


class _Reads(Dataset[ValidationItem | str]):
    """Reads an item; of an image that cannot be read it gives the reason, since a worker's exception names no type."""

    def __init__(self, items: ValidationItems) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> ValidationItem | str:
        try:
            return self.items.read(self.items.records[index])
        except CorruptImage as error:
            return str(error)


def _as_is(found: Any) -> Any:
    return found


def validation_items(config: Config, data_root: Path, limit: int | None = None) -> ValidationItems:
    """The validation images (the first ``limit``, if given), ordered by image id.

    Raises UserError if the dataset is not there or is broken.
    """
    return ValidationItems(config, data_root, limit)
