"""The paper's training settings, put together from orthogonal pieces. No torch here.

A name reads ``<dataset>/<task>/<backbone>-<length>[-poly|-step][-dropNk]``, such as ``coco/instance/r50-12ep``,
``ade20k/semantic/swin-l-160k-step`` or ``coco/instance/swin-l-250k-drop170k``. The pieces are the dataset's
augmentation and test size, the backbone with its number of queries, and the schedule; any product of valid
pieces is a setting, :func:`setting_names` lists those of the public MP-Former release.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from mpformer.config.classes import tasks_of
from mpformer.config.schema import (
    AnyBackbone,
    AugmentationConfig,
    Config,
    DatasetConfig,
    EvaluationConfig,
    ModelConfig,
    ResNetConfig,
    RuntimeConfig,
    ScheduleConfig,
    SwinConfig,
    Task,
)
from mpformer.runtime.errors import UserError, choices

Kind = Literal["poly", "step"]

COCO_IMAGES_PER_EPOCH = 118_000
_BATCH = 16
_ITERATIONS_PER_EPOCH = COCO_IMAGES_PER_EPOCH // _BATCH
_TENTHS = range(5, 21)  # shortest side: 0.5 to 2.0 times the crop, in steps of 0.1

#: dataset -> epochs or iterations -> where the step schedule drops
_STEPS: dict[str, dict[str, tuple[int, ...]]] = {
    "coco": {
        "12ep": (73750, 81125),
        "24ep": (162250, 169625),
        "36ep": (245000, 260000),
        "50ep": (327778, 355092),
        "100ep": (655556, 710184),
    },
    "ade20k": {"160k": (135000, 150000), "80k": (67500, 75000)},
    "cityscapes": {"90k": (80000, 85000), "150k": (80000, 85000), "45k": (40000, 42500)},
}
_NAME = re.compile(
    r"(?P<dataset>\w+)/(?P<task>\w+)/(?P<backbone>r50|r101|swin-[a-z](?:-in1k)?)-(?P<length>\d+(?:ep|k))"
    r"(?:-(?P<kind>poly|step))?(?:-drop(?P<drop>\d+)k)?"
)


@dataclass(frozen=True)
class Backbone:
    """A backbone, the file of its ImageNet weights, and the queries that go with it."""

    config: AnyBackbone
    weights: str
    queries: int = 100


_SWIN_B = SwinConfig(embed_dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=12, pretrain_size=384)

BACKBONES: dict[str, Backbone] = {
    "r50": Backbone(ResNetConfig(depth=50), "detectron2://ImageNetPretrained/torchvision/R-50.pkl"),
    "r101": Backbone(ResNetConfig(depth=101), "R-101.pkl"),
    "swin-t": Backbone(SwinConfig(), "swin_tiny_patch4_window7_224.pkl"),
    "swin-s": Backbone(SwinConfig(depths=(2, 2, 18, 2)), "swin_small_patch4_window7_224.pkl"),
    "swin-b": Backbone(_SWIN_B, "swin_base_patch4_window12_384_22k.pkl"),
    "swin-b-in1k": Backbone(_SWIN_B, "swin_base_patch4_window12_384.pkl"),
    "swin-l": Backbone(
        SwinConfig(embed_dim=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12, pretrain_size=384),
        "swin_large_patch4_window12_384_22k.pkl",
        queries=200,
    ),
}


def setting(name: str) -> Config:
    """Return the full configuration of a setting, as plain Mask2Former (toggles at their defaults).

    Raises UserError for a name whose pieces are unknown, listing the valid ones.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise UserError(f"unknown setting {name!r}; valid: {', '.join(setting_names())}, or another product of them")
    dataset, task, backbone = match["dataset"], match["task"], match["backbone"]
    _check(dataset, task, backbone)
    drop = int(match["drop"]) * 1000 if match["drop"] else None
    return Config(
        dataset=DatasetConfig(name=dataset, task=task, augmentation=_augmentation(dataset, task, backbone)),
        model=_model(dataset, backbone, task),
        schedule=_schedule(dataset, task, match["length"], match["kind"], drop),
        evaluation=_evaluation(dataset, task, backbone),  # type: ignore[arg-type]
        runtime=RuntimeConfig(
            checkpoint_period=2500, eval_period=5000, probe_images=64, log_period=20, workers=4, deterministic=False
        ),
    )


