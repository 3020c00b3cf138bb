"""The tables of the paper: each dataset and task, convergence, cost, and released checkpoints.

A row is a setting of the paper (:mod:`mpformer.config.paper_settings`) as plain Mask2Former or with mask piloting,
position embeddings and schedule equal. At scale mini a ResNet and a narrow Swin stand for the paper's two backbones,
and a schedule keeps its length relative to the suite's first one, up to twice.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.suites import scales
from experiments.suites.ablations import GUIDED_FIRST, MASK2FORMER, MP_FORMER, RELEASE
from experiments.suites.rows import SUITES, Row, suite
from mpformer.config.schema import Config, SwinConfig

_NOTHING_RELEASED = "nobody released checkpoints for it; they are of coco, ade20k and cityscapes: --scale paper"
_PANOPTIC = ("PQ", "PQ_th", "PQ_st", "AP", "mIoU", "mIoU-L", "Util")
_INSTANCE = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mIoU-L", "Util")
_SEMANTIC = ("mIoU", "mIoU-L", "Util")
_LONGEST_AT_MINI = 2.0

#: attends at strides 16, 8, 4 like mini's ResNet; a window is a quarter of the coarsest map of 128 pixels
_MINI_SWIN = SwinConfig(embed_dim=32, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=4, drop_path=0.0)
_BACKBONE_LABELS = {"r50": "R50", "r101": "R101", "swin-l": "Swin-L"}


def _not_paper(dataset: str) -> str:
    """At scale mini the drawn shapes stand for the datasets of the paper, real ones do not."""
    others = scales.datasets("mini")[1:]
    why = "stands for none of the paper's datasets; headline, components and convergence compare on it"
    return f"{dataset} {why}" if dataset in others else ""


def short(setting: str) -> str:
    """Return the part of a setting's name that a row has: ``coco/instance/r50-12ep-step`` gives ``r50-12ep``."""
    return setting.rpartition("/")[2].removesuffix("-step").removesuffix("-poly")


def pairs(settings: Sequence[str], name: str, scale: str, dataset: str) -> Iterator[Row]:
    """Yield plain Mask2Former and MP-Former for each setting of suite ``name``, the second compared with the first."""
    for setting in settings:
        changes = changes_to(setting, settings[0], name, scale, dataset)
        plain = f"mask2former,{short(setting)}"
        label = _label(setting, changes, scale, dataset)
        yield Row(plain, f"Mask2Former, {label}", {**changes, **MASK2FORMER}, baseline=plain)
        yield Row(f"mp-former,{short(setting)}", f"MP-Former, {label}", {**changes, **MP_FORMER}, baseline=plain)


def changes_to(setting: str, first: str, name: str, scale: str, dataset: str) -> dict[str, Any]:
    """Return what turns the base of suite ``name`` into a setting of the paper, or into what stands for it at mini."""
    base = SUITES[name].base(scale, dataset)
    if scale == "paper":
        return difference(base, scales.paper(setting))
    changes: dict[str, Any] = {}
    if "swin" in setting:
        changes["model.backbone"] = _MINI_SWIN.model_dump()
    ratio = scales.paper(setting).schedule.max_iter / scales.paper(first).schedule.max_iter
    if ratio != 1:
        changes["schedule.max_iter"] = round(base.schedule.max_iter * min(ratio, _LONGEST_AT_MINI))
    return changes


def difference(base: Config, other: Config) -> dict[str, Any]:
    """Return the changes that turn one configuration into the other; what the toggles, seed and runtime are stays."""
    changes: dict[str, Any] = {}
    for section in ("dataset", "model", "schedule", "evaluation"):
        mine, theirs = getattr(base, section).model_dump(), getattr(other, section).model_dump()
        changes |= {f"{section}.{key}": value for key, value in theirs.items() if mine[key] != value}
    return changes


def _label(setting: str, changes: Mapping[str, Any], scale: str, dataset: str) -> str:
    backbone, _, length = short(setting).rpartition("-")
    if scale == "paper":
        words = f"{length[:-2]} epochs" if length.endswith("ep") else f"{length} iterations"
        return f"{_BACKBONE_LABELS[backbone]}, {words}"
    iterations = changes.get("schedule.max_iter", scales.base(scale, dataset).schedule.max_iter)
    return f"{'narrow Swin' if 'swin' in backbone else 'narrow ResNet'}, {iterations} iterations"


_COCO_INSTANCE = ("coco/instance/r50-12ep-step", "coco/instance/r50-50ep-step", "coco/instance/swin-l-100ep-step")
_COCO_PANOPTIC = ("coco/panoptic/r50-12ep-step", "coco/panoptic/r50-50ep-step", "coco/panoptic/swin-l-100ep-step")


