"""The further hypotheses: their rows are runs of the protocol's suites but for some, their outcomes go by the rule."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypotheses
import pytest
import run
from answers import Kept

from analysis.statistics import PairedTest
from experiments.suites import catalogue

MINI = Path(run.__file__).parent
NEW = {
    "further-guidance": ["guided-first-2"],
    "further-length": ["mask2former-half", "mask2former-double"],
    "further-strides": ["mask2former-coarse", "mp-former-coarse"],
    "further-bare": ["without-noise-and-labels"],
}


@pytest.mark.usefixtures("study_suites")
@pytest.mark.parametrize("one", hypotheses.ALL, ids=lambda one: str(one.number))
def test_only_these_rows_are_none_of_the_protocols_suites(one: hypotheses.Hypothesis) -> None:
    catalogue.add_file(MINI / "further.py")
    suites = [catalogue.find(name) for name, dataset in run.ORDER if dataset == hypotheses.SET]
    known: list[Mapping[str, Any]] = [
        {**suite.settings, **row.changes} for suite in suites for row in suite.rows("mini", hypotheses.SET)
    ]
    mine = catalogue.find(one.suite)
    rows = mine.rows("mini", hypotheses.SET)
    assert [row.name for row in rows if {**mine.settings, **row.changes} not in known] == NEW[one.suite]
    assert {name for factors in one.predicted.values() for name in factors} <= {row.name for row in rows}
    assert mine.why_not("facades")
    assert (one.suite, hypotheses.SET) in run.HYPOTHESES


@pytest.mark.parametrize(
    ("effects", "said"),
    [((5.0, 4.0), "supported"), ((5.0, 0.1), "undecided"), ((5.0, -4.0), "refuted"), ((5.0,), "undecided")],
)
def test_the_outcome_goes_by_the_rule(effects: tuple[float, ...], said: str) -> None:
    one = hypotheses.ALL[0]
    found = {
        name: PairedTest(size, 5, size - 2, size + 2, p=0.01 if abs(size) > 2 else 0.9)
        for name, size in zip(one.predicted, effects, strict=False)
    }
    assert one.outcome(found) == said


@pytest.mark.parametrize(
    ("low", "high", "p", "said"),
    [
        (-1.4, 1.4, 0.9, "supported"),
        (0.1, 1.4, 0.01, "supported"),
        (0.1, 1.6, 0.04, "refuted"),
        (-1.6, -0.1, 0.04, "refuted"),
        (-0.5, 1.6, 0.2, "undecided"),
    ],
)
def test_that_nothing_matters_goes_by_the_interval(low: float, high: float, p: float, said: str) -> None:
    one = hypotheses.ALL[-1]
    assert one.nothing
    (name,) = one.predicted
    assert one.outcome({name: PairedTest((low + high) / 2, 5, low, high, p=p)}) == said
    assert one.outcome({name: PairedTest(0.1, 2, None, None, p=None)}) == "undecided", "two pairs have no interval"
    assert one.outcome({}) == "undecided"


def test_a_contrast_is_of_the_seeds_that_all_its_rows_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scores = {"mp-former": {0: 9.0, 1: 8.0}, "mask2former-double": {0: 10.0, 1: 9.5}}
    scores |= {"mp-former-half": {0: 4.0, 1: 5.0, 2: 3.0}, "mask2former": {0: 7.0, 1: 7.0}}
    kept = Kept(tmp_path)
    monkeypatch.setattr(kept, "row", lambda suite, dataset, name: name)
    monkeypatch.setattr(hypotheses, "values", lambda name, metric: scores[name])
    one = hypotheses.ALL[1]
    *_, shortfalls = one.predicted.values()
    assert one.contrast(kept, shortfalls) == {0: 2.0, 1: 0.5}


def test_nothing_is_said_before_a_suite_was_launched(tmp_path: Path) -> None:
    assert hypotheses.sections(Kept(tmp_path)) == []
