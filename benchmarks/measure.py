"""Seconds, memory and floating-point operations of the stages of one training step."""

import statistics
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.paths import BACKWARD, STAGES, Path, assignment_modules

STEP = "whole step"
DECODING = ("decoder", "matching", "losses", "backward: decoder and losses")
PIXELS = ("pixel decoder", "backward: pixel decoder")
BACKBONE = ("backbone", "backward: backbone")


@dataclass
class Clock:
    """Wall and CPU seconds by stage."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        with record_function(f"stage:{name}"):
            yield
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu


def step(path: Path, clock: Clock) -> float:
    """One training step (forward and backward, no optimiser), the graph cut between stages; returns the loss.

    Cutting changes nothing but lets every stage's backward be measured by itself.
    """
    path.model.zero_grad(set_to_none=True)
    with clock.stage(STEP):
        with clock.stage("backbone"):
            maps = path.backbone()
        leaves = {k: v.detach().requires_grad_() for k, v in maps.items()}
        with clock.stage("pixel decoder"):
            pixels = path.pixel_decoder(leaves)
        inputs = tuple(p.detach().requires_grad_() for p in pixels)
        total = decode(path, inputs, clock)
        with clock.stage(BACKWARD[1]):
            _backward(pixels, inputs)
        with clock.stage(BACKWARD[2]):
            _backward(list(maps.values()), list(leaves.values()))
    return total


def decode(path: Path, pixels: tuple[Tensor, ...], clock: Clock) -> float:
    """Decoder, matching and losses, forward and backward, from given pixel features."""
    with clock.stage("decoder"):
        output = path.decoder(pixels)
    with clock.stage("matching"), timed_assignments(clock):
        matching = path.matching(output)
    with clock.stage("losses"):
        total = path.losses(output, matching)
    with clock.stage(BACKWARD[0]):
        total.backward()
    return float(total.detach())


def _backward(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    pairs = [(o, leaf.grad) for o, leaf in zip(outputs, leaves, strict=True) if leaf.grad is not None]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])


@contextmanager
def timed_assignments(clock: Clock) -> Iterator[None]:
    """Measure the Hungarian algorithm itself, inside the matching."""
    originals = [module.linear_sum_assignment for module in assignment_modules()]

    def timed(solve: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with clock.stage("assignments"):
                return solve(*args, **kwargs)

        return call

    for module, solve in zip(assignment_modules(), originals, strict=True):
        module.linear_sum_assignment = timed(solve)
    try:
        yield
    finally:
        for module, solve in zip(assignment_modules(), originals, strict=True):
            module.linear_sum_assignment = solve


def interleaved(runs: Mapping[str, Callable[[Clock], Any]], repeats: int) -> dict[str, list[Clock]]:
    """Run everything in turn, ``repeats`` times after one warm-up, starting from another one each time."""
    names = list(runs)
    clocks: dict[str, list[Clock]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            clock = Clock()
            runs[name](clock)
            if repeat > 0:
                clocks[name].append(clock)
    return clocks


def medians(clocks: Sequence[Clock], kind: str = "wall") -> dict[str, float]:
    """Median seconds of every stage and of the groups of stages."""
    rows = [grouped(getattr(clock, kind)) for clock in clocks]
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def grouped(seconds: dict[str, float]) -> dict[str, float]:
    """Add the sums that the targets are about."""
    sums = {
        "decoder + matching + losses, forward and backward": DECODING,
        "pixel decoder, forward and backward": PIXELS,
        "backbone, forward and backward": BACKBONE,
    }
    found = dict(seconds)
    for name, stages in sums.items():
        if all(s in seconds for s in stages):
            found[name] = sum(seconds[s] for s in stages)
    return found


def ratios(slow: Sequence[Clock], fast: Sequence[Clock], kind: str = "wall") -> dict[str, tuple[float, float, float]]:
    """Per stage the median, smallest and largest ratio slow / fast of runs next to each other."""
    pairs = [(grouped(getattr(a, kind)), grouped(getattr(b, kind))) for a, b in zip(slow, fast, strict=True)]
    found = {}
    for name in pairs[0][0]:
        values = [a[name] / b[name] for a, b in pairs if name in b and b[name] > 0]
        if values:
            found[name] = (statistics.median(values), min(values), max(values))
    return found


def memory(run: Callable[[Clock], Any]) -> dict[str, dict[str, float]]:
    """Bytes that a step allocates beyond what was there before, from the allocator's own events.

    Per stage: ``peak`` while it runs, and ``kept`` at its end, both above the step's start; ``added`` is what the
    stage leaves behind for the backward pass.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run(Clock())
    events = found.profiler.kineto_results.events()
    stages = [(e.name()[6:], e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if _is_stage(e)]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    when, live = [t for t, _ in changes], list(accumulate(size for _, size in changes))
    return {name: _levels_of(when, live, start, end) for name, start, end in stages if name != "assignments"}


def _is_stage(event: Any) -> bool:
    return event.name().startswith("stage:")


def _levels_of(when: list[int], live: list[int], start: int, end: int) -> dict[str, float]:
    """``live`` bytes after the changes at times ``when``, during [start, end]."""
    first, last = bisect_left(when, start), bisect_right(when, end)
    before = live[first - 1] if first else 0
    inside = live[first:last] or [before]
    return {"peak": max(inside), "kept": inside[-1], "added": inside[-1] - before}


def kept_by(found: dict[str, dict[str, float]], stages: Sequence[str]) -> float:
    """What some stages leave behind for the backward pass: their activation memory."""
    return sum(found[stage]["added"] for stage in stages)


def decoding_peak_of(found: dict[str, dict[str, float]]) -> float:
    """Peak of decoder, matching, losses and their backward above what was there before the decoder."""
    start = found["decoder"]["kept"] - found["decoder"]["added"]
    return max(found[stage]["peak"] for stage in DECODING) - start


def flops(path: Path) -> dict[str, float]:
    """Floating-point operations of convolutions and matrix products, by stage (multiply and add count as two)."""
    counts: dict[str, float] = {}

    class Counter(Clock):
        @contextmanager
        def stage(self, name: str) -> Iterator[None]:
            with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
                yield
            counts[name] = counts.get(name, 0.0) + counter.get_total_flops()

    step(path, Counter())
    return counts


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, rows, depth = query
    return 2 * batch * heads * rows * key[2] * (depth + value[3])


def _attention_backward_flops(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    batch, heads, rows, depth = query
    # The weights again, then the gradients of weights, values, queries and keys.
    return 2 * batch * heads * rows * key[2] * (3 * depth + 2 * value[3])


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def matmul_peak(size: int = 2048, repeats: int = 7) -> float:
    """This machine's measured float32 matrix-product rate, in operations per CPU second of one core."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        a @ b
        best = min(best, time.process_time() - start)
    return 2 * size**3 / best


def all_stages() -> tuple[str, ...]:
    return (*STAGES, *BACKWARD)
