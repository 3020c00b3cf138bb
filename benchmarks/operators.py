"""Where a step of the product spends its time, by kind of operator."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Clock, step
from benchmarks.paths import Path

KINDS: Mapping[str, tuple[str, ...]] = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "convolutions": ("convolution", "conv2d"),
    "attention": ("scaled_dot_product",),
    "points: drawing, sampling, choosing":
        ("DrawnPointLosses", "embedding_bag", "scatter_", "gather", "sort", "grid_sampler", "aten::take"),
    "normalisation": ("layer_norm", "group_norm"),
    "activations and softmax": ("threshold", "clamp_min", "softmax", "softplus", "sigmoid"),
    "copies and fills": ("copy_", "fill_", "aten::cat", "aten::index"),
}  # fmt: skip
"""Parts of operator names; the first kind that fits counts, everything else is "other"."""
WITHIN = {"_Sampling": "deformable attention's samples"}
"""Operations of our own, forward and backward: everything inside them counts as this kind."""


def shares(path: Path, repeats: int = 3) -> dict[str, float]:
    """Share of the step's time by kind, largest first, after one step to warm up."""
    step(path, Clock())
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(repeats):
            step(path, Clock())
    seconds: dict[str, float] = {}
    for event in found.events():
        kind = _kind(event)
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(seconds.values())
    return {kind: spent / total for kind, spent in sorted(seconds.items(), key=lambda pair: -pair[1])}


def _kind(event: Any) -> str:
    ours = (WITHIN.get(name.removesuffix("Backward")) for name in _names(event))
    fits = (kind for kind, parts in KINDS.items() if any(part in event.name for part in parts))
    return next((kind for kind in ours if kind), None) or next(fits, "other")


def _names(event: Any) -> Iterator[str]:
    """The event's name and those of what it happened in, inside out."""
    while event is not None:
        yield event.name
        event = event.cpu_parent
