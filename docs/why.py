"""The study of why.md: a suite in a file of its own, run through the ordinary command line.

    mpformer launch why --suites docs/why.py --seeds 0,1,2 --workers 1
    mpformer report why

Mask2Former and MP-Former on `shapes`, equal in all but mask piloting, full and half length, each to the end of its
own schedule. The settings are written out, so that the study stays what it is when the defaults of scale mini change.
"""

from collections.abc import Iterator
from typing import Any

from experiments.suites.ablations import MASK2FORMER, MP_FORMER
from experiments.suites.rows import Row, suite

FULL = 1400
HALF: dict[str, Any] = {"schedule.max_iter": FULL // 2, "runtime.eval_period": FULL // 20}


@suite(
    title="Why mask piloting works",
    baseline="mask2former",
    columns=("AP", "PQ", "mIoU", "mIoU-L", "Util"),
    settings={
        "schedule.max_iter": FULL,
        "model.train_points": 576,
        "dataset.shapes.side": 96,
        "dataset.shapes.crowding": 0.1,
        "dataset.shapes.solids": ("disc", "star", "ring"),
        "dataset.shapes.tiny": 0.0,
        "schedule.batch_size": 4,
        "schedule.base_lr": 1e-3,
        "evaluation.val_images": 250,
        "evaluation.object_mask_threshold": 0.8,
        "runtime.eval_period": FULL // 10,
    },
)
def why(scale: str, dataset: str) -> Iterator[Row]:
    """Both methods, full and half length."""
    yield Row("mask2former", f"Mask2Former, {FULL} iterations", MASK2FORMER)
    yield Row("mask2former-half", f"Mask2Former, {FULL // 2} iterations", {**MASK2FORMER, **HALF})
    yield Row("mp-former-half", f"MP-Former, {FULL // 2} iterations", {**MP_FORMER, **HALF})
    yield Row("mp-former", f"MP-Former, {FULL} iterations", MP_FORMER)
