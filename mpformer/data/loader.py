"""Batches for training and images with their ground truth for evaluation.

The batch of iteration t is a pure function of (configuration, t): image k = t * batch size + slot lies at position
k mod N of the permutation of epoch k div N, and the augmentation of (t, slot) has a random stream of its own. So worker
processes, the number of devices and resuming change nothing. For a GPU the tensors come in page-locked memory, so that
they can be copied while it computes.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mpformer.config.classes import num_classes
from mpformer.config.schema import Config
from mpformer.data import catalog
from mpformer.data.mappers import training_sample
from mpformer.data.packed import Records
from mpformer.data.sources import Prepared, source_of
from mpformer.data.targets import CorruptImage, Labels, Pixels, read_image, read_labels
from mpformer.runtime.errors import RunFailure
from mpformer.runtime.random_streams import numpy_generator

_log = logging.getLogger(__name__)
Batch = list[dict[str, Any]]
#: slot of the data stream that permutes an epoch; no batch is as large
_EPOCH_SLOT = 2**31 - 1
#: decoded images up to this many bytes in all are kept in memory
_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class _Loaded:
    """What a worker hands back: the batch and the files that were skipped, or why it is impossible."""

    batch: Batch
    skipped: tuple[str, ...] = ()
    failure: str = ""

    def pin_memory(self) -> "_Loaded":
        """The same with its tensors in page-locked memory; called by torch's loader, which looks into no dataclass."""
        return replace(self, batch=with_tensors(self.batch, Tensor.pin_memory))


def with_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with every tensor, those of the instances too, replaced by what ``change`` makes of it."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, Instances):
            return Instances(value.image_size, **{name: changed(field) for name, field in value.get_fields().items()})
        return value

    return [{name: changed(value) for name, value in item.items()} for item in batch]


class TrainSet(Dataset):
    """The training images; item t is this process's share of the batch of iteration t."""

    def __init__(self, config: Config, data_root: Path, rank: int = 0, size: int = 1) -> None:
        self.config, self.rank, self.size = config, rank, size
        task = config.dataset.task
        self.classes = num_classes(config.dataset.name, task)
        found = catalog.records(config, data_root, "train", [task])
        self.records = _usable(found, task)[: config.dataset.train_images]
        if not self.records:
            raise RunFailure("data", f"{config.dataset.name} has no training image with an annotation")
        self._decoded: dict[int, tuple[Pixels, Labels]] = {}
        own = isinstance(source_of(config.dataset.name), Prepared)
        self._cache = own and _decoded_bytes(self.records) <= _CACHE_BYTES

    def __getitem__(self, iteration: int) -> _Loaded:
        total = self.config.schedule.batch_size
        skipped: list[str] = []
        try:
            batch = [self._sample(iteration, slot, skipped) for slot in range(total) if slot % self.size == self.rank]
        except CorruptImage as error:
            return _Loaded([], failure=str(error))
        return _Loaded(batch, tuple(skipped))

    def _sample(self, iteration: int, slot: int, skipped: list[str]) -> dict[str, Any]:
        """One augmented image; with ``on_corrupt: skip`` a corrupt one gives way to the next of the epoch."""
        position = iteration * self.config.schedule.batch_size + slot
        for attempt in range(len(self.records)):
            index = self.index_at(position, attempt)
            try:
                image, labels = self._decode(index)
                break
            except CorruptImage as error:
                if self.config.dataset.on_corrupt == "fail":
                    raise
                skipped.append(str(error))
        else:
            raise CorruptImage("no training image can be read")
        rng = numpy_generator(self.config.seed, "data", iteration, slot)
        sample = training_sample(image, labels, self.config.dataset.augmentation, rng)
        record = self.records[index]
        size = {"height": image.shape[0], "width": image.shape[1]}
        return {**sample, **size, "file_name": record["file_name"], "image_id": record["image_id"]}

    def index_at(self, position: int, ahead: int = 0) -> int:
        """The record at a position in the endless sequence of permuted epochs; ``ahead`` further, in the same epoch."""
        n = len(self.records)
        return int(_permutation(self.config.seed, position // n, n)[(position % n + ahead) % n])

    def _decode(self, index: int) -> tuple[Pixels, Labels]:
        if index in self._decoded:
            return self._decoded[index]
        record = self.records[index]
        image = read_image(record)
        sized = {**record, "height": image.shape[0], "width": image.shape[1]}
        decoded = image, read_labels(sized, self.config.dataset.task, self.classes)
        if self._cache:
            self._decoded[index] = decoded
        return decoded


def _usable(records: Records, task: str) -> Records:
    """Drop images that teach nothing about instances: without annotation, or with crowds only (as detectron2 does)."""
    if task != "instance":
        return records
    held = (any(not a.get("iscrowd", 0) for a in record["annotations"]) for record in records)
    kept = records.only(index for index, usable in enumerate(held) if usable)
    if len(kept) < len(records):
        _log.info("%d of %d training images have no object and are left out", len(records) - len(kept), len(records))
    return kept


def _decoded_bytes(records: Records) -> int:
    """What the decoded images and label maps take, judged by the first image."""
    with Image.open(records[0]["file_name"]) as first:
        width, height = first.size
    return 4 * width * height * len(records)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    return numpy_generator(seed, "data", epoch, _EPOCH_SLOT).permutation(n)


class TrainBatches:
    """An endless iterator over this process's batches; counts what it had to skip."""

    def __init__(self, dataset: TrainSet, start_iteration: int, workers: int, pinned: bool) -> None:
        self.dataset = dataset
        self.skipped: set[str] = set()
        self._loaded = iter(
            DataLoader(
                dataset,
                batch_size=None,
                sampler=_From(start_iteration),
                num_workers=workers,
                collate_fn=_as_is,
                generator=torch.Generator(),  # leaves torch's global random state alone
                pin_memory=pinned,
            )
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; raises RunFailure("data") for a corrupt file unless those are skipped."""
        loaded: _Loaded = next(self._loaded)
        if loaded.failure:
            raise RunFailure("data", f"{loaded.failure} (dataset.on_corrupt=skip leaves such images out)")
        for reason in set(loaded.skipped) - self.skipped:
            self.skipped.add(reason)
            _log.warning("skipped image %d: %s", len(self.skipped), reason)
        return loaded.batch


class _From(Iterable[int]):
    """start, start + 1, ... without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        t = self.start
        while True:
            yield t
            t += 1


def _as_is(loaded: Any) -> Any:
    return loaded


def train_batches(
    config: Config, data_root: Path, start_iteration: int = 0, rank: int = 0, size: int = 1, pinned: bool = False
) -> TrainBatches:
    """The batches from an iteration on: this process's slots of each effective batch (slot mod size = rank).

    ``pinned`` puts their tensors into page-locked memory, for a GPU. Raises UserError if the dataset is not there or is
    broken; the iterator raises RunFailure("data") for a corrupt image (unless ``dataset.on_corrupt`` is ``skip``).
    """
    return TrainBatches(TrainSet(config, data_root, rank, size), start_iteration, config.runtime.workers, pinned)
