"""The whole direct model: detectron2's plain ResNet, then everything written out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from mpformer.config.schema import ModelConfig, ResNetConfig, Toggles
from tests.direct.decoder import Decoder, DirectOutput
from tests.direct.losses import Criterion
from tests.direct.piloting import Target, make_pilot
from tests.direct.pixel_decoder import PixelDecoder

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def narrow_group_norm(channels: int) -> nn.GroupNorm:
    """32 groups from 64 channels on; groups of at least 4 channels below."""
    if channels >= 64 and channels % 32 == 0:
        return nn.GroupNorm(32, channels)
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4)), channels)


def direct_resnet(config: ResNetConfig, coarsest: int) -> ResNet:
    """A ResNet down to stride ``coarsest``."""
    stages, inside, out = [], config.stem_channels, config.res2_channels
    norm = narrow_group_norm if config.norm == "GN" else config.norm
    names = [f"res{i}" for i in (2, 3, 4, 5) if 2**i <= coarsest]
    for i, count in enumerate(BLOCKS[config.depth][: len(names)]):
        shape = {"num_blocks": count, "stride_per_block": [2 if i else 1] + [1] * (count - 1), "in_channels": inside}
        if config.depth in (18, 34):
            stages.append(ResNet.make_stage(BasicBlock, **shape, out_channels=out, norm=norm))
        else:
            width = config.width_per_group * 2**i
            kind = {"bottleneck_channels": width, "stride_in_1x1": False}
            stages.append(ResNet.make_stage(BottleneckBlock, **shape, out_channels=out, norm=norm, **kind))
        inside, out = out, out * 2
    return ResNet(BasicStem(3, config.stem_channels, norm), stages, out_features=names)


@dataclass(frozen=True)
class Features:
    """What the backbone and the pixel decoder make of a batch."""

    backbone: dict[int, Tensor]
    mask_features: Tensor
    levels: list[Tensor]


class Head(nn.Module):
    """Pixel decoder and decoder; exists for the parameter names."""

    def __init__(self, pixel_decoder: PixelDecoder, predictor: Decoder) -> None:
        super().__init__()
        self.pixel_decoder, self.predictor = pixel_decoder, predictor


class DirectMPFormer(nn.Module):
    """Mask2Former with optional mask piloting; names of the released checkpoints."""

    def __init__(self, model: ModelConfig, toggles: Toggles, classes: int) -> None:
        super().__init__()
        assert isinstance(model.backbone, ResNetConfig)
        self.model, self.toggles = model, toggles
        coarsest = max(model.attention_strides)
        self.backbone = direct_resnet(model.backbone, coarsest)
        channels = {s.stride: s.channels for s in self.backbone.output_shape().values()}
        self.sem_seg_head = Head(PixelDecoder(model, channels), Decoder(model, toggles, classes))
        self.criterion = nn.Module()
        self.loss = Criterion(model, toggles, classes)
        self.criterion.register_buffer("empty_weight", self.loss.class_weight())

    def batch(self, images: list[Tensor]) -> Tensor:
        """Normalise uint8 RGB images (3, H, W), pad bottom and right with 0 -> (B, 3, H', W')."""
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.model.pixel_mean, self.model.pixel_std))
        height, width = self.padded_size(images)
        return torch.stack([_pad((x - mean) / std, height, width) for x in images])

    def padded_size(self, images: list[Tensor]) -> tuple[int, int]:
        side = self.model.size_divisibility
        height, width = (-(-max(x.shape[d] for x in images) // side) * side for d in (1, 2))
        return height, width

    def targets(self, images: list[Tensor], labels: list[Tensor], masks: list[Tensor]) -> list[Target]:
        """Pad ground-truth masks like the images."""
        height, width = self.padded_size(images)
        return [Target(c, _pad(m.bool(), height, width)) for c, m in zip(labels, masks, strict=True)]

    def features(self, batch: Tensor) -> Features:
        maps = {int(2 ** int(name[3:])): x for name, x in self.backbone(batch).items()}
        mask_features, levels = self.sem_seg_head.pixel_decoder(maps)
        return Features(maps, mask_features, levels)

    def decode(
        self,
        features: Features,
        targets: list[Target] | None = None,
        pilot_masks: Mapping[int, Tensor] | None = None,
        pilot_labels: Tensor | None = None,
    ) -> DirectOutput:
        """Decoder outputs; with ``targets`` and piloting on, the piloted part too. Noise comes in from outside."""
        pilot = make_pilot(self.toggles, targets, pilot_labels)
        return self.sem_seg_head.predictor(features.levels, features.mask_features, targets, pilot, pilot_masks)

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> DirectOutput:
        return self.decode(self.features(self.batch(images)), targets)


def _pad(x: Tensor, height: int, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))
