"""Typed configuration ⇄ detectron2's ``CfgNode``, and Mask2Former-style YAML with ``KEY VALUE`` overrides.

What Mask2Former has a key for keeps that key (``MODEL.MASK_FORMER.*``, ``MODEL.SEM_SEG_HEAD.*``, ``MODEL.SWIN.*``,
``SOLVER.*``, ``INPUT.*``, ``TEST.*``); the toggles are ``MODEL.MASK_PILOTING.*``; every other field of the typed
configuration is ``MPFORMER.<SECTION>.<FIELD>``. Both directions follow one table of links, so that a configuration
survives the way there and back unchanged. A key or value that this project does not implement is an error, and so is
a key of detectron2 that nothing here reads, unless it has detectron2's default.
"""

import ast
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config

from mpformer.config.classes import num_classes
from mpformer.config.datasets import DATASETS
from mpformer.config.dotted import MISSING, leaves, put, value_at
from mpformer.config.schema import BACKBONE_CONFIGS, Config, toggle_names, unread, valid_keys, validate
from mpformer.runtime.errors import UserError, choices

__all__ = ["defaults", "from_cfg", "from_yaml", "to_cfg", "to_yaml", "with_overrides"]

_log = logging.getLogger(__name__)
_FORMER, _HEAD, _SWIN = "MODEL.MASK_FORMER", "MODEL.SEM_SEG_HEAD", "MODEL.SWIN"
_FEATURES = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
_STRIDES = {name: stride for stride, name in _FEATURES.items()}
_SCHEDULES = {"step": "WarmupMultiStepLR", "poly": "WarmupPolyLR"}

#: Mask2Former's own keys, with its defaults
_MASK2FORMER: dict[str, Any] = {
    "INPUT.DATASET_MAPPER_NAME": "mask_former_semantic",
    "INPUT.COLOR_AUG_SSD": False,
    "INPUT.SIZE_DIVISIBILITY": -1,
    "INPUT.IMAGE_SIZE": 1024,
    "INPUT.MIN_SCALE": 0.1,
    "INPUT.MAX_SCALE": 2.0,
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.WEIGHT_DECAY_EMBED": 0.0,
    "SOLVER.BACKBONE_MULTIPLIER": 0.1,
    f"{_FORMER}.DEEP_SUPERVISION": True,
    f"{_FORMER}.NO_OBJECT_WEIGHT": 0.1,
    f"{_FORMER}.CLASS_WEIGHT": 1.0,
    f"{_FORMER}.DICE_WEIGHT": 1.0,
    f"{_FORMER}.MASK_WEIGHT": 20.0,
    f"{_FORMER}.NHEADS": 8,
    f"{_FORMER}.DROPOUT": 0.1,
    f"{_FORMER}.DIM_FEEDFORWARD": 2048,
    f"{_FORMER}.ENC_LAYERS": 0,
    f"{_FORMER}.DEC_LAYERS": 6,
    f"{_FORMER}.PRE_NORM": False,
    f"{_FORMER}.HIDDEN_DIM": 256,
    f"{_FORMER}.NUM_OBJECT_QUERIES": 100,
    f"{_FORMER}.TRANSFORMER_IN_FEATURE": "res5",
    f"{_FORMER}.ENFORCE_INPUT_PROJ": False,
    f"{_FORMER}.SIZE_DIVISIBILITY": 32,
    f"{_FORMER}.TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
    f"{_FORMER}.TRAIN_NUM_POINTS": 112 * 112,
    f"{_FORMER}.OVERSAMPLE_RATIO": 3.0,
    f"{_FORMER}.IMPORTANCE_SAMPLE_RATIO": 0.75,
    f"{_FORMER}.TEST.SEMANTIC_ON": True,
    f"{_FORMER}.TEST.INSTANCE_ON": False,
    f"{_FORMER}.TEST.PANOPTIC_ON": False,
    f"{_FORMER}.TEST.OBJECT_MASK_THRESHOLD": 0.0,
    f"{_FORMER}.TEST.OVERLAP_THRESHOLD": 0.0,
    f"{_FORMER}.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": False,
    f"{_HEAD}.MASK_DIM": 256,
    f"{_HEAD}.TRANSFORMER_ENC_LAYERS": 0,
    f"{_HEAD}.PIXEL_DECODER_NAME": "BasePixelDecoder",
    f"{_HEAD}.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": ["res3", "res4", "res5"],
    f"{_HEAD}.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS": 4,
    f"{_HEAD}.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS": 8,
    f"{_SWIN}.PRETRAIN_IMG_SIZE": 224,
    f"{_SWIN}.PATCH_SIZE": 4,
    f"{_SWIN}.EMBED_DIM": 96,
    f"{_SWIN}.DEPTHS": [2, 2, 6, 2],
    f"{_SWIN}.NUM_HEADS": [3, 6, 12, 24],
    f"{_SWIN}.WINDOW_SIZE": 7,
    f"{_SWIN}.MLP_RATIO": 4.0,
    f"{_SWIN}.QKV_BIAS": True,
    f"{_SWIN}.QK_SCALE": None,
    f"{_SWIN}.DROP_RATE": 0.0,
    f"{_SWIN}.ATTN_DROP_RATE": 0.0,
    f"{_SWIN}.DROP_PATH_RATE": 0.3,
    f"{_SWIN}.APE": False,
    f"{_SWIN}.PATCH_NORM": True,
    f"{_SWIN}.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    f"{_SWIN}.USE_CHECKPOINT": False,
}

