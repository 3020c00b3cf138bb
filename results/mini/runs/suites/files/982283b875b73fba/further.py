"""Suites that look into what did not fit, each written before its runs (hypotheses.md).

Launched with ``--suites results/mini/further.py``. Most rows are settings of suites.py as well, and the same runs.
"""

from collections.abc import Iterator
from typing import Any

from experiments.suites.ablations import MASK2FORMER, MP_FORMER
from experiments.suites.rows import Row, suite

SHAPES: dict[str, Any] = {"evaluation.val_images": 250}


def _steps(count: int) -> dict[str, Any]:
    """A schedule of so many steps, evaluated each quarter."""
    return {"schedule.max_iter": count, "runtime.eval_period": count // 4}


def _shapes_alone(dataset: str) -> str:
    return "" if dataset == "shapes" else "the further hypotheses are tested on shapes"


_COMMON: dict[str, Any] = {
    "columns": ("AP", "PQ", "mIoU", "mIoU-L", "jump-rate-late", "Util"),
    "settings": _steps(1400),
    "seeds": {"mini": tuple(range(5))},
    "not_applicable": _shapes_alone,
}


def _piloted(label: str, **toggles: Any) -> Row:
    changed = {f"toggles.{name}": value for name, value in toggles.items()}
    return Row(label.replace(" ", "-"), label, {**SHAPES, **MP_FORMER, **changed})


@suite(title="How far guidance reaches, and how true it is", baseline="mask2former", **_COMMON)
def further_guidance(scale: str, dataset: str) -> Iterator[Row]:
    """Hypothesis 2; of its runs only those with two guided layers are of no suite of the protocol."""
    yield Row("mask2former", "Mask2Former", {**SHAPES, **MASK2FORMER})
    for layers in ("first", "first-2", "first-4"):
        yield _piloted(f"guided {layers}", guided_layers=layers)
    yield Row("mp-former", "MP-Former, as the paper has it", {**SHAPES, **MP_FORMER})
    for noise in (0.0, 0.4, 0.8):
        yield _piloted(f"point noise {noise:g}", point_noise=noise)


@suite(title="Half the iterations of a short and of a longer training", baseline="mask2former", **_COMMON)
def further_length(scale: str, dataset: str) -> Iterator[Row]:
    """Hypotheses 3 and 6; Mask2Former with 700 and with 2,800 steps is of no suite of the protocol."""
    plain, piloted = {**SHAPES, **MASK2FORMER}, {**SHAPES, **MP_FORMER}
    yield Row("mask2former-half", "Mask2Former, 700 steps", {**plain, **_steps(700)})
    yield Row("mp-former-half", "MP-Former, 700 steps", {**piloted, **_steps(700)})
    yield Row("mask2former", "Mask2Former, 1,400 steps", plain)
    yield Row("mp-former", "MP-Former, 1,400 steps", piloted)
    yield Row("mask2former-double", "Mask2Former, 2,800 steps", {**plain, **_steps(2800)})


COARSE: dict[str, Any] = {"model.attention_strides": (32, 16, 8), "model.size_divisibility": 32}


@suite(title="Attention at strides that hold fewer of the objects", baseline="mask2former", **_COMMON)
def further_strides(scale: str, dataset: str) -> Iterator[Row]:
    """Hypothesis 5; its first two rows are runs of the headline."""
    plain, piloted = {**SHAPES, **MASK2FORMER}, {**SHAPES, **MP_FORMER}
    yield Row("mask2former", "Mask2Former, strides 16, 8, 4", plain)
    yield Row("mp-former", "MP-Former, strides 16, 8, 4", piloted)
    yield Row("mask2former-coarse", "Mask2Former, strides 32, 16, 8", {**plain, **COARSE})
    yield Row("mp-former-coarse", "MP-Former, strides 32, 16, 8", {**piloted, **COARSE})


@suite(title="Piloting without noise and without labels", baseline="mp-former", **_COMMON)
def further_bare(scale: str, dataset: str) -> Iterator[Row]:
    """Hypothesis 7; only the last row is of no suite of the protocol."""
    yield Row("mp-former", "MP-Former, as the paper has it", {**SHAPES, **MP_FORMER})
    quiet: dict[str, Any] = {"point_noise": 0.0, "flip_noise": 0.0}
    yield _piloted("without noise", **quiet)
    yield _piloted("without noise and labels", **quiet, class_embedding="learnt")
