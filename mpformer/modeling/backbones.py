"""The backbones: one entry each, by the type of its configuration. Features come by stride."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.modeling.backbone import Backbone

from mpformer.config.schema import BackboneConfig, ModelConfig, ResNetConfig, SwinConfig, TimmConfig
from mpformer.modeling.resnet import build_resnet
from mpformer.modeling.swin import Swin
from mpformer.modeling.timm_backbone import build_timm

BACKBONES: dict[type[BackboneConfig], Callable[[Any, Sequence[str]], Backbone]] = {
    ResNetConfig: build_resnet,
    SwinConfig: Swin,
    TimmConfig: build_timm,
}
"""What builds a backbone from its configuration and the names of its outputs, ``res2`` ... (strides 4, 8, ...)."""


def build_backbone(config: BackboneConfig, coarsest_stride: int) -> Backbone:
    """Build the backbone down to ``coarsest_stride``; later stages are not made.

    Its outputs are named ``res2`` ... ``res5`` (strides 4 ... 32).
    """
    names = tuple(f"res{i}" for i in range(2, int(math.log2(coarsest_stride)) + 1))
    return BACKBONES[type(config)](config, names)


def check_backbone(model: ModelConfig) -> None:
    """Raise UserError if the backbone of a model cannot be built; nothing is given memory."""
    with torch.device("meta"):
        build_backbone(model.backbone, model.attention_strides[0])


def strides_of(backbone: Backbone) -> dict[int, str]:
    """Map each stride of the backbone's outputs to its feature's name."""
    return {spec.stride: name for name, spec in backbone.output_shape().items()}
