"""The whole model as a detectron2 meta-architecture: backbone, pixel decoder, decoder, criterion, inference."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

from mpformer.config.classes import class_table
from mpformer.config.datasets import ClassTable
from mpformer.config.schema import Config, ModelConfig, Toggles
from mpformer.modeling.backbones import build_backbone, strides_of
from mpformer.modeling.criterion import Criterion, LossSettings, named_losses
from mpformer.modeling.decoder import DecoderSettings, MaskedAttentionDecoder
from mpformer.modeling.inference import InferenceSettings, infer
from mpformer.modeling.mask_piloting import PilotBatch, PilotNoise, pilot_batch
from mpformer.modeling.matcher import match_weights
from mpformer.modeling.outputs import DecoderOutput, Targets, padded_targets
from mpformer.modeling.pixel_decoder import MASK_STRIDE, PixelDecoder, PixelDecoderSettings, PixelFeatures
from mpformer.modeling.points import Points, PointSettings
from mpformer.runtime.errors import UserError
from mpformer.runtime.random_streams import generator as random_stream

Size = tuple[int, int]


class MaskFormerHead(nn.Module):
    """Pixel decoder and decoder; exists for the released parameter names."""

    def __init__(self, pixel_decoder: PixelDecoder, predictor: MaskedAttentionDecoder) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor


@META_ARCH_REGISTRY.register()
class MPFormer(nn.Module):
    """Mask2Former, in training with an optional piloted part; at evaluation piloting does not exist."""

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: MaskFormerHead,
        criterion: Criterion,
        inference: InferenceSettings,
        piloting: Toggles | None,
        pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
        size_divisibility: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = head
        self.criterion = criterion
        self.inference = inference
        self.piloting = piloting
        self.size_divisibility = size_divisibility
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Read detectron2's CfgNode through the typed configuration."""
        from mpformer.config.mask2former_yaml import from_cfg

        return _parts(from_cfg(cfg), cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, None)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.pixel_mean.device

    def forward(
        self,
        batched_inputs: list[dict[str, Any]],
        *,
        noise: torch.Generator | None = None,
        points: Points | torch.Generator | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Training: the weighted losses by name. Evaluation: one result per image, see :func:`infer`.

        ``batched_inputs`` are detectron2's, "image" (3, H, W) and, in training, "instances" with ``gt_classes``
        and ``gt_masks``. ``noise`` feeds mask piloting, ``points`` the sampled points (which may
        also be given); None: the default generator.
        """
        images = self.preprocess(batched_inputs)
        if not self.training:
            return self._evaluate(batched_inputs, images)
        targets = self.targets(batched_inputs, images)
        pixels = self.pixel_features(images.tensor)
        pilot = self.pilot(targets, pixels, noise)
        output = self.sem_seg_head.predictor(pixels, pilot)
        losses = self.criterion.weighted(self.criterion.by_layer(output, targets, pilot, points))
        return named_losses(losses | self._absent_pilot_losses(pilot))

    @torch.compiler.disable  # detectron2's padding reads sizes from tensors
    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalise the images and pad them (with 0, after normalisation) to one size."""
        images = [(item["image"].to(self.device) - self.pixel_mean) / self.pixel_std for item in batched_inputs]
        return ImageList.from_tensors(images, self.size_divisibility)

    @torch.compiler.disable
    def targets(self, batched_inputs: list[dict[str, Any]], images: ImageList) -> Targets:
        """Collect the ground truth of a batch, padded to the images."""
        instances = [item["instances"].to(self.device) for item in batched_inputs]
        masks = [getattr(found.gt_masks, "tensor", found.gt_masks) for found in instances]
        return padded_targets([found.gt_classes for found in instances], masks, _size(images.tensor))

    def pixel_features(self, images: Tensor) -> PixelFeatures:
        """Run backbone and pixel decoder on normalised, padded images (B, 3, H, W)."""
        features = self.backbone(images)
        by_stride = {stride: features[name] for stride, name in strides_of(self.backbone).items()}
        return self.sem_seg_head.pixel_decoder(by_stride)

    def pilot(
        self,
        targets: Targets,
        pixels: PixelFeatures,
        generator: torch.Generator | None,
        noise: PilotNoise | None = None,
    ) -> PilotBatch | None:
        """Make the piloted part of a batch; None without the toggle or without any object."""
        predictor = self.sem_seg_head.predictor
        if self.piloting is None or predictor.label_enc is None:
            return None
        sizes = [_size(maps) for maps in pixels.levels]
        layer_sizes = [sizes[i % len(sizes)] for i in range(predictor.settings.layers)]
        table, queries = predictor.label_enc.weight, predictor.settings.queries
        return pilot_batch(self.piloting, targets, table, queries, layer_sizes, generator, noise)

    def _absent_pilot_losses(self, pilot: PilotBatch | None) -> dict[str, Tensor]:
        """Zeros under the names of the piloted losses for a batch without objects; keeps ``label_enc`` in the graph."""
        predictor = self.sem_seg_head.predictor
        if self.piloting is None or predictor.label_enc is None or pilot is not None:
            return {}
        heads = predictor.settings.layers + (1 if self.piloting.layer0_supervision else 0)
        zeros = predictor.label_enc.weight.float().sum() * self.pixel_mean.new_zeros(heads)
        return {f"loss_{kind}_pilot": zeros for kind in ("ce", "mask", "dice")}

    @torch.no_grad()
    def layer_outputs(self, batched_inputs: list[dict[str, Any]]) -> tuple[DecoderOutput, list[Size]]:
        """Return the predictions of every head, and each image's (height, width) without padding."""
        images = self.preprocess(batched_inputs)
        return self.sem_seg_head.predictor(self.pixel_features(images.tensor)), _sizes(images)

    def results(
        self, output: DecoderOutput, sizes: list[Size], batched_inputs: list[dict[str, Any]], layer: int = -1
    ) -> list[dict[str, Any]]:
        """Turn one head's predictions into results, resized to each item's "height" and "width"."""
        masks = output.masks(layer)
        padded = (masks.shape[-2] * MASK_STRIDE, masks.shape[-1] * MASK_STRIDE)
        results = []
        for image, (item, size) in enumerate(zip(batched_inputs, sizes, strict=True)):
            wanted = (int(item.get("height", size[0])), int(item.get("width", size[1])))
            results.append(infer(self.inference, output.logits[layer, image], masks[image], padded, size, wanted))
        return results

    @torch.no_grad()
    def _evaluate(self, batched_inputs: list[dict[str, Any]], images: ImageList) -> list[dict[str, Any]]:
        output = self.sem_seg_head.predictor(self.pixel_features(images.tensor))
        return self.results(output, _sizes(images), batched_inputs)


def build_model(config: Config, num_classes: int | None = None, things: Iterable[int] | None = None) -> MPFormer:
    """Build the model of a run, initialised from its seed's ``initialisation`` stream.

    ``num_classes`` and ``things`` (contiguous ids) default to those of the dataset and task. Rows with the same seed
    start from the same weights, whatever toggles are on: what a toggle adds draws from a stream of its own.
    """
    with _seeded(random_stream(config.seed, "initialisation", 0)):
        model = MPFormer(**_parts(config, num_classes, things))
    predictor = model.sem_seg_head.predictor
    for slot, table in enumerate((predictor.query_embed, predictor.label_enc), start=1):
        if table is not None and table.weight.device.type != "meta":
            nn.init.normal_(table.weight, generator=random_stream(config.seed, "initialisation", 0, slot=slot))
    return model


@contextmanager
def _seeded(generator: torch.Generator) -> Iterator[None]:
    """Seed the default generator inside, and leave it untouched outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        yield


def _parts(config: Config, num_classes: int | None, things: Iterable[int] | None) -> dict[str, Any]:
    """Make the arguments of :class:`MPFormer` for a configuration."""
    model = config.model
    _check(model)
    classes = num_classes if num_classes is not None else len(_class_table(config))
    things = things if things is not None else _class_table(config).thing_indices
    backbone = build_backbone(model.backbone, model.attention_strides[0])
    return {
        "backbone": backbone,
        "head": _head(config, backbone, classes),
        "criterion": Criterion(_loss_settings(config, classes)),
        "inference": _inference_settings(config, things),
        "piloting": config.toggles if config.toggles.mp_queries else None,
        "pixel_mean": model.pixel_mean,
        "pixel_std": model.pixel_std,
        "size_divisibility": model.size_divisibility,
    }


def _check(model: ModelConfig) -> None:
    coarsest = model.attention_strides[0]
    if model.size_divisibility % coarsest:
        raise UserError(f"model.size_divisibility must be a multiple of the coarsest attention stride, {coarsest}")
    for name in ("hidden_dim", "conv_dim"):
        if getattr(model, name) % (2 * model.heads):
            raise UserError(f"model.{name} must be a multiple of twice model.heads, {2 * model.heads}")


def _class_table(config: Config) -> ClassTable:
    return class_table(config.dataset.name, config.dataset.task)


def _head(config: Config, backbone: Backbone, classes: int) -> MaskFormerHead:
    model = config.model
    channels = {spec.stride: spec.channels for spec in backbone.output_shape().values()}
    pixel_decoder = PixelDecoder(
        PixelDecoderSettings(
            channels=model.conv_dim,
            mask_channels=model.mask_dim,
            layers=model.encoder_layers,
            heads=model.heads,
            feedforward=model.encoder_ffn,
            points=model.encoder_points,
            attention_strides=model.attention_strides,
        ),
        channels,
    )
    return MaskFormerHead(pixel_decoder, MaskedAttentionDecoder(_decoder_settings(config, classes)))


def _decoder_settings(config: Config, classes: int) -> DecoderSettings:
    model, toggles = config.model, config.toggles
    embeddings = classes if toggles.class_embedding == "label" else 1
    return DecoderSettings(
        classes=classes,
        input_channels=model.conv_dim,
        hidden=model.hidden_dim,
        mask_channels=model.mask_dim,
        heads=model.heads,
        layers=model.decoder_layers,
        feedforward=model.decoder_ffn,
        queries=model.queries,
        levels=len(model.attention_strides),
        query_position=toggles.query_position,
        pilot_embeddings=embeddings if toggles.mp_queries else 0,
    )


def _loss_settings(config: Config, classes: int) -> LossSettings:
    model = config.model
    return LossSettings(
        classes=classes,
        weights=match_weights(model),
        no_object_weight=model.no_object_weight,
        points=PointSettings(model.train_points, model.oversample_ratio, model.importance_sample_ratio),
        class_mean=config.schedule.class_mean,
    )


def _inference_settings(config: Config, things: Iterable[int]) -> InferenceSettings:
    wanted = config.evaluation
    return InferenceSettings(
        things=frozenset(things),
        instance=wanted.instance,
        panoptic=wanted.panoptic,
        semantic=wanted.semantic,
        detections=wanted.detections,
        object_mask_threshold=wanted.object_mask_threshold,
        overlap_threshold=wanted.overlap_threshold,
    )


def _size(maps: Tensor) -> Size:
    return maps.shape[-2], maps.shape[-1]


def _sizes(images: ImageList) -> list[Size]:
    return [(int(height), int(width)) for height, width in images.image_sizes]
