"""Suites that look into what did not fit, each written before its runs (hypotheses.md).

Launched with ``--suites results/mini/further.py``. Most rows are settings of suites.py as well, and the same runs.
"""

from collections.abc import Iterator
from typing import Any

from experiments.suites.ablations import MASK2FORMER, MP_FORMER
from experiments.suites.rows import Row, suite

LENGTH: dict[str, Any] = {"schedule.max_iter": 1400, "runtime.eval_period": 350}
SHAPES: dict[str, Any] = {"evaluation.val_images": 250}


def _piloted(label: str, **toggles: Any) -> Row:
    changed = {f"toggles.{name}": value for name, value in toggles.items()}
    return Row(label.replace(" ", "-"), label, {**SHAPES, **MP_FORMER, **changed})


@suite(
    title="How far guidance reaches, and how true it is",
    baseline="mask2former",
    columns=("AP", "PQ", "mIoU", "mIoU-L", "jump-rate-late", "Util"),
    settings=LENGTH,
    seeds={"mini": tuple(range(5))},
    not_applicable=lambda dataset: "" if dataset == "shapes" else "hypothesis 2 is about shapes",
)
def further_guidance(scale: str, dataset: str) -> Iterator[Row]:
    """Hypothesis 2; of its runs only those with two guided layers are of no suite of the protocol."""
    yield Row("mask2former", "Mask2Former", {**SHAPES, **MASK2FORMER})
    for layers in ("first", "first-2", "first-4"):
        yield _piloted(f"guided {layers}", guided_layers=layers)
    yield Row("mp-former", "MP-Former, as the paper has it", {**SHAPES, **MP_FORMER})
    for noise in (0.0, 0.4, 0.8):
        yield _piloted(f"point noise {noise:g}", point_noise=noise)
