"""The second hypothesis: its rows are runs of the protocol's suites, and its outcome goes by the rule."""

from pathlib import Path

import guidance
import pytest
import run
from answers import Kept

from analysis.statistics import PairedTest
from experiments.suites import catalogue

MINI = Path(run.__file__).parent


@pytest.mark.usefixtures("study_suites")
def test_only_two_guided_layers_are_no_row_of_the_protocols_suites() -> None:
    catalogue.add_file(MINI / "further.py")
    suites = [catalogue.find(name) for name, dataset in run.ORDER if dataset == "shapes"]
    known = [{**suite.settings, **row.changes} for suite in suites for row in suite.rows("mini", "shapes")]
    mine = catalogue.find(guidance.SUITE)
    rows = mine.rows("mini", guidance.SET)
    assert [row.name for row in rows if {**mine.settings, **row.changes} not in known] == ["guided-first-2"]
    assert {name for pair in guidance.TESTS for name in pair} <= {row.name for row in rows}
    assert mine.why_not("facades")
    assert (guidance.SUITE, guidance.SET) in run.HYPOTHESES


@pytest.mark.parametrize(
    ("effects", "said"),
    [((5.0, 4.0), "supported"), ((5.0, 0.1), "undecided"), ((5.0, -4.0), "refuted"), ((5.0,), "undecided")],
)
def test_the_outcome_goes_by_the_rule(effects: tuple[float, ...], said: str) -> None:
    names = [higher for higher, _ in guidance.TESTS]
    found = {
        name: PairedTest(size, 5, size - 2, size + 2, p=0.01 if abs(size) > 2 else 0.9)
        for name, size in zip(names, effects, strict=False)
    }
    assert guidance.outcome(found) == said


def test_nothing_is_said_before_the_suite_was_launched(tmp_path: Path) -> None:
    assert guidance.section(Kept(tmp_path)) == []
