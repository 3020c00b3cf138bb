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
from mpformer.config import paper_settings
from mpformer.config.schema import Config, SwinConfig

_NOTHING_RELEASED = "nobody released checkpoints for it; they are of coco, ade20k and cityscapes: --scale paper"
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


def pairs(
    settings: Sequence[str], name: str, scale: str, dataset: str, first: str = "", against: str = ""
) -> Iterator[Row]:
    """Yield plain Mask2Former and MP-Former for each setting of suite ``name``.

    ``first``: the suite's first setting, if it is not the first of these; ``against``: the setting whose Mask2Former
    row is their baseline, if that is not their own.
    """
    for setting in settings:
        changes = changes_to(setting, first or settings[0], name, scale, dataset)
        label, baseline = _label(setting, changes, scale, dataset), f"mask2former,{short(against or setting)}"
        for row, words, toggles in (("mask2former", "Mask2Former", MASK2FORMER), ("mp-former", "MP-Former", MP_FORMER)):
            yield Row(f"{row},{short(setting)}", f"{words}, {label}", {**changes, **toggles}, baseline=baseline)


def changes_to(setting: str, first: str, name: str, scale: str, dataset: str) -> dict[str, Any]:
    """Return what turns the base of suite ``name`` into a setting of the paper, or into what stands for it at mini."""
    base = SUITES[name].base(scale, dataset)
    if scale == "paper":
        return difference(base, paper_settings.setting(setting))
    changes: dict[str, Any] = {}
    if "swin" in setting:
        changes["model.backbone"] = _MINI_SWIN.model_dump()
    ratio = paper_settings.setting(setting).schedule.max_iter / paper_settings.setting(first).schedule.max_iter
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


_OF_TASK: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "instance": ("AP", ("AP", "AP50", "AP75", "APs", "APm", "APl", "mIoU-L", "Util")),
    "panoptic": ("PQ", ("PQ", "PQ_th", "PQ_st", "AP", "mIoU", "mIoU-L", "Util")),
    "semantic": ("mIoU", ("mIoU", "mIoU-L", "Util")),
}
"""Metric of the verdicts, and columns, of a task's tables."""


def _table(settings: Sequence[str], about: str, columns: Sequence[str] = (), **more: Any) -> None:
    """Define the suite of one dataset and task: each setting's MP-Former row against its Mask2Former row."""
    dataset, task, _ = settings[0].split("/")
    name, (primary, usual) = f"{dataset}-{task}", _OF_TASK[task]

    def rows(scale: str, dataset: str) -> Iterator[Row]:
        yield from pairs(settings, name, scale, dataset)

    rows.__name__, rows.__doc__ = name, about
    suite(
        title=f"{_TITLES[dataset]} {task} segmentation",
        baseline=f"mask2former,{short(settings[0])}",
        paper=(settings[0],),
        mini_task="" if task == "panoptic" else task,
        columns=tuple(columns or usual),
        primary=primary,
        not_applicable=_not_paper,
        **more,
    )(rows)


def _two_backbones(dataset: str, task: str, length: str) -> tuple[str, ...]:
    return tuple(f"{dataset}/{task}/{backbone}-{length}" for backbone in ("r50", "swin-l"))


_TITLES = {"coco": "COCO", "ade20k": "ADE20K", "cityscapes": "Cityscapes"}

_COCO_INSTANCE = ("coco/instance/r50-12ep-step", "coco/instance/r50-50ep-step", "coco/instance/swin-l-100ep-step")
_COCO_PANOPTIC = ("coco/panoptic/r50-12ep-step", "coco/panoptic/r50-50ep-step", "coco/panoptic/swin-l-100ep-step")
_ADE_INSTANCE = _two_backbones("ade20k", "instance", "160k-poly")
_ADE_PANOPTIC = _two_backbones("ade20k", "panoptic", "160k-poly")
_ADE_SEMANTIC = _two_backbones("ade20k", "semantic", "160k-poly")
_CITY_INSTANCE = _two_backbones("cityscapes", "instance", "90k-poly")
_CITY_PANOPTIC = _two_backbones("cityscapes", "panoptic", "90k-step")
_CITY_SEMANTIC = _two_backbones("cityscapes", "semantic", "90k-poly")

_table(
    _COCO_INSTANCE,
    "R50 with 12 and 50 epochs, Swin-L with 100; each MP-Former row against the Mask2Former row of its setting.",
    paper_table="unknown (its 12-epoch AP of 40.15 is in the last row of Table 7)",
)
_table(_COCO_PANOPTIC, "R50 with 12 and 50 epochs, Swin-L with 100.")
for _settings in (_ADE_INSTANCE, _ADE_PANOPTIC, _ADE_SEMANTIC):
    _table(_settings, "R50 and Swin-L, 160,000 iterations.")
_CITY_COLUMNS = ("AP", "AP50", "mIoU-L", "Util")
_table(_CITY_INSTANCE, "R50 (the abstract: AP +2.3) and Swin-L, 90,000 iterations.", _CITY_COLUMNS)
_table(_CITY_PANOPTIC, "R50 and Swin-L, 90,000 iterations (the release has a step schedule alone).")
_table(_CITY_SEMANTIC, "R50 (the abstract: mIoU +1.6) and Swin-L, 90,000 iterations.")


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
        both = (full, full.replace("160k", "80k"))
        yield from pairs(both, "convergence", scale, dataset, _ADE_SEMANTIC[0], full)


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
    changes = difference(SUITES["released"].base(scale, dataset), paper_settings.setting(setting)) | dict(toggles)
    file = f"{method}_{dataset}_{task}_{backbone}.pkl"
    return Row(name, text, changes | {"model.init_weights": file, "schedule.evaluation_only": True}, baseline=name)
