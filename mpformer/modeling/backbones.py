"""The backbones: one entry each, by the type of its configuration. Features come by stride."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.modeling.backbone import Backbone

from mpformer.config.schema import BackboneConfig, ResNetConfig, SwinConfig
from mpformer.modeling.resnet import build_resnet
from mpformer.modeling.swin import Swin

BACKBONES: dict[type[BackboneConfig], Callable[[Any, Sequence[str]], Backbone]] = {
    ResNetConfig: build_resnet,
    SwinConfig: Swin,
}
"""What builds a backbone from its configuration and the names of its outputs, ``res2`` ... (strides 4, 8, ...)."""


def build_backbone(config: BackboneConfig, coarsest_stride: int) -> Backbone:
    """Build the backbone down to ``coarsest_stride``; later stages are not made.

    Its outputs are named ``res2`` ... ``res5`` (strides 4 ... 32).
    """
    names = tuple(f"res{i}" for i in range(2, int(math.log2(coarsest_stride)) + 1))
    return BACKBONES[type(config)](config, names)


def strides_of(backbone: Backbone) -> dict[int, str]:
    """Map each stride of the backbone's outputs to its feature's name."""
    return {spec.stride: name for name, spec in backbone.output_shape().items()}
