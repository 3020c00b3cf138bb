"""detectron2's ResNet, typed, of any depth and width; frozen batch normalisation is folded into the convolutions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import Tensor, nn

from mpformer.config.schema import ResNetConfig

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def build_resnet(config: ResNetConfig, names: Sequence[str]) -> ResNet:
    """detectron2's ResNet of any depth and width, with stride in the 3x3 convolution as torchvision has it."""
    norm = narrow_group_norm if config.norm == "GN" else config.norm
    stem = BasicStem(in_channels=3, out_channels=config.stem_channels, norm=norm)
    stages = []
    inputs, outputs, width = config.stem_channels, config.res2_channels, config.width_per_group
    for stage in range(len(names)):
        count = BLOCKS[config.depth][stage]
        shape = {"in_channels": inputs, "out_channels": outputs, "norm": norm}
        strides = [1 if stage == 0 else 2] + [1] * (count - 1)
        if config.depth >= 50:
            shape |= {"bottleneck_channels": width, "stride_in_1x1": False}
        block = BottleneckBlock if config.depth >= 50 else BasicBlock
        stages.append(ResNet.make_stage(block, count, stride_per_block=strides, **shape))
        inputs, outputs, width = outputs, outputs * 2, width * 2
    resnet = ResNet(stem, stages, out_features=list(names), freeze_at=config.freeze_at)
    fold_frozen_norms(resnet)
    return resnet


def narrow_group_norm(channels: int) -> nn.GroupNorm:
    """detectron2's 32 groups from 64 channels on; narrower layers get groups of at least 4 channels.

    32 groups of one channel each would be instance normalisation, which forgets the contrast between channels' means.
    """
    if channels >= 64 and channels % 32 == 0:
        return nn.GroupNorm(32, channels)
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4)), channels)


class FoldedConv2d(Conv2d):
    """A convolution whose frozen batch normalisation is multiplied into its weight: same numbers, fewer passes.

    What is multiplied with and added is made when weights are loaded, not in every step.
    """

    factor: Tensor
    """(O, 1, 1, 1)."""
    shift: Tensor
    """(O,)."""

    def refold(self) -> None:
        """Take factor and shift from the normalisation's statistics."""
        norm = self.norm
        with torch.no_grad():
            factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
            self.register_buffer("factor", factor[:, None, None, None], persistent=False)
            self.register_buffer("shift", norm.bias - norm.running_mean * factor, persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, H, W) as convolution, normalisation and activation in turn would."""
        weight = self.weight * self.factor
        maps = F.conv2d(maps, weight, self.shift, self.stride, self.padding, self.dilation, self.groups)
        return maps if self.activation is None else self.activation(maps)


def fold_frozen_norms(module: nn.Module) -> None:
    """Turn every convolution with a frozen batch normalisation inside ``module`` into a folded one."""
    for child in module.modules():
        if type(child) is Conv2d and isinstance(child.norm, FrozenBatchNorm2d):
            child.__class__ = FoldedConv2d
            assert isinstance(child, FoldedConv2d)
            child.refold()
            child.register_load_state_dict_post_hook(_refold)


def _refold(convolution: FoldedConv2d, _: Any) -> None:
    convolution.refold()
