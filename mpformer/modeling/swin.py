"""Swin transformer (Liu et al., ICCV 2021) with the parameter names of Mask2Former's released models."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpformer.config.schema import SwinConfig

_PATCH = 4


class PatchEmbed(nn.Module):
    """4 x 4 patches to tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, _PATCH, stride=_PATCH)
        self.norm = nn.LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, H/4, W/4, C), padding the image at the bottom and right."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % _PATCH, 0, -height % _PATCH))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class WindowAttention(nn.Module):
    """Attention within windows, with a learnt bias per relative position."""

    relative_position_index: Tensor

    def __init__(self, channels: int, window: int, heads: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", _relative_index(window))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, windows: Tensor, forbidden: Tensor | None) -> Tensor:
        """Attend within windows (B*n, w*w, C); ``forbidden`` (n, w*w, w*w) bool separates what a shift joined."""
        count, cells, _ = windows.shape
        q, k, v = self.qkv(windows).view(count, cells, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        mask = bias.view(cells, cells, self.heads).permute(2, 0, 1)[None]
        if forbidden is not None:
            # The released models add -100, not -inf.
            mask = mask + forbidden[:, None] * -100.0
            mask = mask.repeat(count // len(forbidden), 1, 1, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class SwinBlock(nn.Module):
    """(Shifted) window attention and feed-forward, each normalised before, with stochastic depth."""

    def __init__(self, channels: int, heads: int, window: int, shift: int, drop: float) -> None:
        super().__init__()
        self.window, self.shift, self.drop = window, shift, drop
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, window, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = FeedForward(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Refine tokens (B, h, w, C)."""
        tokens = tokens + self._drop_path(self._attend(self.norm1(tokens)))
        return tokens + self._drop_path(self.mlp(self.norm2(tokens)))

    def _attend(self, tokens: Tensor) -> Tensor:
        height, width = tokens.shape[1:3]
        padded = F.pad(tokens, (0, 0, 0, -width % self.window, 0, -height % self.window))
        size = (padded.shape[1], padded.shape[2])
        shifted = padded.roll((-self.shift, -self.shift), (1, 2)) if self.shift else padded
        forbidden = _shift_mask(size, self.window, self.shift, tokens.device) if self.shift else None
        mixed = _from_windows(self.attn(_to_windows(shifted, self.window), forbidden), self.window, size)
        mixed = mixed.roll((self.shift, self.shift), (1, 2)) if self.shift else mixed
        return mixed[:, :height, :width]

    def _drop_path(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, 1, device=branch.device) >= self.drop
        return branch * keep / (1 - self.drop)


class PatchMerging(nn.Module):
    """2 x 2 neighbouring tokens to one of twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, h, w, C) to (B, ceil(h/2), ceil(w/2), 2C)."""
        tokens = F.pad(tokens, (0, 0, 0, tokens.shape[2] % 2, 0, tokens.shape[1] % 2))
        corners = [tokens[:, row::2, column::2] for column, row in product((0, 1), (0, 1))]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class SwinStage(nn.Module):
    """Blocks of one resolution, every second one shifted, and the step to the next resolution."""

    def __init__(self, config: SwinConfig, index: int, drops: Sequence[float], last: bool) -> None:
        super().__init__()
        channels, window = config.embed_dim * 2**index, config.window
        self.checkpoint = config.checkpoint
        self.blocks = nn.ModuleList(
            SwinBlock(channels, config.heads[index], window, window // 2 if i % 2 else 0, drop)
            for i, drop in enumerate(drops)
        )
        self.downsample = None if last else PatchMerging(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Refine tokens (B, h, w, C)."""
        for block in self.blocks:
            use_checkpoint = self.checkpoint and self.training
            tokens = checkpoint(block, tokens, use_reentrant=False) if use_checkpoint else block(tokens)
        return tokens


class Swin(Backbone):
    """Swin with a normalised output per stage, named ``res2`` ... (strides 4, 8, ...)."""

    def __init__(self, config: SwinConfig, names: Sequence[str] = ("res2", "res3", "res4", "res5")) -> None:
        super().__init__()
        count = len(names)
        drops = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist()
        starts = [sum(config.depths[:i]) for i in range(count)]
        self.patch_embed = PatchEmbed(config.embed_dim)
        self.layers = nn.ModuleList(
            SwinStage(config, i, drops[starts[i] : starts[i] + config.depths[i]], last=i == count - 1)
            for i in range(count)
        )
        for i in range(count):
            self.add_module(f"norm{i}", nn.LayerNorm(config.embed_dim * 2**i))
        self._out_features = list(names)
        self._out_feature_strides = {name: _PATCH * 2**i for i, name in enumerate(names)}
        self._out_feature_channels = {name: config.embed_dim * 2**i for i, name in enumerate(names)}
        self.apply(_initialise)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to features by name, each (B, C_i, H/s, W/s)."""
        tokens = self.patch_embed(images)
        features = {}
        for i, (name, stage) in enumerate(zip(self._out_features, self.layers, strict=True)):
            assert isinstance(stage, SwinStage)
            tokens = stage(tokens)
            features[name] = self.get_submodule(f"norm{i}")(tokens).permute(0, 3, 1, 2).contiguous()
            if stage.downsample is not None:
                tokens = stage.downsample(tokens)
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output."""
        channels, strides = self._out_feature_channels, self._out_feature_strides
        return {name: ShapeSpec(channels=channels[name], stride=strides[name]) for name in self._out_features}

    @property
    def size_divisibility(self) -> int:
        """What the image size is a multiple of."""
        return max(self._out_feature_strides.values())


@BACKBONE_REGISTRY.register()
def build_mpformer_swin_backbone(cfg: Any, input_shape: Any) -> Swin:
    """Build the Swin of a CfgNode; for detectron2 models other than ours."""
    from mpformer.config.mask2former_yaml import from_cfg

    config = from_cfg(cfg).model.backbone
    assert isinstance(config, SwinConfig)
    return Swin(config)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _relative_index(window: int) -> Tensor:
    """Row of the bias table for each pair of cells of a window, (w*w, w*w) int64."""
    axis = torch.arange(window)
    cells = torch.cartesian_prod(axis, axis)
    offset = cells[:, None] - cells[None] + window - 1
    return offset[..., 0] * (2 * window - 1) + offset[..., 1]


def _to_windows(tokens: Tensor, window: int) -> Tensor:
    """Cut (B, h, w, C) into windows (B*n, window*window, C), row by row."""
    batch, height, width, channels = tokens.shape
    tiles = tokens.view(batch, height // window, window, width // window, window, channels)
    return tiles.transpose(2, 3).reshape(-1, window * window, channels)


def _from_windows(windows: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """Put windows (B*n, window*window, C) back into (B, h, w, C)."""
    height, width = size
    tiles = windows.view(-1, height // window, width // window, window, window, windows.shape[-1])
    return tiles.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def _shift_mask(size: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """Cells that a cyclic shift brought into one window from opposite borders, (n, w*w, w*w) bool."""
    rows, columns = (_region(length, window, shift, device) for length in size)
    region = (rows[:, None] * 3 + columns)[None, :, :, None]
    of_cell = _to_windows(region, window)[..., 0]
    return of_cell[:, :, None] != of_cell[:, None]


def _region(length: int, window: int, shift: int, device: torch.device) -> Tensor:
    """0, 1 or 2: before the last window, in it, and in the part that the shift wrapped around."""
    position = torch.arange(length, device=device)
    return (position >= length - window).long() + (position >= length - shift).long()
