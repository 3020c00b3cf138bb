"""Mask2Former's pixel decoder: a deformable encoder over the coarse levels, then a feature pyramid to stride 4."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from direct.attention import DeformableAttention, sine_position
from mpformer.config import ModelConfig


class NormedConv(nn.Conv2d):
    """A convolution without bias whose group norm is its child ``norm``, as detectron2 names it."""

    def __init__(self, inside: int, outside: int, kernel: int) -> None:
        super().__init__(inside, outside, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(32, outside)

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
        for layer in self.encoder.layers:
            x = layer(x, position, reference, sizes)
        pieces = x.split([h * w for h, w in sizes], dim=1)
        return [p.transpose(1, 2).reshape(len(p), channels, *size) for p, size in zip(pieces, sizes, strict=True)]


def _centres(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


class PixelDecoder(nn.Module):
    """Backbone maps in; mask features at stride 4 and the maps that the decoder attends to out."""

    def __init__(self, model: ModelConfig, channels: dict[int, int]) -> None:
        super().__init__()
        self.attention_strides = model.attention_strides
        # The deformable encoder sees the levels coarser than the mask features; stride 4 comes from the pyramid.
        self.encoder_strides = sorted((s for s in channels if s > model.mask_stride), reverse=True)
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels[s], model.conv_dim, 1), nn.GroupNorm(32, model.conv_dim))
            for s in self.encoder_strides
        )
        self.transformer = Encoder(model, len(self.encoder_strides))
        self.adapter_1 = NormedConv(channels[model.mask_stride], model.conv_dim, 1)
        self.layer_1 = NormedConv(model.conv_dim, model.conv_dim, 3)
        self.mask_features = nn.Conv2d(model.conv_dim, model.mask_dim, 1)

    def forward(self, features: dict[int, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Stride -> (B, C, h, w) in; mask features (B, D, H/4, W/4) and one (B, C, h, w) per attention stride out."""
        maps = [p(features[s]) for p, s in zip(self.input_proj, self.encoder_strides, strict=True)]
        by_stride = dict(zip(self.encoder_strides, self.transformer(maps), strict=True))
        lateral = self.adapter_1(features[4])
        above = by_stride[self.encoder_strides[-1]]
        above = F.interpolate(above, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        by_stride[4] = F.relu(self.layer_1(lateral + above))
        return self.mask_features(by_stride[4]), [by_stride[s] for s in self.attention_strides]
