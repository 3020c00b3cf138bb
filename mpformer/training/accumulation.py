"""Gradient accumulation that equals the big batch: what each micro-batch's losses weigh in the whole.

The criterion divides by normalisers of the batch that it sees: mask and dice sums by the number of
objects, the class loss by the summed class weights of the queries. Both follow from the object
counts alone, so they are known before any forward pass, and a micro-batch's loss times (its normaliser /
the whole batch's normaliser) sums to the loss of the whole batch.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpformer.config.schema import Config
from mpformer.runtime.distributed import total
from mpformer.runtime.rank import current_rank

_LEAST_WEIGHT = 1e-9
"""Without objects and with `no_object_weight` 0 nothing weighs anything: each class loss is 0, and so is its share."""

_NAME = re.compile(r"loss_(ce|mask|dice)")


@dataclass(frozen=True)
class Shares:
    """Normaliser of one micro-batch over that of the effective batch, by kind of loss (1 when there is one)."""

    objects: float = 1.0
    matched_class: float = 1.0
    piloted_class: float = 1.0

    def of(self, name: str) -> float:
        """Share for the loss `name`, such as ``loss_mask_3`` or ``loss_ce_pilot``."""
        if not name.startswith("loss_ce"):
            return self.objects
        return self.piloted_class if "pilot" in name else self.matched_class

    def weigh(self, losses: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Multiply each loss with its share."""
        whole = self == Shares()
        return {name: value if whole else value * self.of(name) for name, value in losses.items()}


@dataclass(frozen=True)
class MicroBatch:
    """A part of this process's images of one iteration."""

    batch: list[dict[str, Any]]
    share: Shares
    slot: int
    """Its place among the iteration's micro-batches."""
    last: bool


def micro_batches(batches: Iterable[list[dict[str, Any]]], config: Config) -> Iterator[MicroBatch]:
    """Cut each iteration's batch into ``runtime.accumulation`` micro-batches with their shares."""
    for batch in batches:
        parts = split(batch, config.runtime.accumulation)
        for slot, (part, share) in enumerate(zip(parts, shares(parts, config), strict=True)):
            yield MicroBatch(part, share, slot, last=slot == len(parts) - 1)


def split(batch: Sequence[dict[str, Any]], parts: int) -> list[list[dict[str, Any]]]:
    """Cut a batch into at most `parts` micro-batches of nearly equal size, in order."""
    size = -(-len(batch) // parts)
    return [list(batch[start : start + size]) for start in range(0, len(batch), size)]


def shares(micro_batches: Sequence[Sequence[dict[str, Any]]], config: Config) -> list[Shares]:
    """Return what each micro-batch weighs; counts are summed over all processes.

    With ``pilot_padding = "reference"`` padding slots enter the class mean of a micro-batch, whose number
    depends on its own largest count: accumulation is then close to the big batch, not equal to it.
    """
    if len(micro_batches) == 1:
        return [Shares()]
    numbers = total(torch.tensor([_normalisers(batch, config) for batch in micro_batches], dtype=torch.float64))
    objects, classes = (numbers / current_rank().world_size).unbind(1)
    by_objects = objects.clamp(min=1) / objects.sum().clamp(min=1)
    by_class = classes / classes.sum().clamp(min=_LEAST_WEIGHT)
    return [Shares(float(n), float(c), float(n)) for n, c in zip(by_objects, by_class, strict=True)]


def summed(losses: Mapping[str, float]) -> dict[str, float]:
    """Sum the losses over the decoder's layers: ``loss_ce``, ``loss_mask``, … and the same with ``_pilot``."""
    sums: dict[str, float] = {}
    for name, value in losses.items():
        kind = _NAME.match(name)
        key = f"{kind[0]}{'_pilot' if 'pilot' in name else ''}" if kind else name
        sums[key] = sums.get(key, 0.0) + value
    return sums


def _normalisers(batch: Sequence[dict[str, Any]], config: Config) -> tuple[float, float]:
    """(objects, summed class weights) of a micro-batch; a matched query weighs 1, another `no_object_weight`."""
    counts = [len(item["instances"]) for item in batch]
    queries = config.model.queries
    matched = sum(min(count, queries) for count in counts)
    free = queries * len(counts) - matched
    return float(sum(counts)), matched + config.model.no_object_weight * free
