"""A small model and a small batch for the model's tests."""

from typing import Any

import torch
from detectron2.structures import Instances

from mpformer.config.schema import Config, DatasetConfig, ModelConfig, ResNetConfig, ShapesConfig
from mpformer.modeling.meta_arch import MPFormer, build_model
from mpformer.modeling.outputs import Targets, padded_targets

SIDE = 64


def small_config(**changes: Any) -> Config:
    """Return 3 decoder layers at strides 16, 8, 4, 8 queries; keys are dotted with ``__``."""
    backbone = ResNetConfig(depth=18, stem_channels=16, res2_channels=16, norm="GN")
    model = ModelConfig(
        backbone=backbone,
        hidden_dim=32,
        conv_dim=32,
        mask_dim=32,
        heads=4,
        encoder_layers=1,
        encoder_ffn=64,
        decoder_layers=3,
        decoder_ffn=64,
        queries=8,
        attention_strides=(16, 8, 4),
        size_divisibility=16,
        train_points=64,
    )
    config = Config(dataset=DatasetConfig(name="shapes", task="panoptic", shapes=ShapesConfig()), model=model)
    return config.replace({key.replace("__", "."): value for key, value in changes.items()})


def small_model(**changes: Any) -> MPFormer:
    return build_model(small_config(**changes))


def boxes_masks(count: int, seed: int = 0, side: int = SIDE) -> torch.Tensor:
    """Rectangles (count, side, side) bool."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, side, side, dtype=torch.bool)
    for mask in masks:
        y, x = torch.randint(0, side - 24, (2,), generator=generator).tolist()
        h, w = torch.randint(4, 24, (2,), generator=generator).tolist()
        mask[y : y + h, x : x + w] = True
    return masks


def batch(counts: tuple[int, ...] = (3, 1), seed: int = 0, side: int = SIDE) -> list[dict[str, Any]]:
    """Return random images with ``counts`` objects of the 12 shapes classes."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for i, count in enumerate(counts):
        instances = Instances((side, side))
        instances.gt_classes = torch.randint(0, 12, (count,), generator=generator)
        instances.gt_masks = boxes_masks(count, seed + 10 * i, side)
        image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator)
        items.append({"image": image, "instances": instances, "height": side, "width": side})
    return items


def some_targets(counts: tuple[int, ...] = (3, 1), seed: int = 0, side: int = SIDE) -> Targets:
    items = batch(counts, seed, side)
    found = [item["instances"] for item in items]
    return padded_targets([f.gt_classes for f in found], [f.gt_masks for f in found], (side, side))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
