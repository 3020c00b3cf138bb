"""The jump rate: how many objects' masks change to another place on the way through the decoder. No torch.

An object matched at the last layer, to query q, *jumps* at step i (1 … L) if IoU(mask_q of layer i − 1, mask_q of
layer i) is below :data:`THRESHOLD`; a pair of two empty masks does not jump. The definition is this project's own.
Everything here comes from ``layers.parquet`` alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from analysis.statistics import LEVEL, bootstrap_weights

THRESHOLD = 0.5


class Table(Protocol):
    """What is asked of an :class:`analysis.layer_table.LayerTable`."""

    @property
    def layers(self) -> int:
        """Number of prediction layers, A = L + 1."""

    @property
    def first_layer(self) -> int:
        """The first layer that predicts: 0, or 1."""

    def __getitem__(self, column: str, /) -> np.ndarray:
        """A column, one entry a line."""

    def grid(self, column: str) -> np.ndarray:
        """A column as (A, pairs)."""


@dataclass(frozen=True)
class JumpRates:
    """Shares of the objects, in percent; NaN without an object (and ``late`` with fewer than two steps is 0)."""

    once: float
    """Objects that jump at any step 1 … L; NaN where layer 0, and so step 1, does not exist."""
    late: float
    """Objects that jump after layer 1, that is at any step 2 … L."""
    objects: int


def jumps(table: Table, threshold: float = THRESHOLD) -> np.ndarray:
    """Which objects jump at which step: (L, objects) bool, objects by image, then by number."""
    return _shared(table) < threshold


def _shared(table: Table) -> np.ndarray:
    """What each mask shares with the one before (L, objects); NaN, two empty masks, is not below any threshold."""
    return table.grid("iou_previous")[1:]


def jump_rates(table: Table, threshold: float = THRESHOLD) -> JumpRates:
    """The jump rate, at least once and after layer 1."""
    return jump_curve(table, [threshold])[0]


def jump_curve(table: Table, thresholds: Sequence[float]) -> list[JumpRates]:
    """The jump rate at each threshold: what hangs on the choice of 0.5."""
    shared = _shared(table)
    return [_rates(shared < threshold, bool(table.first_layer)) for threshold in thresholds]


def _rates(steps: np.ndarray, without_first: bool) -> JumpRates:
    """Of (L, objects) jumps."""
    objects = steps.shape[1]
    if not objects:
        return JumpRates(float("nan"), float("nan"), 0)
    once = float("nan") if without_first else 100 * float(steps.any(0).mean())
    return JumpRates(once, 100 * float(steps[1:].any(0).mean()), objects)


def checkpoint_interval(
    first: Table, second: Table | None = None, *, late: bool = False, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval, over images, of the jump rate of *one checkpoint*, or of ``second − first`` of *two
    checkpoints* on the same images; in percent (of points). It says nothing of the methods that made them.

    ``late`` takes the rate after layer 1. Raises ValueError where there is no object, the images differ, or a model has
    no layer 0 to jump from.
    """
    if not late and any(table.first_layer for table in (first, second) if table is not None):
        raise ValueError("layer 0 predicts nothing: late=True takes the rate after layer 1")
    counted = [_per_image(table, late) for table in (first, second) if table is not None]
    if any(not np.array_equal(images, counted[0][0]) for images, _, _ in counted):
        raise ValueError("they were evaluated on different images")
    if not len(counted[0][0]):
        raise ValueError("no object to count")
    rates = []
    for weights in bootstrap_weights(len(counted[0][0]), resamples, seed):
        shares = [100 * (weights @ jumping) / (weights @ objects) for _, jumping, objects in counted]
        rates.append(shares[-1] - (shares[0] if second is not None else 0))
    low, high = np.quantile(rates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _per_image(table: Table, late: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of the images with objects, their objects that jump, their objects: each (images,)."""
    ids = np.sort(table["image_id"][table["layer"] == table.layers - 1])
    jumping = jumps(table)[int(late) :].any(0)
    images, start = np.unique(ids, return_index=True)
    return images, np.add.reduceat(jumping.astype(float), start), np.diff([*start, len(ids)]).astype(float)
