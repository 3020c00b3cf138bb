"""The direct and the product model of one configuration with the same weights, on the same batch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from mpformer.config.schema import Config, DatasetConfig, ModelConfig, ResNetConfig, Toggles
from mpformer.modeling.mask_piloting import PilotBatch, PilotNoise
from mpformer.modeling.meta_arch import MPFormer, build_model
from mpformer.modeling.outputs import DecoderOutput
from mpformer.modeling.points import PointDraw
from tests.direct.decoder import DirectOutput
from tests.direct.losses import Points
from tests.direct.model import DirectMPFormer

CLASSES = 5


@dataclass(frozen=True)
class Drawn:
    """Random points of a batch for both models."""

    match: Tensor  # (L + 1 or, shared by all layers, 1, B, N, 2)
    layers: int  # L + 1
    candidates: Tensor  # (B, oversampled N, 2)
    uniform: Tensor  # (B, N - chosen, 2)

    def direct(self) -> Points:
        match = self.match.expand(self.layers, -1, -1, -1)
        return Points(match=dict(enumerate(match)), candidates=self.candidates, uniform=self.uniform)

    def product(self) -> PointDraw:
        return PointDraw(self.match, self.candidates, self.uniform)


@dataclass(frozen=True)
class Forward:
    """One training forward of both models, and every unweighted loss by the product's names."""

    direct: DirectOutput
    product: DecoderOutput
    pilot: PilotBatch | None
    direct_losses: dict[str, Tensor]
    product_losses: dict[str, Tensor]


def tiny_config(toggles: Toggles, **changes: Any) -> Config:
    """A narrow model that runs in a fraction of a second."""
    settings: dict[str, Any] = {
        "backbone": ResNetConfig(depth=18, stem_channels=16, res2_channels=16, norm="GN"),
        "hidden_dim": 32,
        "conv_dim": 32,
        "mask_dim": 16,
        "heads": 4,
        "encoder_layers": 1,
        "encoder_ffn": 48,
        "decoder_layers": 4,
        "decoder_ffn": 40,
        "queries": 7,
        "train_points": 64,
    }
    model = ModelConfig(**(settings | changes))
    return Config(dataset=DatasetConfig(name="coco", task="panoptic"), model=model, toggles=toggles)


def pair(config: Config, classes: int = CLASSES) -> tuple[DirectMPFormer, MPFormer]:
    """Both models, with the product's initial weights."""
    product = build_model(config, classes, range(classes))
    _off_the_kinks(product)
    direct = DirectMPFormer(config.model, config.toggles, classes)
    direct.load_state_dict(product.state_dict())
    return direct.train(), product.train()


def _off_the_kinks(product: MPFormer) -> None:
    """Move sampling offsets off whole cells, where bilinear sampling has two one-sided derivatives."""
    generator = torch.Generator().manual_seed(0)
    for name, p in product.named_parameters():
        if name.endswith("sampling_offsets.bias"):
            with torch.no_grad():
                p.add_(0.3 + 0.2 * torch.rand(p.shape, generator=generator))


def make_batch(sizes: list[tuple[int, int]], objects: list[int], classes: int, seed: int) -> list[dict[str, Any]]:
    """Noisy images with ellipses as objects, in detectron2's convention."""
    random = np.random.default_rng(seed)
    return [_item(random, size, count, classes) for size, count in zip(sizes, objects, strict=True)]


def _item(random: np.random.Generator, size: tuple[int, int], count: int, classes: int) -> dict[str, Any]:
    y, x = np.mgrid[: size[0], : size[1]]
    image = random.integers(0, 120, (3, *size))
    masks = np.zeros((count, *size), dtype=bool)
    for mask in masks:
        centre, radius = random.random(2) * size, random.uniform(0.05, 0.3, 2) * size
        mask |= ((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 < 1
        image[:, mask] = (image[:, mask] + random.integers(40, 220, (3, 1))) % 256
    instances = Instances(size)
    instances.gt_classes = torch.from_numpy(random.integers(0, classes, count))
    instances.gt_masks = torch.from_numpy(masks)
    return {"image": torch.from_numpy(image.astype(np.uint8)), "instances": instances}


def draw(model: ModelConfig, batch: int, seed: int, shared: bool = False) -> Drawn:
    """Draw points of a batch; with ``shared`` all layers are matched at the same ones."""
    generator = torch.Generator().manual_seed(seed)
    keep = int(model.importance_sample_ratio * model.train_points)
    many = int(model.oversample_ratio * model.train_points)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, 2, generator=generator)

    layers = model.decoder_layers + 1
    match = rand(1 if shared else layers, batch, model.train_points)
    return Drawn(match, layers, rand(batch, many), rand(batch, model.train_points - keep))


def forward_both(
    direct: DirectMPFormer, product: MPFormer, batch: list[dict[str, Any]], drawn: Drawn, seed: int = 0
) -> Forward:
    """Run both; the product draws the noise, the direct model is given it."""
    images = [item["image"] for item in batch]
    prepared = product.preprocess(batch)
    targets = product.targets(batch, prepared)
    pixels = product.pixel_features(prepared.tensor)
    pilot = product.pilot(targets, pixels, torch.Generator().manual_seed(seed))
    output = product.sem_seg_head.predictor(pixels, pilot)
    losses = product.criterion(output, targets, pilot, drawn.product())
    noise = noise_of(pilot)
    masks = {i: m for i, m in enumerate(noise.masks or ()) if m is not None}
    labels = [item["instances"].gt_classes for item in batch]
    plain_targets = direct.targets(images, labels, [item["instances"].gt_masks for item in batch])
    features = direct.features(direct.batch(images))
    plain = direct.decode(features, plain_targets, masks, noise.labels)
    plain_losses, _ = direct.loss(plain, plain_targets, drawn.direct())
    # Without any object the direct model names the piloted losses all the same, as 0.
    renamed = {n.replace("_dn", "_pilot"): v for n, v in plain_losses.items() if pilot is not None or "_dn" not in n}
    return Forward(plain, output, pilot, renamed, losses)


def noise_of(pilot: PilotBatch | None) -> PilotNoise:
    """The masks and labels that a piloted part was made with."""
    if pilot is None:
        return PilotNoise()
    by_group = zip(pilot.labels.chunk(pilot.groups, 1), pilot.real.chunk(pilot.groups, 1), strict=True)
    return PilotNoise(pilot.layer_masks, torch.cat([labels[real] for labels, real in by_group]))


def margin(out: DirectOutput, strides: list[tuple[int, int]]) -> float:
    """How near any mask logit at attention resolution comes to its threshold, relative to the largest."""
    nearest, largest = float("inf"), 0.0
    for layer, masks in enumerate(out.masks[:-1]):
        logits = F.interpolate(masks, size=strides[layer % len(strides)], mode="bilinear", align_corners=False)
        nearest, largest = min(nearest, float(logits.abs().min())), max(largest, float(logits.abs().max()))
    return nearest / largest