def _two_backbones(dataset: str, task: str, length: str) -> tuple[str, ...]:
    return tuple(f"{dataset}/{task}/{backbone}-{length}" for backbone in ("r50", "swin-l"))


@suite(
    title="COCO instance segmentation",
    baseline="mask2former,r50-12ep",
    paper_table="unknown (its 12-epoch AP of 40.15 is in the last row of Table 7)",
    paper=_COCO_INSTANCE[:1],
    mini_task="instance",
    columns=_INSTANCE,
    not_applicable=_not_paper,
)
def coco_instance(scale: str, dataset: str) -> Iterator[Row]:
    """R50 with 12 and 50 epochs, Swin-L with 100; each MP-Former row against the Mask2Former row of its setting."""
    yield from pairs(_COCO_INSTANCE, "coco-instance", scale, dataset)


@suite(
    title="COCO panoptic segmentation",
    baseline="mask2former,r50-12ep",
    paper=_COCO_PANOPTIC[:1],
    columns=_PANOPTIC,
    primary="PQ",
    not_applicable=_not_paper,
)
def coco_panoptic(scale: str, dataset: str) -> Iterator[Row]:
    """R50 with 12 and 50 epochs, Swin-L with 100."""
    yield from pairs(_COCO_PANOPTIC, "coco-panoptic", scale, dataset)


_ADE_INSTANCE = _two_backbones("ade20k", "instance", "160k-poly")
_ADE_PANOPTIC = _two_backbones("ade20k", "panoptic", "160k-poly")
_ADE_SEMANTIC = _two_backbones("ade20k", "semantic", "160k-poly")


@suite(
    title="ADE20K instance segmentation",
    baseline="mask2former,r50-160k",
    paper=_ADE_INSTANCE[:1],
    mini_task="instance",
    columns=_INSTANCE,
    not_applicable=_not_paper,
)
def ade20k_instance(scale: str, dataset: str) -> Iterator[Row]:
    """R50 and Swin-L, 160,000 iterations."""
    yield from pairs(_ADE_INSTANCE, "ade20k-instance", scale, dataset)


@suite(
    title="ADE20K panoptic segmentation",
    baseline="mask2former,r50-160k",
    paper=_ADE_PANOPTIC[:1],
    columns=_PANOPTIC,
    primary="PQ",
    not_applicable=_not_paper,
)
def ade20k_panoptic(scale: str, dataset: str) -> Iterator[Row]:
    """R50 and Swin-L, 160,000 iterations."""
    yield from pairs(_ADE_PANOPTIC, "ade20k-panoptic", scale, dataset)


@suite(
    title="ADE20K semantic segmentation",
    baseline="mask2former,r50-160k",
    paper=_ADE_SEMANTIC[:1],
    mini_task="semantic",
    columns=_SEMANTIC,
    primary="mIoU",
    not_applicable=_not_paper,
)
def ade20k_semantic(scale: str, dataset: str) -> Iterator[Row]:
    """R50 and Swin-L, 160,000 iterations."""
    yield from pairs(_ADE_SEMANTIC, "ade20k-semantic", scale, dataset)


_CITY_INSTANCE = _two_backbones("cityscapes", "instance", "90k-poly")
_CITY_PANOPTIC = _two_backbones("cityscapes", "panoptic", "90k-step")
_CITY_SEMANTIC = _two_backbones("cityscapes", "semantic", "90k-poly")


@suite(
    title="Cityscapes instance segmentation",
    baseline="mask2former,r50-90k",
    paper=_CITY_INSTANCE[:1],
    mini_task="instance",
    columns=("AP", "AP50", "mIoU-L", "Util"),
    not_applicable=_not_paper,
)
def cityscapes_instance(scale: str, dataset: str) -> Iterator[Row]:
    """R50 (the abstract: AP +2.3) and Swin-L, 90,000 iterations."""
    yield from pairs(_CITY_INSTANCE, "cityscapes-instance", scale, dataset)


@suite(
    title="Cityscapes panoptic segmentation",
    baseline="mask2former,r50-90k",
    paper=_CITY_PANOPTIC[:1],
    columns=_PANOPTIC,
    primary="PQ",
    not_applicable=_not_paper,
)
def cityscapes_panoptic(scale: str, dataset: str) -> Iterator[Row]:
    """R50 and Swin-L, 90,000 iterations (the release has a step schedule alone)."""
    yield from pairs(_CITY_PANOPTIC, "cityscapes-panoptic", scale, dataset)


@suite(
    title="Cityscapes semantic segmentation",
    baseline="mask2former,r50-90k",
    paper=_CITY_SEMANTIC[:1],
    mini_task="semantic",
    columns=_SEMANTIC,
    primary="mIoU",
    not_applicable=_not_paper,
)
def cityscapes_semantic(scale: str, dataset: str) -> Iterator[Row]:
    """R50 (the abstract: mIoU +1.6) and Swin-L, 90,000 iterations."""
    yield from pairs(_CITY_SEMANTIC, "cityscapes-semantic", scale, dataset)