@cache
def setting_names() -> tuple[str, ...]:
    """The settings of the public MP-Former release; those that it lists twice under two names appear once."""
    names = [f"ade20k/{task}/{backbone}-160k-{kind}"
             for task in ("instance", "panoptic", "semantic") for backbone in ("r50", "swin-l")
             for kind in ("poly", "step")]  # fmt: skip
    names += ["ade20k/semantic/r101-160k-poly"]
    names += [f"cityscapes/{task}/{backbone}-90k-{kind}"
              for task in ("instance", "semantic") for backbone in ("r50", "r101", "swin-l")
              for kind in ("poly", "step")]  # fmt: skip
    names += [f"cityscapes/panoptic/{backbone}-90k-step" for backbone in ("r50", "r101", "swin-l")]
    names += ["cityscapes/semantic/r50-150k-step"]
    names += [f"coco/instance/r50-{epochs}ep-step" for epochs in (12, 24, 36, 50)]
    names += [f"coco/panoptic/r50-{epochs}ep-step" for epochs in (12, 36, 50)]
    for task in ("instance", "panoptic"):
        names += [f"coco/{task}/r101-50ep-step", f"coco/{task}/swin-l-100ep-step"]
    names += [f"coco/instance/swin-l-{length}k-step-drop{drop}k"
              for length, drop in ((250, 145), (250, 170), (350, 270), (450, 395))]  # fmt: skip
    return tuple(names)


def _check(dataset: str, task: str, backbone: str) -> None:
    if dataset not in _STEPS:
        raise choices("dataset of a paper setting", dataset, _STEPS)
    if task not in tasks_of(dataset):
        raise choices("task", task, tasks_of(dataset))
    if backbone not in BACKBONES:
        raise choices("backbone", backbone, BACKBONES)


def _crop(dataset: str, task: str, backbone: str) -> tuple[int, int]:
    """(height, width) of the training crop."""
    if dataset == "cityscapes":
        return 512, 1024
    side = 512 if task == "semantic" and not backbone.startswith(("swin-b", "swin-l")) else 640
    return side, side


def _augmentation(dataset: str, task: str, backbone: str) -> AugmentationConfig:
    """Large-scale jitter for COCO; resize, crop and colour for the others (Cheng et al., CVPR 2022, section 4.1)."""
    if dataset == "coco":
        return AugmentationConfig(kind="lsj", lsj_size=1024, lsj_min_scale=0.1, lsj_max_scale=2.0)
    crop = _crop(dataset, task, backbone)
    return AugmentationConfig(
        kind="crop",
        crop_size=crop,
        min_sizes=tuple(int(tenths * 0.1 * crop[1]) for tenths in _TENTHS),
        max_size=4 * crop[1],
        color=True,
    )


def _model(dataset: str, backbone: str, task: str) -> ModelConfig:
    """On Cityscapes a ResNet's batch normalisation lives and is shared by the devices, as that of R101 in ADE20K's
    semantic segmentation (so Mask2Former's published files); elsewhere it is frozen.
    """
    chosen = BACKBONES[backbone]
    queries = 100 if task == "semantic" else chosen.queries
    config = chosen.config
    live = dataset == "cityscapes" or (dataset, task, backbone) == ("ade20k", "semantic", "r101")
    if live and isinstance(config, ResNetConfig):
        config = config.model_copy(update={"norm": "SyncBN"})
    return ModelConfig(backbone=config, queries=queries, init_weights=chosen.weights)


def _default_kind(dataset: str, task: str) -> Kind:
    """The schedule of the release's file that names none."""
    return "step" if dataset == "coco" or (dataset, task) == ("cityscapes", "panoptic") else "poly"


def _schedule(dataset: str, task: str, length: str, kind: str | None, drop: int | None) -> ScheduleConfig:
    iterations = int(length[:-2]) * _ITERATIONS_PER_EPOCH if length.endswith("ep") else int(length[:-1]) * 1000
    if (kind or _default_kind(dataset, task)) == "poly" and drop is None:
        return ScheduleConfig(max_iter=iterations, batch_size=_BATCH, lr_schedule="poly", amp="fp16")
    steps = (drop, drop + 30_000) if drop is not None else _STEPS[dataset].get(length)
    if steps is None:
        raise choices(f"length of a step schedule on {dataset}", length, _STEPS[dataset])
    return ScheduleConfig(
        max_iter=iterations, batch_size=_BATCH, lr_schedule="step", steps=steps, warmup_iters=10, amp="fp16"
    )


def _evaluation(dataset: str, task: Task, backbone: str) -> EvaluationConfig:
    if dataset == "coco":
        sizes = (800, 1333)
    elif dataset == "cityscapes":
        sizes = (1024, 2048)
    else:
        side = _crop(dataset, task, backbone)[0]
        sizes = (side, 4 * side)
    return EvaluationConfig(
        instance=task != "semantic",
        panoptic=task == "panoptic",
        semantic=task != "instance",
        min_size_test=sizes[0],
        max_size_test=sizes[1],
        layer_mask_images=16,
    )