#: keys that must have one of these values (the first is what `to_cfg` writes); other values are not implemented here
_FIXED: dict[str, tuple[Any, ...]] = {
    "MODEL.META_ARCHITECTURE": ("MPFormer", "MaskFormer"),
    "SOLVER.OPTIMIZER": ("ADAMW",),
    "SOLVER.WARMUP_METHOD": ("linear",),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice",),
    "TEST.AUG.ENABLED": (False,),
    "INPUT.FORMAT": ("RGB",),
    f"{_FORMER}.DEEP_SUPERVISION": (True,),
    f"{_FORMER}.DROPOUT": (0.0,),
    f"{_FORMER}.PRE_NORM": (False,),
    f"{_FORMER}.ENC_LAYERS": (0,),
    f"{_FORMER}.ENFORCE_INPUT_PROJ": (False,),
    f"{_FORMER}.TRANSFORMER_IN_FEATURE": ("multi_scale_pixel_decoder",),
    f"{_FORMER}.TRANSFORMER_DECODER_NAME": ("MultiScaleMaskedTransformerDecoder",),
    f"{_HEAD}.NAME": ("MaskFormerHead",),
    f"{_HEAD}.NORM": ("GN",),
    f"{_HEAD}.PIXEL_DECODER_NAME": ("MSDeformAttnPixelDecoder",),
    "MODEL.RESNETS.STRIDE_IN_1X1": (False,),
    "MODEL.RESNETS.STEM_TYPE": ("basic",),
    "MODEL.RESNETS.RES5_MULTI_GRID": ([1, 1, 1],),
    f"{_SWIN}.PATCH_SIZE": (4,),
    f"{_SWIN}.MLP_RATIO": (4.0,),
    f"{_SWIN}.QKV_BIAS": (True,),
    f"{_SWIN}.QK_SCALE": (None,),
    f"{_SWIN}.DROP_RATE": (0.0,),
    f"{_SWIN}.ATTN_DROP_RATE": (0.0,),
    f"{_SWIN}.APE": (False,),
    f"{_SWIN}.PATCH_NORM": (True,),
}
#: keys that say nothing about a run here: other fields decide (features, class count), or paths
_IGNORED = {
    "VERSION", "OUTPUT_DIR", "VIS_PERIOD", "CUDNN_BENCHMARK", "INPUT.SIZE_DIVISIBILITY", "INPUT.MASK_FORMAT",
    "MODEL.RESNETS.OUT_FEATURES", f"{_SWIN}.OUT_FEATURES", f"{_HEAD}.IN_FEATURES", f"{_HEAD}.IGNORE_VALUE",
    f"{_HEAD}.LOSS_WEIGHT", "MODEL.MASK_ON", f"{_FORMER}.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "TEST.AUG.MIN_SIZES", "TEST.AUG.MAX_SIZE", "TEST.AUG.FLIP",
}  # fmt: skip
#: keys of the public MP-Former release and where their meaning is here
_RELEASE_KEYS = {
    "ALL_LY_DN": "GUIDED_LAYERS",
    "LB_NOISE_RATIO": "FLIP_NOISE",
    "NUM_DN": "MP_GROUPS",
    "DN_NO_LB": "CLASS_EMBEDDING",
    "NOISE_SCALE": "POINT_NOISE",
}


