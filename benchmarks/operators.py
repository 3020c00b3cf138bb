"""Where a step of the product spends its time, by kind of operator."""

from collections.abc import Mapping

from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Clock, step
from benchmarks.paths import Path

KINDS: Mapping[str, tuple[str, ...]] = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "convolutions": ("convolution", "conv2d"),
    "deformable attention's samples": ("torch_ms_deform_attn",),
    "attention": ("scaled_dot_product",),
    "points: drawing, sampling, choosing":
        ("DrawnPointLosses", "embedding_bag", "scatter_", "gather", "sort", "grid_sampler", "aten::take"),
    "normalisation": ("layer_norm", "group_norm"),
    "activations and softmax": ("threshold", "clamp_min", "softmax", "softplus", "sigmoid"),
    "copies and fills": ("copy_", "fill_", "aten::cat", "aten::index"),
}  # fmt: skip
"""Parts of operator names; the first kind that fits counts, everything else is "other"."""


def shares(path: Path, repeats: int = 3) -> dict[str, float]:
    """Share of the step's time by kind, largest first, after one step to warm up."""
    step(path, Clock())
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(repeats):
            step(path, Clock())
    seconds: dict[str, float] = {}
    for event in found.key_averages():
        kind = _kind(event.key)
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(seconds.values())
    return {kind: spent / total for kind, spent in sorted(seconds.items(), key=lambda pair: -pair[1])}


def _kind(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
