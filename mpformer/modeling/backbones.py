"""The backbone of a configuration, built by what its entry names. Features come by stride."""

import math
from importlib import import_module

import torch
from detectron2.modeling.backbone import Backbone

from mpformer.config.schema import BackboneConfig, ModelConfig


def build_backbone(config: BackboneConfig, coarsest_stride: int) -> Backbone:
    """Build the backbone down to ``coarsest_stride``; later stages are not made.

    Its outputs are named ``res2`` ... ``res5`` (strides 4 ... 32).
    """
    names = tuple(f"res{i}" for i in range(2, int(math.log2(coarsest_stride)) + 1))
    module, _, name = config.builder.partition(":")
    backbone: Backbone = getattr(import_module(module), name)(config, names)
    return backbone


def check_backbone(model: ModelConfig) -> None:
    """Raise UserError if the backbone of a model cannot be built; nothing is given memory."""
    with torch.device("meta"):
        build_backbone(model.backbone, model.attention_strides[0])


def strides_of(backbone: Backbone) -> dict[int, str]:
    """Map each stride of the backbone's outputs to its feature's name."""
    return {spec.stride: name for name, spec in backbone.output_shape().items()}