@dataclass(frozen=True)
class Link:
    """A field of the typed configuration and the key that holds it, with the value's translation both ways."""

    field: str
    key: str
    encode: Callable[[Any], Any] = lambda value: value
    decode: Callable[[Any], Any] = lambda value: value


def to_cfg(config: Config) -> CfgNode:
    """Return the ``CfgNode`` of a configuration, without the ``extra_cfg`` of a run of an earlier version."""
    cfg = defaults()
    for key, values in _FIXED.items():
        put(cfg, key, values[0])
    tree = config.model_dump()
    for link in _links():
        if (value := value_at(tree, link.field)) is not MISSING:
            put(cfg, link.key, link.encode(value))
    for key, value in _derived(config).items():
        put(cfg, key, value)
    return cfg


def from_cfg(cfg: CfgNode) -> Config:
    """Return the typed configuration of a ``CfgNode``; raises UserError for what this project does not implement."""
    flat, base = dict(_leaves(cfg)), dict(_leaves(defaults()))
    for key in flat.keys() - base.keys():
        raise _unknown(key)
    for key, values in _FIXED.items():
        if flat[key] not in values:
            raise UserError(f"{key} = {flat[key]!r} is not implemented here; valid: {values[-1]!r}")
    tree: dict[str, Any] = {"dataset": _dataset(flat)}
    unused = {"dataset.shapes"} if tree["dataset"]["name"] != "shapes" else set()
    unused |= {f"model.backbone.{name}" for name in _other_backbone(flat)}
    for link in _links():
        if not any(f"{link.field}.".startswith(f"{field}.") for field in unused):
            put(tree, link.field, link.decode(flat[link.key]))
    _restore_derived(tree, flat)
    read = _read_keys()
    if others := [key for key, value in flat.items() if key not in read and _plain(value) != _plain(base[key])]:
        raise unread(*others)
    return _with_classes(validate(tree), flat)


@cache
def _read_keys() -> frozenset[str]:
    """Keys that mean something here, or that are known to say nothing about a run."""
    return frozenset({link.key for link in _links()} | _FIXED.keys() | _IGNORED | _derived_keys())


