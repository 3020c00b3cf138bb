"""The typed configuration of one run: everything that can change its trained weights or its scores.

Frozen pydantic models with ``extra="forbid"``: an unknown key or value is an error that lists the
valid ones. No torch here. :mod:`mpformer.config.mask2former_yaml` turns a :class:`Config` into detectron2's
``CfgNode`` and back; :mod:`experiments.store.identity` hashes it into a run id.

A field added after a release declares ``json_schema_extra={"legacy": value}``: it enters the run id
only when it differs from that value, so that it orphans no earlier run.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from mpformer.config.datasets import DATASETS, added, know
from mpformer.runtime.errors import UserError

Task = Literal["instance", "panoptic", "semantic"]

_GUIDED = re.compile(r"every|first|first-[1-9]\d*")
_BUDGET = re.compile(r"budget-[1-9]\d*")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")

MAX_SEED = 2**32 - 1


class Section(BaseModel):
    """Base of every part of the configuration: immutable, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def plain(section: BaseModel) -> dict[str, Any]:
    """Return the section as plain data without the later-added fields that still have their legacy value.

    A field that once had other values declares ``json_schema_extra={"hashed": {value: former}}``: ids hold the former.
    """
    values = {name: getattr(section, name) for name in type(section).model_fields}
    kept = {name: _plain_value(value) for name, value in values.items() if not _is_legacy(section, name, value)}
    return {
        name: _former(section, name).get(value, value) if isinstance(value, str) else value
        for name, value in kept.items()
    }


def _former(section: BaseModel, name: str) -> dict[str, Any]:
    extra = type(section).model_fields[name].json_schema_extra
    hashed = extra.get("hashed") if isinstance(extra, dict) else None
    return dict(hashed) if isinstance(hashed, dict) else {}


