"""Sinusoidal position embedding of image cells (DETR, Carion et al., ECCV 2020, in its normalised form)."""

import math
from functools import lru_cache

import torch
from torch import Tensor

_TEMPERATURE = 10000.0
_EPSILON = 1e-6


@lru_cache(maxsize=64)
def sine_position(size: tuple[int, int], channels: int, device: torch.device) -> Tensor:
    """Return the embedding (h*w, channels) of a grid of ``size`` = (h, w): half for y, half for x.

    Cached: callers must not write into it. ``channels`` must be even.
    """
    y, x = (_axis(length, channels // 2, device) for length in size)
    grid = torch.cat([y[:, None].expand(-1, size[1], -1), x[None].expand(size[0], -1, -1)], dim=-1)
    return grid.flatten(0, 1)


def _axis(length: int, channels: int, device: torch.device) -> Tensor:
    """Embed the positions 1 .. length of one axis, scaled to (0, 2 pi]; returns (length, channels)."""
    steps = torch.arange(1, length + 1, dtype=torch.float32, device=device)
    angle = steps / (length + _EPSILON) * (2 * math.pi)
    index = torch.arange(channels, dtype=torch.float32, device=device)
    period = _TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / channels)
    phase = angle[:, None] / period
    even = torch.arange(channels, device=device) % 2 == 0
    return torch.where(even, phase.sin(), phase.cos())
