"""The base configuration of each scale and dataset; a suite's rows are changes to it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from mpformer.config import paper_settings
from mpformer.config.datasets import DATASETS, Dataset
from mpformer.config.datasets import dataset as dataset_entry
from mpformer.config.schema import (
    Config,
    DatasetConfig,
    EvaluationConfig,
    ModelConfig,
    ResNetConfig,
    RuntimeConfig,
    ScheduleConfig,
    ShapesConfig,
)
from mpformer.runtime.errors import UserError, choices

SCALES = ("mini", "paper")

ABLATIONS = "coco/instance/r50-12ep-step"
"""The setting of the paper's ablations (its Table 7, as far as is known)."""

DECLARED_PAPER_SECONDS = 1.0
"""Seconds an iteration at scale paper: not measured, for want of eight GPUs, but a round guess; shown as declared
until a run has measured it. At scale mini a dataset's entry has them."""

DECLARED_IMAGE_SECONDS: Mapping[str, float] = MappingProxyType({"mini": 0.046, "paper": 0.3})
"""Seconds to evaluate an image, layer analysis included, likewise. Mini was measured: 11.5 s of CPU for 250 images,
of them 2.50 s the forward pass, 2.61 s the last layer's scores, 4.69 s the other layers' (less since then), 0.51 s the
recorder, 1.21 s the gradients (n = 1, one thread, commit e03a0ad: benchmarks/README.md). Paper is a guess."""

DECLARED_DISK: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {"mini": (52, 5_200_000, 4_400_000), "paper": (60, 230_000_000, 180_000_000)}
)
"""Files and bytes that a finished run leaves, and bytes of the weights among them: of mini as counted once, of paper
from the parameters of R50 and ten times the images; an estimate until a run has been counted."""

DECLARED_GIB = 2.5
"""Peak memory of a mini run in GiB, likewise."""


def datasets(scale: str) -> tuple[str, ...]:
    """Return the datasets of a scale, the default one first; raises UserError for an unknown scale."""
    if scale not in SCALES:
        raise choices("scale", scale, SCALES)
    if scale == "paper":
        return (ABLATIONS.partition("/")[0], *(name for name, entry in DATASETS.items() if entry.added))
    return tuple(name for name, entry in DATASETS.items() if entry.mini)


def suite_name(suite: str, scale: str, dataset: str | None) -> str:
    """Name of a launched suite's record and report: ``headline@mini``, or ``headline@mini+nuclei`` off the scale's
    first dataset.
    """
    own = not dataset or (scale in SCALES and dataset == datasets(scale)[0])
    return f"{suite}@{scale}" if own else f"{suite}@{scale}+{dataset}"


def base(scale: str, dataset: str | None = None) -> Config:
    """Return the configuration that rows at this scale and on this dataset change.

    Raises UserError that lists the valid choices.
    """
    _, chosen = check(scale, dataset)
    if scale != "paper":
        return _mini(dataset_entry(chosen))
    setting = _SETTING.get()
    return moved_to(paper_settings.setting(setting), chosen, setting)


_SETTING: ContextVar[str] = ContextVar("setting", default=ABLATIONS)


@contextmanager
def based_on(setting: str | None) -> Iterator[None]:
    """Let :func:`base` at scale paper be another setting than that of the paper's ablations; None: let it be."""
    token = _SETTING.set(setting or _SETTING.get())
    try:
        yield
    finally:
        _SETTING.reset(token)


def moved_to(config: Config, dataset: str, name: str) -> Config:
    """Return a configuration called ``name`` on another dataset, its images whole; UserError if that lacks the task."""
    if config.dataset.name == dataset:
        return config
    entry = dataset_entry(dataset)
    if config.dataset.task not in entry.tasks:
        have = ", ".join(entry.tasks)
        raise UserError(f"{name} trains for the {config.dataset.task} task, and {dataset} has {have} alone")
    other = {"dataset.fingerprint": "", "dataset.crop": None, "dataset.shapes": None, "dataset.added": None}
    return config.replace({"dataset.name": dataset, **other})


def declared_seconds(scale: str, dataset: str) -> tuple[float, float]:
    """Return the declared seconds of an iteration and of an evaluated image."""
    mini = dataset_entry(dataset).mini if scale == "mini" else None
    return mini.seconds if mini else DECLARED_PAPER_SECONDS, DECLARED_IMAGE_SECONDS[scale]


def val_images(dataset: DatasetConfig) -> int:
    """Return the number of validation images, as far as it is known before the dataset is there."""
    return dataset.shapes.val_images if dataset.shapes is not None else dataset_entry(dataset.name).val_images


def column_reasons(dataset: str, scored: EvaluationConfig) -> dict[str, str]:
    """Return the columns that do not apply on the dataset with this evaluation, each with its reason."""
    if scored.layer_scores == "none":
        return dict.fromkeys(_SCORED_BY, "evaluated without scores (evaluation.layer_scores=none)")
    entry = dataset_entry(dataset)
    trained_for = "instances" if scored.instance else "semantic segmentation"
    why = entry.no_stuff or entry.no_things or f"trained for {trained_for} alone"
    return {column: why for column, part in _SCORED_BY.items() if not getattr(scored, part)}


