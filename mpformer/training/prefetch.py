"""Micro-batches on the device that computes, the next one copied there while this one is worked on."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mpformer.data.loader import with_tensors
from mpformer.runtime.errors import RunFailure
from mpformer.training.accumulation import MicroBatch


def prefetched(parts: Iterable[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """The micro-batches with their tensors on ``device``, on a GPU one ahead; on CPU exactly as they come.

    The copies run on a stream of their own, from page-locked memory, so that the host does not wait for them and they
    need no time of the GPU's kernels. One micro-batch more is then loaded than is asked for.
    """
    return _copied_ahead(iter(parts), device) if device.type == "cuda" else iter(parts)


def _copied_ahead(parts: Iterator[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    side = torch.cuda.Stream(device)
    ahead = _copied(parts, device, side)
    while ahead is not None:
        now, ahead = ahead, None
        torch.cuda.current_stream(device).wait_stream(side)
        _used_here(now, device)
        try:
            ahead = _copied(parts, device, side)
        except RunFailure:  # of a later iteration: this one is whole
            yield now
            raise
        yield now


def _copied(parts: Iterator[MicroBatch], device: torch.device, side: torch.cuda.Stream) -> MicroBatch | None:
    part = next(parts, None)
    if part is None:
        return None
    with torch.cuda.stream(side):
        return replace(part, batch=with_tensors(part.batch, lambda x: x.to(device, non_blocking=True)))


def _used_here(part: MicroBatch, device: torch.device) -> None:
    """Tell the allocator that the stream of the computation uses these tensors of the side stream, too."""
    stream = torch.cuda.current_stream(device)

    def noted(tensor: Tensor) -> Tensor:
        tensor.record_stream(stream)
        return tensor

    with_tensors(part.batch, noted)
