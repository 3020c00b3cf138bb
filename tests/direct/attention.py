"""Multi-scale deformable attention and the sine position embedding, the slow way."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sine_position(channels: int, height: int, width: int) -> Tensor:
    """Sine position embedding (1, channels, height, width): first half rows, second half columns (DETR, appendix)."""
    half = channels // 2
    rows = (torch.arange(height) + 1.0) / (height + 1e-6) * 2 * math.pi
    columns = (torch.arange(width) + 1.0) / (width + 1e-6) * 2 * math.pi
    wave = 10000.0 ** (2 * (torch.arange(half) // 2).float() / half)

    def embed(position: Tensor) -> Tensor:
        angle = position[:, None] / wave
        pairs = [angle[:, 0::2].sin(), angle[:, 1::2].cos()]
        return torch.stack(pairs, dim=2).flatten(1)

    y = embed(rows)[:, None, :].expand(height, width, half)
    x = embed(columns)[None, :, :].expand(height, width, half)
    return torch.cat([y, x], dim=2).permute(2, 0, 1)[None]


class DeformableAttention(nn.Module):
    """Deformable DETR, equation 3, with one ``grid_sample`` a level."""

    def __init__(self, channels: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.shape = (heads, levels, points)
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)

    def forward(self, query: Tensor, reference: Tensor, source: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """query, source: (B, S, C); reference: (S, 2) as (x, y) in [0, 1]; sizes: (h, w) of each level -> (B, S, C)."""
        batch, length, channels = source.shape
        heads, levels, points = self.shape
        value = self.value_proj(source).view(batch, length, heads, channels // heads)
        offsets = self.sampling_offsets(query).view(batch, length, heads, levels, points, 2)
        weights = self.attention_weights(query).view(batch, length, heads, levels * points).softmax(-1)
        weights = weights.view(batch, length, heads, levels, points)
        result = torch.zeros(batch * heads, channels // heads, length)
        start = 0
        for level, (h, w) in enumerate(sizes):
            here = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(batch * heads, -1, h, w)
            start += h * w
            places = reference[None, :, None, None, :] + offsets[:, :, :, level] / torch.tensor([w, h])
            grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, S, points, 2)
            sampled = F.grid_sample(here, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B * heads, S, points)
            result = result + (sampled * share[:, None]).sum(-1)
        result = result.view(batch, channels, length).transpose(1, 2)
        return self.output_proj(result)
