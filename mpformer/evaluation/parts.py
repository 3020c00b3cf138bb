"""An evaluation in parts: each process scores some, what is there already is not done again, and one merges them.

A part is a run of validation images, the same ones however many processes share the work, and a file that is written
when all of them are scored. A process does its own parts first, then whatever is still missing from the others, last
parts first: one that died or never came delays the end, but nobody waits for it. An evaluation that was stopped goes
on with the parts that it has, as long as weights, data and setting are the same.
"""

import hashlib
import json
import os
import pickle
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpformer.config.schema import Config, plain
from mpformer.runtime.disk import sha256
from mpformer.runtime.errors import RunFailure
from mpformer.runtime.rank import Rank

PART_IMAGES = 64
"""Images of a part: a whole number of batches of small images, so that parts do not change what a batch is."""


@dataclass(frozen=True)
class Parts:
    """The parts of one evaluation of ``images`` images; files are in ``folder``."""

    folder: Path
    images: int

    @classmethod
    def of(cls, config: Config, weights: Path, out: Path, images: int) -> "Parts":
        """The parts of an evaluation in the directory ``out``, apart from those of other weights, data or settings."""
        settings = [plain(section) for section in (config.dataset, config.model, config.evaluation)]
        key = json.dumps([sha256(weights), images, *settings], sort_keys=True)
        parts = cls(out / "parts" / hashlib.sha256(key.encode()).hexdigest()[:12], images)
        parts.folder.mkdir(parents=True, exist_ok=True)
        return parts

    def __len__(self) -> int:
        return -(-self.images // PART_IMAGES)

    def indices(self, number: int) -> range:
        """Indices of a part's images in the order of all."""
        return range(number * PART_IMAGES, min((number + 1) * PART_IMAGES, self.images))

    def to_do(self, here: Rank) -> Iterator[int]:
        """Parts that nobody has written when their turn comes: this process's own, then the others', the last first."""
        own = range(here.number, len(self), here.world_size)
        for number in [*own, *(n for n in reversed(range(len(self))) if n not in own)]:
            if not self._file(number).exists():
                yield number

    def images_done(self) -> int:
        """Images of the parts that are written."""
        return sum(len(self.indices(number)) for number in range(len(self)) if self._file(number).exists())

    def write(self, number: int, state: dict[str, Any]) -> None:
        """Write a part, whole or not at all; without a folder the evaluation is over, and nothing is written."""
        file = self._file(number)
        partial = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            torch.save(_as_tensors(state), partial)
            partial.replace(file)
        except FileNotFoundError:
            return

    def read(self, number: int) -> dict[str, Any]:
        """A part's state; raises RunFailure("disk") for a damaged file, which is taken away."""
        file = self._file(number)
        try:
            state: dict[str, Any] = _as_arrays(torch.load(file, weights_only=True))
        except (RuntimeError, EOFError, pickle.UnpicklingError):
            file.unlink()
            raise RunFailure("disk", f"{file} is damaged and was removed; launch again to score its images") from None
        return state

    def remove(self) -> None:
        """Take all parts away, those of other weights and settings included."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.pt"


def _as_tensors(value: Any) -> Any:
    """Plain data whose arrays are tensors: read back without running what a file says."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {_as_tensors(key): _as_tensors(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_tensors(inner) for inner in value]
    return value


def _as_arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: _as_arrays(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_arrays(inner) for inner in value]
    return value
