"""Micro-batches come on the device, copied ahead on a stream of their own; a stand-in for CUDA notes what is asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from detectron2.structures import Instances
from torch import Tensor

from mpformer.config.schema import Config
from mpformer.runtime.errors import RunFailure
from mpformer.training.accumulation import MicroBatch, micro_batches
from mpformer.training.prefetch import prefetched

CUDA = torch.device("cuda")


def batch(number: int, images: int = 2) -> list[dict[str, Any]]:
    found = Instances((4, 4), gt_classes=torch.tensor([number]), gt_masks=torch.ones(1, 4, 4, dtype=torch.bool))
    return [{"image": torch.full((3, 4, 4), number), "instances": found, "file_name": "a.png"} for _ in range(images)]


def counted(count: int, asked: list[int]) -> Iterator[list[dict[str, Any]]]:
    for number in range(count):
        asked.append(number)
        yield batch(number)


def numbers(part: MicroBatch) -> list[int]:
    return [int(item["image"][0, 0, 0]) for item in part.batch]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU that is none: what its streams and the copies to it were asked, in order."""
    events: list[str] = []
    on_side = [False]

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            events.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def stream(of: Stream) -> Iterator[None]:
        on_side[0] = True
        yield
        on_side[0] = False

    def to(tensor: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
        assert on_side[0]
        assert device == CUDA
        assert non_blocking
        events.append("copy")
        return tensor.clone()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, on: events.append(f"used on {on.name}"))
    return events


def test_on_cpu_nothing_is_copied_nor_loaded_ahead(shapes_config: Config) -> None:
    asked: list[int] = []
    source = counted(9, asked)
    parts = micro_batches(source, shapes_config)
    first = next(prefetched(parts, torch.device("cpu")))
    assert asked == [0]
    assert prefetched(parts, torch.device("cpu")) is parts
    assert (numbers(first), first.slot, first.last) == ([0, 0], 0, True)


def test_every_tensor_is_copied_without_waiting_one_micro_batch_ahead(shapes_config: Config, said: list[str]) -> None:
    asked: list[int] = []
    source = counted(3, asked)
    parts = prefetched(micro_batches(source, shapes_config), CUDA)
    assert numbers(next(parts)) == [0, 0]
    # two images of three tensors each: copied; then the computation waits and claims them; then the next ones
    assert said == ["copy"] * 6 + ["main waits for side"] + ["used on main"] * 6 + ["copy"] * 6
    assert asked == [0, 1]
    assert [numbers(part) for part in parts] == [[1, 1], [2, 2]]


def test_accumulation_copies_micro_batches_not_batches(shapes_config: Config, said: list[str]) -> None:
    config = shapes_config.replace({"runtime.accumulation": 3})
    parts = list(prefetched(micro_batches([batch(0, 5), batch(1, 5)], config), CUDA))
    assert [len(part.batch) for part in parts] == [2, 2, 1, 2, 2, 1]
    assert [(part.slot, part.last) for part in parts] == [(0, False), (1, False), (2, True)] * 2
    assert sum(part.share.objects for part in parts[:3]) == pytest.approx(1)


def test_a_file_that_cannot_be_read_ends_the_run_in_its_own_iteration(shapes_config: Config, said: list[str]) -> None:
    def source() -> Iterator[list[dict[str, Any]]]:
        yield batch(0)
        raise RunFailure("data", "corrupt")

    parts = prefetched(micro_batches(source(), shapes_config), CUDA)
    assert numbers(next(parts)) == [0, 0]
    with pytest.raises(RunFailure, match="corrupt"):
        next(parts)
