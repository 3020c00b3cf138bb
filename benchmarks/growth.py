"""How time and memory of decoder, matching and losses grow with queries, layers and pixels."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import Clock, decode, decoding_peak_of, interleaved, kept_by, medians, memory
from benchmarks.paths import DirectPath, Path, Pixels, ProductPath
from benchmarks.settings import PILOTED, Setting, standard
from mpformer.modeling.mask_piloting import PilotNoise
from tests.support.paired_models import draw, pair

AXES: dict[str, tuple[int, ...]] = {
    "queries": (50, 100, 200, 400),
    "layers": (3, 6, 9, 12),
    "pixels": (128, 192, 256, 384, 512),
}
"""Values of each axis; for pixels the side of the square image."""


def varied(axis: str, value: int) -> Setting:
    """The standard setting at 256² with one axis changed."""
    setting = standard(value if axis == "pixels" else 256)
    key = {"queries": "model.queries", "layers": "model.decoder_layers"}.get(axis)
    config = setting.config if key is None else setting.config.replace({key: value})
    return Setting(f"{axis} {value}", config, setting.side, setting.batch, setting.classes, setting.objects)


def along(axis: str, repeats: int) -> list[dict[str, float]]:
    """Seconds and bytes of both paths along one axis; the backbone and the pixel decoder do not take part."""
    return [
        {"value": value**2 if axis == "pixels" else value} | _point(varied(axis, value), repeats)
        for value in AXES[axis]
    ]


def _point(setting: Setting, repeats: int) -> dict[str, float]:
    config = setting.with_toggles(PILOTED)
    direct, product = pair(config, setting.classes)
    drawn = draw(config.model, setting.batch, 0, shared=True)
    batch = setting.make_batch()
    pixels = random_pixels(setting)
    paths: dict[str, Path] = {
        "product": ProductPath(product, batch, drawn),
        "direct": DirectPath(direct, batch, drawn, PilotNoise()),
    }
    runs = {name: _decoding(path, pixels) for name, path in paths.items()}
    clocks = interleaved(runs, repeats)
    found: dict[str, float] = {}
    for name, run in runs.items():
        seconds, used = medians(clocks[name], "cpu"), memory(run)
        found[f"{name} seconds"] = sum(
            seconds[s] for s in ("decoder", "matching", "losses", "backward: decoder and losses")
        )
        found[f"{name} kept bytes"] = kept_by(used, ("decoder", "matching", "losses"))
        found[f"{name} peak bytes"] = decoding_peak_of(used)
    return found


def _decoding(path: Path, pixels: Pixels) -> Callable[[Clock], Any]:
    def run(clock: Clock) -> float:
        path.model.zero_grad(set_to_none=True)
        return decode(path, tuple(p.detach().requires_grad_() for p in pixels), clock)

    return run


def random_pixels(setting: Setting) -> Pixels:
    """What the pixel decoder might give, so that it need not be run: mask features and levels, coarse first."""
    model, side = setting.config.model, setting.side
    generator = torch.Generator().manual_seed(0)

    def maps(channels: int, stride: int) -> torch.Tensor:
        return torch.randn(setting.batch, channels, side // stride, side // stride, generator=generator)

    return (maps(model.mask_dim, 4), *(maps(model.conv_dim, s) for s in model.attention_strides))