@suite(
    title="Convergence: half the iterations",
    baseline="mask2former,r50-160k",
    paper=_ADE_SEMANTIC[:1],
    columns=("mIoU", "AP", "PQ", "mIoU-L", "Util"),
    primary="mIoU",
)
def convergence(scale: str, dataset: str) -> Iterator[Row]:
    """Full-length and half-length runs, each with its own schedule to the end, against full-length Mask2Former.

    The abstract claims it on ADE20K without naming the task; semantic segmentation is this suite's choice.
    """
    for full in _ADE_SEMANTIC:
        half = full.replace("160k", "80k")
        yield from pairs_within(full, full, scale, dataset)
        yield from pairs_within(half, full, scale, dataset)


def pairs_within(setting: str, full: str, scale: str, dataset: str) -> Iterator[Row]:
    """Yield a setting's two rows of `convergence`, compared with the full-length Mask2Former of their backbone."""
    changes = changes_to(setting, _ADE_SEMANTIC[0], "convergence", scale, dataset)
    label, baseline = _label(setting, changes, scale, dataset), f"mask2former,{short(full)}"
    yield Row(f"mask2former,{short(setting)}", f"Mask2Former, {label}", {**changes, **MASK2FORMER}, baseline=baseline)
    yield Row(f"mp-former,{short(setting)}", f"MP-Former, {label}", {**changes, **MP_FORMER}, baseline=baseline)


@suite(
    title="Cost of mask piloting",
    baseline="mask2former",
    columns=("train_gflops", "iteration", "hours", "memory", "inference_gflops", "inference", "AP"),
    primary="AP",
    settings={"evaluation.costs": True},
)
def overhead(scale: str, dataset: str) -> Iterator[Row]:
    """Operations, seconds and memory of training with and without piloting; at inference there is no difference."""
    yield Row("mask2former", "Mask2Former", MASK2FORMER)
    yield Row("mp-first", "MP queries, guided in the first layer", GUIDED_FIRST)
    yield Row("mp-former", "MP-Former", MP_FORMER)
    yield Row("mp-former,5-groups", "MP-Former, 5 groups", {**MP_FORMER, "toggles.mp_groups": 5})


_RELEASED = {
    "coco": (_COCO_INSTANCE[1], _COCO_INSTANCE[2], _COCO_PANOPTIC[1], _COCO_PANOPTIC[2]),
    "ade20k": (*_ADE_INSTANCE, *_ADE_PANOPTIC, *_ADE_SEMANTIC),
    "cityscapes": (*_CITY_INSTANCE, *_CITY_PANOPTIC, *_CITY_SEMANTIC),
}
"""Settings of the checkpoints in Mask2Former's model zoo."""
_RELEASED_BY_MP_FORMER = {"coco": (_COCO_INSTANCE[0],)}


@suite(
    title="Released checkpoints, evaluated",
    baseline="mask2former,instance-r50",
    paper=(_COCO_INSTANCE[1], _ADE_INSTANCE[0], _CITY_INSTANCE[0]),
    columns=("AP", "PQ", "mIoU", "mIoU-L", "Util"),
    seeds={"mini": (0,), "paper": (0,)},
    not_applicable=lambda dataset: "" if dataset in _RELEASED else _NOTHING_RELEASED,
)
def released(scale: str, dataset: str) -> Iterator[Row]:
    """Nothing is trained: put the files at DATA_ROOT/weights/ under the names that `mpformer plan released` lists."""
    known = dataset if scale == "paper" else "coco"
    for setting in _RELEASED[known]:
        yield _released("mask2former", "Mask2Former", MASK2FORMER, setting, scale)
    for setting in _RELEASED_BY_MP_FORMER.get(known, ()):
        yield _released("mp-former", "MP-Former", RELEASE, setting, scale)


def _released(method: str, label: str, toggles: Mapping[str, Any], setting: str, scale: str) -> Row:
    """A row that scores a file of weights as it is; at scale mini there is no such file and nothing to change."""
    dataset, task, _ = setting.split("/")
    backbone, _, length = short(setting).rpartition("-")
    name = f"{method},{task}-{backbone}"
    text = f"{label}, {task}, {_BACKBONE_LABELS[backbone]}, {length}"
    if scale != "paper":
        return Row(name, text, baseline=name)
    changes = difference(SUITES["released"].base(scale, dataset), scales.paper(setting)) | dict(toggles)
    file = f"{method}_{dataset}_{task}_{backbone}.pkl"
    return Row(name, text, changes | {"model.init_weights": file, "schedule.evaluation_only": True}, baseline=name)
