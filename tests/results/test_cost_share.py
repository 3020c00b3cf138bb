"""The fourth hypothesis: its outcome goes by the rule, its table says it."""

from typing import Any

import cost_share
import pytest


def seconds(median: float, low: float, high: float) -> dict[str, Any]:
    return {"median": median, "middle_half": [low, high]}


@pytest.mark.parametrize(
    ("large", "said"),
    [
        (seconds(1.04, 1.02, 1.06), "supported"),
        (seconds(1.09, 1.02, 1.12), "undecided"),  # not barely more
        (seconds(1.16, 1.15, 1.17), "refuted"),  # no less than with the small one
    ],
)
def test_the_outcome_goes_by_the_rule(large: dict[str, Any], said: str) -> None:
    narrow = seconds(1.16, 1.13, 1.2)
    assert cost_share.outcome(narrow, large) == said
    rest = {"median_seconds": {"mask2former": 0.1}, "memory_ratio": 1.01, "pairs": 60}
    lines = cost_share.table({"small": {"seconds": narrow, **rest}, "large": {"seconds": large, **rest}}).splitlines()
    assert lines[2] == "| small | 0.10 | 1.16 | 1.13 … 1.20 | 1.01 | 60 |"
    assert lines[-1] == f"By the rule: **{said}**."
