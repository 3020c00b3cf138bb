"""Mask2Former's pixel decoder: a deformable encoder over the coarse levels, then a feature pyramid to stride 4."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpformer.config.schema import ModelConfig
from tests.direct.attention import DeformableAttention, sine_position


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, or as many as divide the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


class NormedConv(nn.Conv2d):
    """A convolution without bias whose group norm is its child ``norm``, as detectron2 names it."""

    def __init__(self, inside: int, outside: int, kernel: int) -> None:
        super().__init__(inside, outside, kernel, padding=kernel // 2, bias=False)
        self.norm = group_norm(outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class EncoderLayer(nn.Module):
    """Post-norm transformer layer with deformable self-attention."""

    def __init__(self, channels: int, ffn: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(channels, levels, heads, points)
        self.norm1 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, ffn)
        self.linear2 = nn.Linear(ffn, channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        x = self.norm1(x + self.self_attn(x + position, reference, x, sizes))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class Encoder(nn.Module):
    """The flattened levels, coarse first, through every encoder layer."""

    def __init__(self, model: ModelConfig, levels: int) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(levels, model.conv_dim))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            EncoderLayer(model.conv_dim, model.encoder_ffn, levels, model.heads, model.encoder_points)
            for _ in range(model.encoder_layers)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        sizes = [(m.shape[2], m.shape[3]) for m in maps]
        channels = maps[0].shape[1]
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        position = torch.cat(
            [
                sine_position(channels, h, w).flatten(2).transpose(1, 2) + self.level_embed[i]
                for i, (h, w) in enumerate(sizes)
            ],
            dim=1,
        )
        reference = torch.cat([_centres(h, w) for h, w in sizes])
        layers = self.encoder.layers
        assert isinstance(layers, nn.ModuleList)
        for layer in layers:
            x = layer(x, position, reference, sizes)
        pieces = x.split([h * w for h, w in sizes], dim=1)
        return [p.transpose(1, 2).reshape(len(p), channels, *size) for p, size in zip(pieces, sizes, strict=True)]


def _centres(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


class PixelDecoder(nn.Module):
    """Backbone maps in; mask features at stride 4 and the maps that the decoder attends to out.

    The deformable encoder sees the attention strides; a pyramid step per finer backbone level leads down to stride 4.
    ``adapter_k`` and ``layer_k`` belong to the k-th finest backbone level.
    """

    def __init__(self, model: ModelConfig, channels: dict[int, int]) -> None:
        super().__init__()
        width = model.conv_dim
        self.strides = model.attention_strides
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels[s], width, 1), group_norm(width)) for s in self.strides
        )
        self.transformer = Encoder(model, len(self.strides))
        self.pyramid = [(k + 1, s) for k, s in enumerate(sorted(channels)) if s < min(self.strides)]
        for k, stride in self.pyramid:
            self.add_module(f"adapter_{k}", NormedConv(channels[stride], width, 1))
            self.add_module(f"layer_{k}", NormedConv(width, width, 3))
        self.mask_features = nn.Conv2d(width, model.mask_dim, 1)

    def forward(self, features: dict[int, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Stride -> (B, C, h, w) in; mask features (B, D, H/4, W/4) and one (B, C, h, w) per attention stride out."""
        maps = [project(features[s]) for project, s in zip(self.input_proj, self.strides, strict=True)]
        levels = self.transformer(maps)
        finest = levels[-1]
        for k, stride in reversed(self.pyramid):
            lateral = getattr(self, f"adapter_{k}")(features[stride])
            above = F.interpolate(finest, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            finest = F.relu(getattr(self, f"layer_{k}")(lateral + above))
        return self.mask_features(finest), levels