def from_yaml(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a Mask2Former-style YAML (with ``_BASE_``) and ``KEY VALUE`` overrides into a typed configuration.

    Unset keys have Mask2Former's defaults. Fields that the chosen augmentation and schedule do not read are set to
    their defaults, so that they do not enter the run's identity. Raises UserError naming the nearest valid keys.
    """
    cfg = defaults()
    for key, value in _leaves(_load(path)):
        _assign(cfg, key, value)
    return _overridden(cfg, overrides)


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Return the configuration with ``KEY VALUE`` overrides in Mask2Former's names; raises UserError like from_yaml."""
    return _overridden(to_cfg(config), overrides) if overrides else config


def _overridden(cfg: CfgNode, overrides: Sequence[str]) -> Config:
    if len(overrides) % 2:
        raise UserError(f"overrides come in pairs KEY VALUE; {overrides[-1]!r} has no partner")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        _assign(cfg, key, value)
        if key not in _read_keys():  # even at its default: whoever sets it expects something of it
            raise unread(key)
    return _without_unread(from_cfg(cfg))


def to_yaml(config: Config) -> str:
    """The configuration as YAML that :func:`from_yaml` reads back to the same."""
    return to_cfg(config).dump()


def defaults() -> CfgNode:
    """detectron2's defaults with Mask2Former's, the toggles' and our own keys added."""
    cfg = get_cfg()
    add_deeplab_config(cfg)
    for key, value in _MASK2FORMER.items():
        put(cfg, key, value)
    for key, value in _own_defaults().items():
        put(cfg, key, value)
    return cfg


@cache
def _own_defaults() -> dict[str, Any]:
    """Defaults of the keys that neither detectron2 nor Mask2Former has."""
    from mpformer.config.schema import DatasetConfig, ShapesConfig

    tree = Config(dataset=DatasetConfig(name="shapes", task="panoptic", shapes=ShapesConfig())).model_dump()
    own = {link.key: link.encode(value_at(tree, link.field, None)) for link in _links() if _is_own(link.key)}
    return own | {"MPFORMER.SCHEDULE.AMP_DTYPE": "fp16", "MODEL.DEVICE": "auto", "SEED": 0}


def _is_own(key: str) -> bool:
    return key.startswith(("MODEL.MASK_PILOTING.", "MPFORMER."))


_SINGLE: Mapping[str, str] = {
    "dataset.augmentation.lsj_size": "INPUT.IMAGE_SIZE",
    "dataset.augmentation.lsj_min_scale": "INPUT.MIN_SCALE",
    "dataset.augmentation.lsj_max_scale": "INPUT.MAX_SCALE",
    "dataset.augmentation.max_size": "INPUT.MAX_SIZE_TRAIN",
    "dataset.augmentation.category_max_area": "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA",
    "dataset.augmentation.color": "INPUT.COLOR_AUG_SSD",
    "model.backbone.freeze_at": "MODEL.BACKBONE.FREEZE_AT",
    "model.backbone.stem_channels": "MODEL.RESNETS.STEM_OUT_CHANNELS",
    "model.backbone.res2_channels": "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "model.backbone.embed_dim": f"{_SWIN}.EMBED_DIM",
    "model.backbone.window": f"{_SWIN}.WINDOW_SIZE",
    "model.backbone.drop_path": f"{_SWIN}.DROP_PATH_RATE",
    "model.backbone.pretrain_size": f"{_SWIN}.PRETRAIN_IMG_SIZE",
    "model.backbone.checkpoint": f"{_SWIN}.USE_CHECKPOINT",
    "model.heads": f"{_FORMER}.NHEADS",
    "model.conv_dim": f"{_HEAD}.CONVS_DIM",
    "model.mask_dim": f"{_HEAD}.MASK_DIM",
    "model.mask_stride": f"{_HEAD}.COMMON_STRIDE",
    "model.encoder_layers": f"{_HEAD}.TRANSFORMER_ENC_LAYERS",
    "model.encoder_points": f"{_HEAD}.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS",
    "model.decoder_ffn": f"{_FORMER}.DIM_FEEDFORWARD",
    "model.queries": f"{_FORMER}.NUM_OBJECT_QUERIES",
    "model.train_points": f"{_FORMER}.TRAIN_NUM_POINTS",
    "model.init_weights": "MODEL.WEIGHTS",
    "schedule.batch_size": "SOLVER.IMS_PER_BATCH",
    "schedule.poly_power": "SOLVER.POLY_LR_POWER",
    "schedule.poly_constant_ending": "SOLVER.POLY_LR_CONSTANT_ENDING",
    "evaluation.min_size_test": "INPUT.MIN_SIZE_TEST",
    "evaluation.max_size_test": "INPUT.MAX_SIZE_TEST",
    "evaluation.detections": "TEST.DETECTIONS_PER_IMAGE",
    "evaluation.instance": f"{_FORMER}.TEST.INSTANCE_ON",
    "evaluation.panoptic": f"{_FORMER}.TEST.PANOPTIC_ON",
    "evaluation.semantic": f"{_FORMER}.TEST.SEMANTIC_ON",
    "runtime.checkpoint_period": "SOLVER.CHECKPOINT_PERIOD",
    "runtime.eval_period": "TEST.EVAL_PERIOD",
    "runtime.workers": "DATALOADER.NUM_WORKERS",
    "runtime.device": "MODEL.DEVICE",
    "seed": "SEED",
}
"""Fields whose key is called in a way of its own; see :func:`_direct`."""


def _direct() -> dict[str, str]:
    """Fields whose value is the key's value."""
    names = dict(_SINGLE)
    for name in ("object_mask_threshold", "overlap_threshold"):
        names[f"evaluation.{name}"] = f"{_FORMER}.TEST.{name.upper()}"
    for name in ("hidden_dim", "size_divisibility", "class_weight", "mask_weight", "dice_weight", "no_object_weight",
                 "oversample_ratio", "importance_sample_ratio"):  # fmt: skip
        names[f"model.{name}"] = f"{_FORMER}.{name.upper()}"
    for name in ("depth", "width_per_group", "norm"):
        names[f"model.backbone.{name}"] = f"MODEL.RESNETS.{name.upper()}"
    for name in ("max_iter", "base_lr", "weight_decay", "weight_decay_norm", "weight_decay_embed", "gamma",
                 "backbone_multiplier", "warmup_iters", "warmup_factor"):  # fmt: skip
        names[f"schedule.{name}"] = f"SOLVER.{name.upper()}"
    return names | {f"toggles.{name}": f"MODEL.MASK_PILOTING.{name.upper()}" for name in toggle_names()}


def _translated() -> list[Link]:
    """Fields whose value is written another way."""
    return [
        Link("dataset.augmentation.flip", "INPUT.RANDOM_FLIP", lambda on: "horizontal" if on else "none", _flip),
        Link("dataset.augmentation.min_sizes", "INPUT.MIN_SIZE_TRAIN", tuple, _sizes),
        Link("model.backbone.depths", f"{_SWIN}.DEPTHS", list, tuple),
        Link("model.backbone.heads", f"{_SWIN}.NUM_HEADS", list, tuple),
        Link("model.backbone.arguments", "MPFORMER.MODEL.BACKBONE.ARGUMENTS", _json, json.loads),
        Link("model.pixel_mean", "MODEL.PIXEL_MEAN", list, tuple),
        Link("model.pixel_std", "MODEL.PIXEL_STD", list, tuple),
        # Mask2Former counts the prediction of the bare queries as a layer
        Link("model.decoder_layers", f"{_FORMER}.DEC_LAYERS", lambda n: n + 1, lambda n: n - 1),
        Link(
            "model.attention_strides",
            f"{_HEAD}.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES",
            lambda strides: [_FEATURES[s] for s in sorted(strides)],
            _strides,
        ),
        Link("toggles.mp_groups", "MODEL.MASK_PILOTING.MP_GROUPS", str),
        Link("schedule.lr_schedule", "SOLVER.LR_SCHEDULER_NAME", _SCHEDULES.__getitem__, _schedule),
        Link("schedule.steps", "SOLVER.STEPS", tuple, tuple),
    ]


@cache
def _links() -> tuple[Link, ...]:
    """Every field of the typed configuration but those of `_derived`, in the configuration's order."""
    links = {link.field: link for link in _translated()}
    direct = _direct()
    for field in valid_keys():
        if field in links or field in _DERIVED_FIELDS:
            continue
        links[field] = Link(field, direct.get(field, f"MPFORMER.{field.upper()}"))
    return tuple(links.values())


_DERIVED_FIELDS = {
    "dataset.name", "dataset.task", "dataset.augmentation.kind", "dataset.augmentation.crop_size",
    "model.backbone.kind", "schedule.clip_norm", "schedule.amp",
}  # fmt: skip


def _derived(config: Config) -> dict[str, Any]:
    """Keys that several fields make, or fields that make several keys."""
    augmentation, schedule = config.dataset.augmentation, config.schedule
    train, test = DATASETS[config.dataset.name].catalog_names(config.dataset.task)
    prefix = {"lsj": "coco", "crop": "mask_former", "fixed": "fixed"}[augmentation.kind]
    suffix = "_lsj" if augmentation.kind == "lsj" else ""
    return {
        "DATASETS.TRAIN": (train,),
        "DATASETS.TEST": (test,),
        "INPUT.DATASET_MAPPER_NAME": f"{prefix}_{config.dataset.task}{suffix}",
        "INPUT.CROP.ENABLED": augmentation.crop_size is not None,
        "INPUT.CROP.TYPE": "absolute",
        "INPUT.CROP.SIZE": list(augmentation.crop_size or (0, 0)),
        "MODEL.BACKBONE.NAME": config.model.backbone.detectron2_name,
        f"{_HEAD}.NUM_CLASSES": num_classes(config.dataset.name, config.dataset.task),
        f"{_HEAD}.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS": config.model.heads,
        "SOLVER.CLIP_GRADIENTS.ENABLED": schedule.clip_norm > 0,
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": schedule.clip_norm,
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE": 2.0,
        "SOLVER.AMP.ENABLED": schedule.amp != "off",
        "MPFORMER.SCHEDULE.AMP_DTYPE": "fp16" if schedule.amp == "off" else schedule.amp,
    }


@cache
def _derived_keys() -> frozenset[str]:
    from mpformer.config.schema import DatasetConfig

    return frozenset(_derived(Config(dataset=DatasetConfig(name="nuclei", task="instance"))))


def _dataset(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Name, task and the derived parts of the augmentation."""
    train, test = tuple(flat["DATASETS.TRAIN"]), tuple(flat["DATASETS.TEST"])
    known = {entry.catalog_names(task)[0]: (entry, task) for entry in DATASETS.values() for task in entry.tasks}
    if len(train) != 1 or train[0] not in known:
        raise choices("DATASETS.TRAIN", train, sorted(known))
    entry, task = known[train[0]]
    valid = entry.catalog_names(task)[1:]
    if test != valid:
        raise choices(f"DATASETS.TEST for {train[0]}", test, valid)
    return {"name": entry.name, "task": task, "augmentation": {"kind": _augmentation(flat), "crop_size": _crop(flat)}}


def _augmentation(flat: Mapping[str, Any]) -> str:
    mapper = flat["INPUT.DATASET_MAPPER_NAME"]
    kinds = {"mask_former": "crop", "coco": "lsj", "fixed": "fixed"}
    prefix = mapper.removesuffix("_lsj").rpartition("_")[0]
    if prefix not in kinds or (prefix == "coco") != mapper.endswith("_lsj"):
        valid = "mask_former_<task>, coco_<task>_lsj, fixed_<task>"
        raise UserError(f"unknown INPUT.DATASET_MAPPER_NAME {mapper!r}; valid: {valid}")
    return kinds[prefix]


def _crop(flat: Mapping[str, Any]) -> tuple[int, int] | None:
    if not flat["INPUT.CROP.ENABLED"]:
        return None
    if flat["INPUT.CROP.TYPE"] != "absolute":
        raise choices("INPUT.CROP.TYPE", flat["INPUT.CROP.TYPE"], ["absolute"])
    return tuple(flat["INPUT.CROP.SIZE"])


def _restore_derived(tree: dict[str, Any], flat: Mapping[str, Any]) -> None:
    """Put back the fields of `_DERIVED_FIELDS` outside the dataset."""
    name = flat["MODEL.BACKBONE.NAME"]
    kinds = {config.detectron2_name: config.model_fields["kind"].default for config in BACKBONE_CONFIGS}
    if name not in kinds:
        raise choices("MODEL.BACKBONE.NAME", name, kinds)
    tree["model"]["backbone"]["kind"] = kinds[name]
    clip = {key: flat[f"SOLVER.CLIP_GRADIENTS.{key}"] for key in ("ENABLED", "CLIP_TYPE", "CLIP_VALUE", "NORM_TYPE")}
    if clip["ENABLED"] and (clip["CLIP_TYPE"] != "full_model" or clip["NORM_TYPE"] != 2.0):
        raise UserError("only SOLVER.CLIP_GRADIENTS.CLIP_TYPE full_model with NORM_TYPE 2.0 is implemented")
    tree["schedule"]["clip_norm"] = clip["CLIP_VALUE"] if clip["ENABLED"] else 0.0
    tree["schedule"]["amp"] = flat["MPFORMER.SCHEDULE.AMP_DTYPE"] if flat["SOLVER.AMP.ENABLED"] else "off"


def _other_backbone(flat: Mapping[str, Any]) -> set[str]:
    """Fields of the backbone kinds that are not chosen."""
    fields = {config.detectron2_name: set(config.model_fields) for config in BACKBONE_CONFIGS}
    return set().union(*fields.values()) - fields.get(flat["MODEL.BACKBONE.NAME"], set())


def _with_classes(config: Config, flat: Mapping[str, Any]) -> Config:
    """Check what must agree with other fields: class count and the encoder's heads."""
    right = _derived(config)
    for key in (f"{_HEAD}.NUM_CLASSES", f"{_HEAD}.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS"):
        if flat[key] != right[key]:
            where = f"{config.dataset.name} {config.dataset.task}" if "CLASSES" in key else f"{_FORMER}.NHEADS"
            raise UserError(f"{key} = {flat[key]} does not fit {where}; valid: {right[key]}")
    return config


def _without_unread(config: Config) -> Config:
    """Fields that nothing reads, back at their defaults: they must not make two equal runs differ."""
    changes: dict[str, Any] = {}
    kind = config.dataset.augmentation.kind
    if kind != "lsj":
        changes |= {"lsj_size": 1024, "lsj_min_scale": 0.1, "lsj_max_scale": 2.0}
    if kind != "crop":
        changes |= {"min_sizes": (), "max_size": 4096, "crop_size": None, "category_max_area": 1.0, "color": False}
    changes = {f"dataset.augmentation.{name}": value for name, value in changes.items()}
    if config.schedule.lr_schedule == "poly":
        changes |= {"schedule.steps": ()}
    return config.replace(changes)


def _json(value: Mapping[str, Any] | None) -> str:
    """A mapping as one value, since a ``CfgNode`` takes mappings for branches of its own."""
    return json.dumps(value or {}, sort_keys=True)


def _flip(value: str) -> bool:
    if value not in ("horizontal", "none"):
        raise choices("INPUT.RANDOM_FLIP", value, ["horizontal", "none"])
    return value == "horizontal"


def _sizes(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _strides(features: Sequence[str]) -> tuple[int, ...]:
    if any(name not in _STRIDES for name in features):
        raise choices(f"{_HEAD}.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", list(features), _STRIDES)
    return tuple(sorted((_STRIDES[name] for name in features), reverse=True))


def _schedule(name: str) -> str:
    kinds = {value: kind for kind, value in _SCHEDULES.items()}
    if name not in kinds:
        raise choices("SOLVER.LR_SCHEDULER_NAME", name, kinds)
    return kinds[name]


class _Loader(yaml.SafeLoader):
    """Plain data, and the one computation that Mask2Former's files hold."""


def _computed_sizes(_: yaml.Loader, node: yaml.Node) -> list[int]:
    """``[int(x * 0.1 * 512) for x in range(5, 21)]``: read as such, not run as Python."""
    text = " ".join(str(part.value) for part in node.value) if isinstance(node, yaml.SequenceNode) else str(node.value)
    match = _SIZES.fullmatch(text.strip())
    if not match:
        raise yaml.YAMLError(f"the computation {text!r} is not understood; write its result")
    factor, size, first, end = (float(match[1]), float(match[2]), int(match[3]), int(match[4]))
    return [int(x * factor * size) for x in range(first, end)]


_SIZES = re.compile(r"\[\s*int\(x \* ([\d.]+) \* ([\d.]+)\) for x in range\((\d+), (\d+)\)\s*\]")
_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _computed_sizes)


def _load(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's tree over that of its ``_BASE_``."""
    path = Path(path).expanduser()
    if not above and not path.is_file():
        raise UserError(f"no configuration file {str(path)!r}")
    try:
        if path in above:
            raise yaml.YAMLError("it is a _BASE_ of itself")
        tree = yaml.load(path.read_text(), Loader=_Loader)
        if not isinstance(tree, dict):
            raise yaml.YAMLError("it is not a mapping of keys to values")
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"cannot read {path.name}: {' '.join(str(error).split())[:200]}") from None
    base = tree.pop("_BASE_", None)
    return tree if base is None else _merged(_load(path.parent / Path(str(base)).expanduser(), (*above, path)), tree)


def _merged(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, branch by branch."""
    for key, value in above.items():
        branch = below.get(key)
        below[key] = _merged(branch, value) if isinstance(branch, dict) and isinstance(value, Mapping) else value
    return below


def _assign(cfg: CfgNode, key: str, value: Any) -> None:
    """Set a key that must exist, to a value of its type."""
    current = value_at(cfg, key)
    if current is MISSING or (isinstance(current, CfgNode) and value is not None):
        raise _unknown(key)
    put(cfg, key, _coerced(key, value, current))


def _coerced(key: str, value: Any, current: Any) -> Any:
    if isinstance(value, str) and not isinstance(current, str):
        with suppress(ValueError, SyntaxError):  # the type check below says what was wrong
            value = ast.literal_eval(value)
    if isinstance(current, float) and type(value) is int:
        return float(value)
    if isinstance(current, str) and type(value) is int:
        return str(value)
    if isinstance(current, list | tuple) and isinstance(value, list | tuple):
        return type(current)(value)
    if current is None or value is None or type(value) is type(current):
        return value
    if isinstance(current, tuple) and type(value) is int:  # detectron2 takes one size for a tuple of sizes
        return (value,)
    raise UserError(f"{key} takes a {type(current).__name__} such as {current!r}, got {value!r}")


def _unknown(key: str) -> UserError:
    valid = [name for name, _ in _leaves(defaults())]
    last = key.rpartition(".")[2].upper()
    if last in _RELEASE_KEYS:
        near = [f"MODEL.MASK_PILOTING.{_RELEASE_KEYS[last]}"]
    else:
        same = [name for name in valid if name.rpartition(".")[2] == last]
        near = (same + get_close_matches(key.upper(), valid, n=4, cutoff=0.6))[:5]
    return UserError(f"unknown key {key!r}; nearest: {', '.join(dict.fromkeys(near)) or 'see `mpformer suites`'}")


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML knows no difference."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _leaves(cfg: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys and values of a ``CfgNode``; an empty node is none."""
    return ((key, value) for key, value in leaves(cfg) if not isinstance(value, Mapping))