def _plain_value(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return plain(value)
    if isinstance(value, list | tuple):
        return [_plain_value(item) for item in value]
    return value


def _is_legacy(section: BaseModel, name: str, value: Any) -> bool:
    extra = type(section).model_fields[name].json_schema_extra
    if not isinstance(extra, dict) or "legacy" not in extra:
        return False
    return bool(_plain_value(value) == extra["legacy"])


Solid = Literal["disc", "square", "triangle", "star", "ring", "cross"]
_SOLIDS: tuple[Solid, ...] = ("disc", "square", "triangle", "star", "ring", "cross")


class ShapesConfig(Section):
    """Parameters of the procedural ``shapes`` images; each stress parameter can be set to 0.

    Lengths are in pixels unless they are said to be shares of the image side.
    """

    side: int = Field(128, ge=32, le=1024, description="side of an image, in pixels")
    train_images: int = Field(2000, ge=1, description="training images that are drawn")
    val_images: int = Field(500, ge=1, description="validation images that are drawn")
    seed: int = Field(0, ge=0, description="seed of the drawings; the run has one of its own")
    crowding: float = Field(0.55, ge=0, le=1, description="probability that a group is 2-5 near-identical neighbours")
    large: float = Field(0.25, ge=0, le=1, description="share of large objects")
    solids: tuple[Solid, ...] = Field(
        _SOLIDS,
        min_length=2,
        description="shapes of the objects that are not thin",
        json_schema_extra={"legacy": list(_SOLIDS)},
    )
    tiny: float = Field(
        1.0,
        ge=0,
        le=1,
        description="how small small objects may be: radius from 10 % (0) or 5 % (1) of the side on",
        json_schema_extra={"legacy": 1.0},
    )
    thin: float = Field(0.2, ge=0, le=1, description="share of thin bars and worms")
    split: float = Field(0.35, ge=0, le=1, description="probability that a bar splits a large object")
    camouflage: float = Field(0.25, ge=0, le=1, description="probability that an object wears the texture under it")
    clutter: float = Field(1.0, ge=0, le=1, description="amount of unlabelled clutter")
    noise: float = Field(1.0, ge=0, le=1, description="amount of pixel noise")
    blur: float = Field(1.0, ge=0, le=1, description="amount of blur")


class AugmentationConfig(Section):
    """What happens to a training image: ``fixed`` (flip), ``lsj`` (large-scale jitter) or ``crop`` (resize, crop)."""

    kind: Literal["fixed", "lsj", "crop"] = Field(
        "fixed", description="fixed: flip alone; lsj: large-scale jitter; crop: resize, then crop"
    )
    flip: bool = Field(True, description="flip half of the images left to right")
    lsj_size: int = Field(1024, ge=32, description="side of the square that large-scale jitter pads and crops to")
    lsj_min_scale: float = Field(0.1, gt=0, description="least factor of large-scale jitter")
    lsj_max_scale: float = Field(2.0, gt=0, description="greatest factor of large-scale jitter")
    min_sizes: tuple[int, ...] = Field((), description="shortest sides that `crop` chooses from")
    max_size: int = Field(4096, ge=32, description="longest side after resizing, in pixels")
    crop_size: tuple[int, int] | None = Field(None, description="(height, width) of the crop")
    category_max_area: float = Field(1.0, gt=0, le=1, description="largest share of a crop that one category may fill")
    color: bool = Field(False, description="SSD colour augmentation")


class AddedConfig(Section):
    """Classes of a set of the user's own (``mpformer data add``): what a run knows of it without its data root."""

    things: tuple[str, ...] = Field((), description="classes whose objects are told apart")
    stuff: tuple[str, ...] = Field((), description="classes that are regions")


class DatasetConfig(Section):
    """Which images, which targets, and how they are augmented. Paths are not part of it."""

    name: str = Field(description="`mpformer data` lists the datasets")
    task: Task = Field(description="what is learned: instances, panoptic segments or a semantic map")
    fingerprint: str = Field("", description="checksum of the prepared dataset; empty until it is resolved")
    train_images: int | None = Field(None, ge=1, description="train on the first n images only; None: all")
    crop: int | None = Field(
        None, description="side of the fixed crops that images are cut into; None: whole images, unless it is `nuclei`"
    )
    shapes: ShapesConfig | None = None
    augmentation: AugmentationConfig = AugmentationConfig()
    on_corrupt: Literal["fail", "skip"] = Field("fail", description="what an image that cannot be read does to the run")
    added: AddedConfig | None = Field(
        None,
        description="classes of a set that `mpformer data add` registered; filled in by its name",
        json_schema_extra={"legacy": None},
    )

    @model_validator(mode="before")
    @classmethod
    def _with_added_classes(cls, values: Any) -> Any:
        """Fill in the classes of an added set; a configuration that brings them makes the set known by its name."""
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            return values
        name, classes = values["name"], values.get("added")
        if classes is None and name in DATASETS and DATASETS[name].added:
            table = DATASETS[name].classes()
            return {**values, "added": AddedConfig(things=table.things, stuff=table.stuff)}
        if classes is not None:
            known = AddedConfig.model_validate(classes)
            try:
                know(added(name, known.things, known.stuff))
            except UserError as error:
                raise ValueError(str(error)) from None
        return values

    @field_validator("name")
    @classmethod
    def _is_registered(cls, value: str) -> str:
        if value not in DATASETS:
            raise ValueError(f"unknown dataset; valid: {', '.join(DATASETS)}")
        return value

    @model_validator(mode="after")
    def _shapes_has_parameters(self) -> "DatasetConfig":
        if (self.name == "shapes") != (self.shapes is not None):
            raise ValueError("`dataset.shapes` must be given for the shapes dataset and for no other")
        return self


class BackboneConfig(Section):
    """Base of the backbones' configurations."""

    detectron2_name: ClassVar[str]
    """Its name in a Mask2Former configuration."""
    builder: ClassVar[str]
    """Module and name of what builds it from its configuration and the names of its outputs, ``res2`` ... (strides 4,
    8, ...)."""

    @property
    def title(self) -> str:
        """How reports call it, such as ``R50`` or ``Swin-L``."""
        raise NotImplementedError


class ResNetConfig(BackboneConfig):
    """A detectron2 ResNet of any depth and width."""

    detectron2_name = "build_resnet_backbone"
    builder = "mpformer.modeling.resnet:build_resnet"

    kind: Literal["resnet"] = Field("resnet", description="which backbone; another one begins with its own defaults")
    depth: Literal[18, 34, 50, 101, 152] = Field(50, description="layers")
    stem_channels: int = Field(64, ge=1, description="channels of the first convolution")
    res2_channels: int = Field(256, ge=1, description="output channels of res2; they double per stage")
    width_per_group: int = Field(64, ge=1, description="bottleneck width of res2 (depths 50 and more)")
    norm: Literal["FrozenBN", "BN", "SyncBN", "GN"] = Field(
        "FrozenBN", description="normalisation; SyncBN is shared by the devices"
    )
    freeze_at: int = Field(0, ge=0, le=5, description="stages that are not trained: 1 the stem, 2 res2 too, and so on")

    @property
    def title(self) -> str:
        """``R50`` …; a narrowed one says so."""
        full = 64 if self.depth < 50 else 256
        return f"R{self.depth}" + ("" if self.res2_channels == full else " (narrow)")


class SwinConfig(BackboneConfig):
    """A Swin transformer (Liu et al., ICCV 2021); the defaults are Swin-T."""

    detectron2_name = "D2SwinTransformer"
    builder = "mpformer.modeling.swin:Swin"

    kind: Literal["swin"] = "swin"
    embed_dim: int = Field(96, ge=1, description="channels of the first stage; they double per stage")
    depths: tuple[int, int, int, int] = Field((2, 2, 6, 2), description="blocks of each stage")
    heads: tuple[int, int, int, int] = Field((3, 6, 12, 24), description="attention heads of each stage")
    window: int = Field(7, ge=1, description="side of an attention window, in patches")
    drop_path: float = Field(
        0.3, ge=0, lt=1, description="probability that a block is left out in training, at the last block"
    )
    pretrain_size: int = Field(224, ge=1, description="side of the images that the weights were pretrained on")
    checkpoint: bool = Field(False, description="gradient checkpointing")

    @property
    def title(self) -> str:
        """``Swin-T`` …; of another size, its width."""
        sizes = {(96, 6): "T", (96, 18): "S", (128, 18): "B", (192, 18): "L"}
        return "Swin-" + sizes.get((self.embed_dim, self.depths[2]), str(self.embed_dim))


class TimmConfig(BackboneConfig):
    """A model of timm; :mod:`mpformer.modeling.timm_backbone` says which, and what its stages are."""

    detectron2_name = "timm"
    builder = "mpformer.modeling.timm_backbone:build_timm"

    kind: Literal["timm"] = "timm"
    name: str = Field(description="timm/ and the name of timm's model, such as timm/convnext_tiny")
    freeze_at: int = Field(0, ge=0, le=5, description="frozen stages: 1 the stem, 2 to 5 one stage more each")
    drop_path: float = Field(0.0, ge=0, lt=1)
    arguments: dict[str, JsonValue] = Field(
        default_factory=dict, description='further arguments of timm\'s model, such as {"depths": [2, 2, 6, 2]}'
    )

    @field_validator("name")
    @classmethod
    def _is_a_model(cls, value: str) -> str:
        if match := re.fullmatch(r"(timm/\w+)\.(\w+)", value):
            raise ValueError(
                f"{match[2]} names weights, which model.init_weights does: {match[1]} with timm://{value[5:]} there"
            )
        if not re.fullmatch(r"timm/\w+", value):
            raise ValueError("valid: timm/ and the name of a model, such as timm/convnext_tiny")
        return value

    @field_validator("arguments")
    @classmethod
    def _ours_are_not_among_them(cls, value: dict[str, Any]) -> dict[str, Any]:
        if ours := sorted(value.keys() & _TIMM_RESERVED):
            raise ValueError(f"{', '.join(ours)} cannot be given: other keys of the configuration decide")
        return value

    @property
    def title(self) -> str:
        """timm's name of the model."""
        return self.name.removeprefix("timm/")


_TIMM_RESERVED = {
    "cache_dir", "checkpoint_path", "drop_path_rate", "dynamic_img_size", "feature_cls", "features_only", "in_chans",
    "num_classes", "out_indices", "patch_size", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
}  # fmt: skip


AnyBackbone = Annotated[ResNetConfig | SwinConfig | TimmConfig, Field(discriminator="kind")]
BACKBONE_CONFIGS: tuple[type[BackboneConfig], ...] = get_args(get_args(AnyBackbone)[0])


class ModelConfig(Section):
    """Mask2Former's architecture (Cheng et al., CVPR 2022, section 3); the defaults are its R50 model."""

    backbone: AnyBackbone = ResNetConfig()
    hidden_dim: int = Field(256, ge=8, description="channels of the queries and of the transformer decoder")
    conv_dim: int = Field(256, ge=8, description="channels of the pixel decoder")
    mask_dim: int = Field(256, ge=1, description="channels of mask features and mask embeddings")
    heads: int = Field(8, ge=1, description="attention heads")
    encoder_layers: int = Field(6, ge=0, description="layers of deformable attention in the pixel decoder")
    encoder_ffn: int = Field(1024, ge=1, description="width of its feed-forward blocks")
    encoder_points: int = Field(4, ge=1, description="points that deformable attention samples a head and level")
    decoder_layers: int = Field(
        9, ge=1, description="L; predictions come from L + 1 heads, layer 0 being the bare queries"
    )
    decoder_ffn: int = Field(2048, ge=1, description="width of the transformer decoder's feed-forward blocks")
    queries: int = Field(100, ge=1, description="learnable queries: the matching part")
    attention_strides: tuple[int, ...] = Field(
        (32, 16, 8), description="coarse first; decoder layer i attends at entry i mod n"
    )
    mask_stride: Literal[4] = Field(4, description="stride of the predicted masks, in pixels")
    size_divisibility: int = Field(32, ge=1, description="images are padded to multiples of this")
    pixel_mean: tuple[float, float, float] = Field(
        (123.675, 116.28, 103.53), description="subtracted from red, green and blue"
    )
    pixel_std: tuple[float, float, float] = Field(
        (58.395, 57.12, 57.375), description="red, green and blue are divided by it"
    )
    class_weight: float = Field(2.0, ge=0, description="weight of the class loss, in the loss and in matching")
    mask_weight: float = Field(
        5.0, ge=0, description="weight of the mask loss (binary cross-entropy), in the loss and in matching"
    )
    dice_weight: float = Field(5.0, ge=0, description="weight of the dice loss, in the loss and in matching")
    no_object_weight: float = Field(0.1, ge=0, description="weight of queries without an object in the class loss")
    train_points: int = Field(12544, ge=1, description="points of a mask that its losses and its matching look at")
    oversample_ratio: float = Field(
        3.0, ge=1, description="candidates, times train_points, of which the most uncertain are taken"
    )
    importance_sample_ratio: float = Field(
        0.75, ge=0, le=1, description="share of the points that are the most uncertain ones; the others are uniform"
    )
    init_weights: str = Field(
        "", description="file of initial weights; its path is not part of the run id, its checksum is"
    )
    init_checksum: str = Field("", description="sha256 of the initial weights; empty: random initialisation")
    reinit_class_head: bool = Field(
        False,
        description="begin with a class head of this dataset's classes; of the initial weights it takes the rows of "
        "classes with the same name",
        json_schema_extra={"legacy": False},
    )
    init_classes: str = Field(
        "",
        description="DATASET/TASK whose classes the initial weights tell apart, such as coco/panoptic; empty: that of "
        "the run that the file lies in, else of the published one with as many classes",
        pattern=r"^([\w-]+/\w+)?$",
        json_schema_extra={"legacy": ""},
    )

    @field_validator("attention_strides")
    @classmethod
    def _strides_fall(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or any(s not in (4, 8, 16, 32) for s in value) or list(value) != sorted(set(value), reverse=True):
            raise ValueError("must be distinct strides out of 32, 16, 8, 4, coarse first, such as (16, 8, 4)")
        return value

    @model_validator(mode="after")
    def _a_class_head_to_begin_from(self) -> "ModelConfig":
        if self.reinit_class_head and not self.init_weights:
            raise ValueError("reinit_class_head is about initial weights: give model.init_weights too (--weights FILE)")
        return self


class Toggles(Section):
    """What the ablations switch (MP-Former, section 3); each field is an axis. The defaults are plain Mask2Former.

    With ``mp_queries`` off the other piloting fields change nothing and are left out of the run id.
    """

    mp_queries: bool = Field(False, description="the piloted part exists")
    guided_layers: str = Field(
        "every", description="first | first-k | every: layers that attend through ground-truth masks"
    )
    point_noise: float = Field(
        0.0, ge=0, description="r; a cell flips with probability min(1, r * open cells / all cells)"
    )
    mask_noise: Literal["point", "shift", "scale", "shift-scale"] = Field(
        "point", description="kind of noise on the ground-truth masks that guide attention; its amount is point_noise"
    )
    flip_noise: float = Field(
        0.0, ge=0, le=1, description="probability that a label is replaced by a uniformly drawn class"
    )
    mp_groups: int | str = Field(
        1, description="number of groups, or budget-N: max(1, N // largest object count of the batch)"
    )
    class_embedding: Literal["label", "learnt"] = Field(
        "label", description="content of the piloted queries: an embedding of the label, or one learnt vector"
    )
    class_embedding_layers: Literal["first", "every"] = Field(
        "first", description="layers that the embedding is fed to"
    )
    query_position: bool = Field(True, description="learnable position embedding of the matching part")
    pilot_padding: Literal["masked", "reference"] = Field(
        "masked",
        description="padding slots of the piloted part: hidden and ignored, or seen and counted as in the release",
    )
    redraw: Literal["layer", "once"] = Field("layer", description="mask noise is drawn per layer or once per level")
    layer0_supervision: bool = Field(True, description="the head on the bare queries supervises the piloted part too")

    @field_validator("guided_layers")
    @classmethod
    def _guided(cls, value: str) -> str:
        if not _GUIDED.fullmatch(value):
            raise ValueError(f"unknown value {value!r}; valid: first, first-k (such as first-4), every")
        return "first" if value == "first-1" else value

    @field_validator("mp_groups")
    @classmethod
    def _groups(cls, value: int | str) -> int | str:
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if (isinstance(value, int) and value < 1) or (isinstance(value, str) and not _BUDGET.fullmatch(value)):
            raise ValueError(f"unknown value {value!r}; valid: 1, 2, 5 ..., or budget-N (such as budget-100)")
        return value


WITHOUT_PILOTING = ("mp_queries", "query_position")
"""The toggles that mean something with ``mp_queries`` off too."""


class ScheduleConfig(Section):
    """Optimisation. ``max_iter`` counts optimiser steps of ``batch_size`` images, however many devices share them."""

    max_iter: int = Field(368750, ge=1, description="optimiser steps")
    batch_size: int = Field(16, ge=1, description="effective batch: devices x images per device x accumulation steps")
    base_lr: float = Field(1e-4, gt=0, description="learning rate of AdamW")
    weight_decay: float = Field(0.05, ge=0, description="weight decay")
    weight_decay_norm: float = Field(0.0, ge=0, description="weight decay of normalisation layers")
    weight_decay_embed: float = Field(0.0, ge=0, description="weight decay of embeddings")
    backbone_multiplier: float = Field(0.1, ge=0, description="factor on the backbone's learning rate")
    lr_schedule: Literal["poly", "step"] = Field(
        "step", description="the learning rate falls by a polynomial, or at steps"
    )
    steps: tuple[int, ...] = Field((), description="iterations after which a step schedule drops")
    gamma: float = Field(0.1, gt=0, description="factor of each drop")
    poly_power: float = Field(0.9, gt=0, description="power of the polynomial")
    poly_constant_ending: float = Field(
        0.0,
        ge=0,
        description="share of the learning rate below which a polynomial schedule does not fall; 0: it ends at 0",
    )
    warmup_iters: int = Field(0, ge=0, description="iterations over which the learning rate rises at first")
    warmup_factor: float = Field(1.0, ge=0, le=1, description="share of the learning rate at which it begins to rise")
    clip_norm: float = Field(0.01, ge=0, description="full-model gradient norm; 0: no clipping")
    amp: Literal["off", "bf16", "fp16"] = Field("off", description="automatic mixed precision")
    evaluation_only: bool = Field(
        False,
        description="nothing is trained: model.init_weights is a whole model that is scored as it is",
        json_schema_extra={"legacy": False},
    )
    class_mean: Literal["global", "per-rank"] = Field("global", description="normaliser of the class loss over devices")


class EvaluationConfig(Section):
    """How a checkpoint is scored; hashed into the evaluation id, never into the run id."""

    val_images: int | None = Field(None, ge=1, description="score the first n validation images; None: all")
    instance: bool = Field(True, description="score instances (AP)")
    panoptic: bool = Field(False, description="score panoptic segments (PQ)")
    semantic: bool = Field(False, description="score semantic maps (mIoU)")
    detections: int = Field(100, ge=1, description="instance rows an image (top k over queries x classes)")
    object_mask_threshold: float = Field(
        0.8, ge=0, le=1, description="least score of a panoptic segment; at scale mini 0.2"
    )
    overlap_threshold: float = Field(
        0.8, ge=0, le=1, description="least share of its own mask that a panoptic segment has to keep"
    )
    min_size_test: int = Field(0, ge=0, description="0: images are not resized")
    max_size_test: int = Field(0, ge=0, description="longest side of a resized image, in pixels")
    size_areas: tuple[int, int] | None = Field(
        None, description="COCO's small/medium/large limits in pixels; None: 32^2, 96^2"
    )
    layer_analysis: bool = Field(True, description="write layers.parquet, mIoU-L and Util")
    layer_scores: Literal["final", "every", "none"] = Field(
        "every",
        description="AP, PQ and mIoU: of every decoder layer, of the last alone, or none (the layer analysis alone)",
        json_schema_extra={"hashed": {"every": True, "final": False}},
    )
    layer_mask_images: int = Field(16, ge=0, description="images whose masks of every layer are kept")
    costs: bool = Field(
        False,
        description="count operations and take the time of inference and of a training pass",
        json_schema_extra={"legacy": False},
    )

    @field_validator("layer_scores", mode="before")
    @classmethod
    def _once_a_switch(cls, value: Any) -> Any:
        """Read what older runs have stored: true is ``every``, false is ``final``."""
        return {True: "every", False: "final"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _something_is_measured(self) -> "EvaluationConfig":
        if self.layer_scores == "none" and not self.layer_analysis:
            raise ValueError(
                "layer_scores 'none' leaves nothing to measure with layer_analysis off; valid: final, every"
            )
        return self


class RuntimeConfig(Section):
    """What must not change the result: outside every id."""

    checkpoint_period: int = Field(200, ge=1, description="iterations between checkpoints")
    eval_period: int = Field(0, ge=0, description="iterations between evaluations during training; 0: only the last")
    probe_images: int = Field(64, ge=1, description="validation images of an evaluation during training")
    log_period: int = Field(10, ge=1, description="iterations between lines of the log and of metrics.jsonl")
    workers: int = Field(0, ge=0, description="data loading processes")
    threads: int = Field(1, ge=1, description="threads of a process")
    accumulation: int = Field(1, ge=1, description="micro-batches an optimiser step")
    device: str = Field("auto", description="auto, cpu, cuda, or one GPU such as cuda:0")
    compile: bool = Field(False, description="torch.compile for the network")
    deterministic: bool = Field(
        True,
        description="GPUs: kernels that add in a fixed order, slower (make bench-gpu measures it), and no search for"
        " the fastest convolutions; deformable attention's gradient stays added in any order. CPUs always are",
    )
    tf32: bool = Field(
        True, description="GPUs: float32 products and convolutions round what they multiply to 10 bits of mantissa"
    )
    slow_attention: bool = Field(
        False, description="GPUs: go on without a kernel of deformable attention, with grid_sample"
    )

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError("unknown device; valid: auto, cpu, cuda, cuda:0 ...")
        return value


class Config(Section):
    """One run, fully resolved."""

    dataset: DatasetConfig
    model: ModelConfig = ModelConfig()
    toggles: Toggles = Toggles()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of weights, order of images and noise")
    extra_cfg: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of detectron2 that runs of earlier versions were given; nothing reads one, none can be set",
    )

    def replace(self, changes: dict[str, Any]) -> "Config":
        """Return a copy with dotted keys set, such as ``{"toggles.point_noise": 0.2}``, validated again.

        ``model.backbone.kind`` chooses another backbone, ``model.backbone.name`` a timm model: the keys of the one
        before go. Raises UserError for an unknown key or an invalid value.
        """
        tree = self.model_dump()
        kind = "timm" if _TIMM_NAME in changes else changes.get(_KIND, self.model.backbone.kind)
        if kind != self.model.backbone.kind:
            if self.model.init_weights and "model.init_weights" not in changes:
                raise _other_weights(self.model.init_weights)
            tree["model"]["backbone"] = {"kind": kind}
        for key, value in changes.items():
            _set(tree, key, value)
        return validate(tree)


_KIND, _TIMM_NAME = "model.backbone.kind", "model.backbone.name"


def _other_weights(name: str) -> UserError:
    return UserError(
        f"{name} are weights of another backbone: set model.init_weights too, to a file, to timm://MODEL.TAG of a timm "
        "model, or to nothing for random weights"
    )


def unread(*keys: str) -> UserError:
    """The error for keys of detectron2 that are no field of the configuration."""
    names = ", ".join(key.removeprefix("extra_cfg.") for key in keys)
    return UserError(f"nothing here reads {names}: leave it out, since it would change the run's id and nothing else")


def validate(tree: dict[str, Any]) -> Config:
    """Build a :class:`Config` from plain data; raises UserError with one readable line."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_first_line(error)) from None


def toggle_names() -> tuple[str, ...]:
    """Names of the toggles, each an axis of the ablations."""
    return tuple(Toggles.model_fields)


def effective_toggles(toggles: Mapping[str, Any]) -> dict[str, Any]:
    """What of stored toggles changes something, with the defaults of toggles that are younger than the store."""
    known = {**Toggles().model_dump(mode="json"), **toggles}
    return known if known["mp_queries"] else {name: known[name] for name in WITHOUT_PILOTING}


NEVER_SET = ("extra_cfg", "added")
"""Fields that are no keys: nothing reads the one, the other follows from the dataset's name."""


def valid_keys(prefix: str = "", model: type[BaseModel] = Config) -> list[str]:
    """Every dotted key of the configuration that can be set, for error messages."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        nested = [] if name in NEVER_SET else models_in(field.annotation)
        for inner in nested:
            keys += valid_keys(f"{prefix}{name}.", inner)
        if not nested and name not in NEVER_SET:
            keys.append(prefix + name)
    return list(dict.fromkeys(keys))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a field's annotation names; none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in models_in(part)]


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    if "extra_cfg" in (last, *parents[:1]):
        raise unread(key)
    node = tree
    for name in parents:
        inner = node.get(name)
        if not isinstance(inner, dict):
            raise _unknown(key)
        node = inner
    if last not in node and key not in valid_keys():
        raise _unknown(key)
    node[last] = value


def _unknown(key: str) -> UserError:
    from difflib import get_close_matches

    keys = valid_keys()
    near = get_close_matches(key, keys, n=5, cutoff=0.5) or [k for k in keys if k.startswith(key.split(".")[0] + ".")]
    return UserError(f"unknown configuration key {key!r}; nearest: {', '.join(near or keys)}")


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return str(_unknown(where))
    reason = first["msg"].removeprefix("Value error, ")
    return f"invalid value for {where or 'the configuration'}: {reason} (got {first['input']!r:.80})"