_SCORED_BY = {"AP": "instance", "PQ": "panoptic", "mIoU": "semantic"}


def task_changes(task: str) -> dict[str, Any]:
    """Return the configuration keys that train for a task at scale mini and score what it gives."""
    return {
        "dataset.task": task,
        "evaluation.instance": task != "semantic",
        "evaluation.panoptic": task == "panoptic",
        "evaluation.semantic": task != "instance",
        "evaluation.object_mask_threshold": _object_threshold(task == "panoptic"),
    }


def _mini_model(queries: int) -> ModelConfig:
    """A narrow Mask2Former for images of about 100 pixels, attending at strides 16, 8, 4 (at 32 most masks vanish)."""
    return ModelConfig(
        backbone=ResNetConfig(depth=18, stem_channels=32, res2_channels=32, norm="BN", freeze_at=0),
        hidden_dim=64,
        conv_dim=64,
        mask_dim=64,
        heads=4,
        encoder_layers=1,
        encoder_ffn=128,
        decoder_layers=6,
        decoder_ffn=128,
        queries=queries,
        attention_strides=(16, 8, 4),
        size_divisibility=16,
        train_points=576,  # every cell of a mask: fewer miss small objects, and cost the same within a tenth
    )


def _mini_schedule() -> ScheduleConfig:
    """From scratch in minutes: a tenfold learning rate for the whole model, no fine-tuning clip.

    More steps of fewer images learn most per minute (tuning runs on one core, steps x images: 1,400 x 4 beat 800 x 8).
    """
    return ScheduleConfig(
        max_iter=1400,
        batch_size=4,
        base_lr=1e-3,
        backbone_multiplier=1.0,
        lr_schedule="poly",
        warmup_iters=20,
        warmup_factor=0.1,
        clip_norm=1.0,
    )


_MINI_AREAS = (16**2, 32**2)
"""COCO's limits (32² and 96² of 640 pixels) mean nothing at 128 pixels: mini has its own, and says so."""

STRESS: Mapping[str, Any] = MappingProxyType(
    {
        f"dataset.shapes.{name}": ShapesConfig.model_fields[name].default
        for name in ("crowding", "tiny", "thin", "split", "camouflage", "clutter", "noise", "blur")
    }
)
"""What turns the drawn images' stress up from :data:`~mpformer.config.datasets.LIGHT_STRESS` to its usual amounts."""


def _mini(entry: Dataset) -> Config:
    """Panoptic training where there are things and stuff, so that AP, PQ and mIoU come from one model."""
    assert entry.mini is not None
    task = "panoptic" if "panoptic" in entry.tasks else entry.tasks[0]
    config = Config(
        dataset=DatasetConfig(name=entry.name, task=task, **entry.mini.keys),
        model=_mini_model(entry.mini.queries),
        schedule=_mini_schedule(),
        evaluation=EvaluationConfig(
            object_mask_threshold=_object_threshold("panoptic" in entry.tasks), size_areas=_MINI_AREAS
        ),
        runtime=RuntimeConfig(checkpoint_period=200, eval_period=350, probe_images=64),
    )
    return config.replace(task_changes(task) | dict(entry.mini.changes))


MINI_OBJECT_THRESHOLD = 0.2
"""Least score of a panoptic segment at scale mini, Mask2Former's being 0.8. A classifier trained for minutes is seldom
that sure of what it finds: at 0.8 the PQ of a model with AP 15 is 1.5 to 3 and says how sure it is, at 0.5 it
is 9, at 0.2 it is 22, and about there the PQ of both rows of ``headline`` hardly hangs on the threshold any more."""


def _object_threshold(panoptic: bool) -> float:
    """Evaluations without panoptic segments do not use it, and keep the id that they have with the default."""
    default: float = EvaluationConfig.model_fields["object_mask_threshold"].default
    return MINI_OBJECT_THRESHOLD if panoptic else default


def check(scale: str, dataset: str | None, known: tuple[str, ...] = ()) -> tuple[str, str]:
    """Return scale and dataset, the default filled in; raises UserError with the valid choices.

    ``known`` are the datasets that there are, the default one first: those of a suite, else all of the scale.
    """
    known = known or datasets(scale)
    chosen = known[0] if dataset is None else dataset
    if chosen not in known:
        raise choices(f"dataset at scale {scale!r}", chosen, known)
    return scale, chosen


def scale_steps(config: Config, old_iterations: int) -> Config:
    """Return ``config`` with milestones and evaluation period moved along with a changed number of iterations.

    A run of half the iterations then decays at the same shares of its schedule. Raises UserError if a milestone
    would fall on iteration 0.
    """
    ratio = config.schedule.max_iter / old_iterations
    steps = tuple(round(step * ratio) for step in config.schedule.steps)
    if any(step < 1 for step in steps):
        raise UserError("schedule.max_iter is too small for the row's milestones; give schedule.steps too")
    period = config.runtime.eval_period
    changes = {"schedule.steps": steps, "runtime.eval_period": max(1, round(period * ratio)) if period else 0}
    return config.replace(changes)
