"""Multi-scale deformable pixel decoder (Mask2Former, section 3.2; Deformable DETR, section 4)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpformer.modeling.checkpointing import checkpointed
from mpformer.modeling.deformable_attention import DeformableAttention
from mpformer.modeling.points import cell_centres
from mpformer.modeling.position import sine_position
from mpformer.modeling.sparse_sampling import Sizes

MASK_STRIDE = 4
_TOKENS = 2048
"""Tokens that go through a feed-forward block at a time on CPU, so that the hidden values stay in the cache."""


@dataclass(frozen=True)
class PixelDecoderSettings:
    """Shape of the pixel decoder; strides are of the input image."""

    channels: int = 256
    mask_channels: int = 256
    layers: int = 6
    heads: int = 8
    feedforward: int = 1024
    points: int = 4
    attention_strides: tuple[int, ...] = (32, 16, 8)


@dataclass(frozen=True)
class PixelFeatures:
    """What the pixel decoder gives to the decoder."""

    mask_features: Tensor
    """(B, D, H/4, W/4) per-cell embeddings."""
    levels: tuple[Tensor, ...]
    """Per attention stride, coarse first: (B, channels, H/s, W/s)."""


def group_norm(channels: int) -> nn.GroupNorm:
    """Mask2Former's 32 groups; channels that 32 does not divide get gcd(32, channels) groups."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` of stride 1, padded to keep the size; 1x1 is one matrix product in float32 on CPU.

    3x3 is the library's: on transformed tiles (Lavin and Gray, CVPR 2016) it took 161 instead of 284 ms of an R50 step
    of 3.4 s at 256² on CPU, and the mini scale's model has none: too little for the code that it took.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h, w)."""
        if self.kernel_size != (1, 1) or _ordinary(maps) or torch.compiler.is_compiling():
            return super().forward(maps)
        weight, flat = self.weight.flatten(1).expand(len(maps), -1, -1), maps.flatten(2)
        product = torch.bmm(weight, flat) if self.bias is None else torch.baddbmm(self.bias[:, None], weight, flat)
        return product.unflatten(2, maps.shape[2:])


def _ordinary(maps: Tensor) -> bool:
    """Whether maps are for the library's convolution: on a GPU, in another precision."""
    return maps.device.type != "cpu" or maps.dtype != torch.float32 or torch.is_autocast_enabled("cpu")


class NormedConv(Conv2d):
    """Convolution without bias, then group normalisation, then optionally ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, relu: bool) -> None:
        super().__init__(inputs, outputs, kernel, bias=False)
        self.norm = group_norm(outputs)
        self.relu = relu
        nn.init.kaiming_uniform_(self.weight, a=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h, w)."""
        maps = self.norm(super().forward(maps))
        return F.relu(maps, inplace=True) if self.relu else maps


class EncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward block, each normalised after the sum."""

    def __init__(self, settings: PixelDecoderSettings) -> None:
        super().__init__()
        channels, levels = settings.channels, len(settings.attention_strides)
        self.self_attn = DeformableAttention(channels, levels, settings.heads, settings.points)
        self.norm1 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, settings.feedforward)
        self.linear2 = nn.Linear(settings.feedforward, channels)
        self.norm2 = nn.LayerNorm(channels)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, sizes: Sizes) -> Tensor:
        """Refine tokens (B, S, D); position (S, D), reference (S, 2)."""
        tokens = self.norm1(tokens + self.self_attn(tokens + position, reference, tokens, sizes))
        return self.norm2(tokens + self._feed_forward(tokens))

    def _feed_forward(self, tokens: Tensor) -> Tensor:
        """The hidden values would be a quarter of what the pixel decoder keeps."""
        flat = tokens.flatten(0, 1)
        parts = flat.split(_TOKENS) if tokens.device.type == "cpu" else (flat,)
        return torch.cat([checkpointed(self._expand, part) for part in parts]).view_as(tokens)

    def _expand(self, tokens: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(tokens)))


class Encoder(nn.Module):
    """The stack of layers; its name in released files is ``transformer.encoder``."""

    def __init__(self, settings: PixelDecoderSettings) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(settings) for _ in range(settings.layers))


class DeformableTransformer(nn.Module):
    """Level embedding and encoder over the tokens of all levels."""

    def __init__(self, settings: PixelDecoderSettings) -> None:
        super().__init__()
        self.encoder = Encoder(settings)
        self.level_embed = nn.Parameter(torch.empty(len(settings.attention_strides), settings.channels))
        nn.init.normal_(self.level_embed)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Refine maps (B, D, h_l, w_l), coarse first; the shapes stay."""
        sizes = tuple((m.shape[-2], m.shape[-1]) for m in maps)
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        channels, device = tokens.shape[-1], tokens.device
        position = torch.cat(
            [sine_position(s, channels, device) + e for s, e in zip(sizes, self.level_embed, strict=True)]
        )
        reference = torch.cat([cell_centres(size, device) for size in sizes])
        for layer in self.encoder.layers:
            tokens = layer(tokens, position, reference, sizes)
        parts = tokens.split([h * w for h, w in sizes], dim=1)
        return [p.transpose(1, 2).unflatten(2, size) for p, size in zip(parts, sizes, strict=True)]


class PixelDecoder(nn.Module):
    """Deformable encoder over the attention strides, then FPN steps down to stride 4.

    Parameter names are the released ones: ``input_proj.i`` coarse first; ``adapter_k`` and ``layer_k`` belong to
    the k-th finest backbone level. An attention stride of 4 needs no FPN step.
    """

    def __init__(self, settings: PixelDecoderSettings, input_channels: dict[int, int]) -> None:
        """``input_channels`` maps each backbone stride (at least 4 to the coarsest attended) to its channels."""
        super().__init__()
        self.settings = settings
        strides = settings.attention_strides
        self.input_proj = nn.ModuleList(_projection(input_channels[s], settings.channels) for s in strides)
        self.transformer = DeformableTransformer(settings)
        self.mask_features = Conv2d(settings.channels, settings.mask_channels, 1)
        _xavier_like(self.mask_features)
        self.fpn_strides = tuple(s for s in sorted(input_channels, reverse=True) if s < min(strides))
        for stride in self.fpn_strides:
            level = sorted(input_channels).index(stride) + 1
            self.add_module(f"adapter_{level}", NormedConv(input_channels[stride], settings.channels, 1, relu=False))
            self.add_module(f"layer_{level}", NormedConv(settings.channels, settings.channels, 3, relu=True))
        self._fpn_levels = {s: sorted(input_channels).index(s) + 1 for s in self.fpn_strides}

    def forward(self, features: dict[int, Tensor]) -> PixelFeatures:
        """Decode backbone features by stride, each (B, C_s, H/s, W/s)."""
        strides = self.settings.attention_strides
        projected = [project(features[s]) for project, s in zip(self.input_proj, strides, strict=True)]
        levels = self.transformer(projected)
        finest = levels[-1]
        for stride in self.fpn_strides:
            finest = self._fpn_step(self._fpn_levels[stride], features[stride], finest)
        return PixelFeatures(self.mask_features(finest), tuple(levels))

    def _fpn_step(self, level: int, lateral: Tensor, coarse: Tensor) -> Tensor:
        lateral = self.get_submodule(f"adapter_{level}")(lateral)
        upsampled = F.interpolate(coarse, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.get_submodule(f"layer_{level}")(lateral + upsampled)


def _projection(inputs: int, outputs: int) -> nn.Sequential:
    conv = Conv2d(inputs, outputs, 1)
    nn.init.xavier_uniform_(conv.weight)
    _zero_bias(conv)
    return nn.Sequential(conv, group_norm(outputs))


def _xavier_like(conv: nn.Conv2d) -> None:
    nn.init.kaiming_uniform_(conv.weight, a=1)
    _zero_bias(conv)


def _zero_bias(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
