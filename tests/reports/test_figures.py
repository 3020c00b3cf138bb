"""Which data the figures of a suite show: differences among many rows, and whatever has been logged so far."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reports.collect import RowRuns, SuiteReport
from reports.figures import MANY, Plan, _drop_summary, _plans
from tests.reports.conftest import LIVE

Gather = Callable[..., SuiteReport]


def plans(report: SuiteReport) -> dict[str, Plan]:
    return {plan.name: plan for plan in _plans(report, (), ())}


def by_seed(row: RowRuns, measure: str, layer: int) -> dict[int, float]:
    """A layer's value in the results of a row, by seed."""
    return {view.seed: (view.result or {})["layers"][measure][layer] for view in row.done}


def test_curves_of_four_or_more_rows_are_differences_to_the_baseline(gather: Gather) -> None:
    report = gather("components")
    assert len(report.rows) >= MANY == 4
    base, row = report.rows[0], report.rows[-1]
    plan = plans(report)["layers"]
    assert "Curves are differences to Mask2Former, paired by seed." in plan.caption
    assert "Mask2Former" not in set(plan.data["row"])
    theirs, mine = by_seed(base, "AP", 3), by_seed(row, "AP", 3)
    label = list(dict.fromkeys(plan.data["row"]))[-1]
    found = plan.data[(plan.data["row"] == label) & (plan.data["layer"] == 3) & (plan.data["measure"] == "AP")]
    assert dict(zip(found["seed"], found["value"], strict=True)) == pytest.approx(
        {seed: value - theirs[seed] for seed, value in mine.items()}
    )
    drawn = plan.draw()
    assert {axes.get_ylabel() for axes in drawn.axes} == {"less Mask2Former"}
    training = plans(report)["training"]
    assert "Curves are differences to Mask2Former" in training.caption
    assert "Mask2Former" not in set(training.data["row"])


def test_curves_of_few_rows_or_of_rows_with_baselines_of_their_own_are_what_was_measured(gather: Gather) -> None:
    few = gather("headline")
    report = gather("components")
    own = replace(report, rows=tuple(replace(row, baseline=row.name) for row in report.rows))
    for found in (few, own):
        plan = plans(found)["layers"]
        assert "differences" not in plan.caption
        row = found.rows[0]
        mine = plan.data[(plan.data["row"] == "Mask2Former") & (plan.data["layer"] == 3)]
        values = mine[mine["measure"] == "AP"]
        assert dict(zip(values["seed"], values["value"], strict=True)) == by_seed(row, "AP", 3)


def test_curves_are_there_from_the_first_logged_iteration_on(gather: Gather, store: Path) -> None:
    for path in (store / "runs").glob("*/metrics.jsonl"):
        first = path.read_text().splitlines(keepends=True)[0]
        path.write_text(first if path.parent.name.startswith(LIVE) else "")
    report = gather("components")
    (live,) = [view for view in report.views if view.run_id.startswith(LIVE)]
    (line,) = live.lines
    plan = plans(report)["training"]
    (shown,) = plan.data.itertuples()
    assert (shown.iteration, shown.measure, shown.value) == (line["iteration"], "loss", line["loss"])
    assert plan.draw().axes
    assert json.loads((live.directory.path / "run.json").read_text())["row"] == "guided"


def test_the_data_of_a_figure_of_many_masks_stays_small() -> None:
    """What is drawn of the drops, not every drop of every object."""
    layers, pairs = 10, 50_000
    drops = np.random.default_rng(0).random((layers, pairs))
    lines = list(_drop_summary(drops))
    assert len(lines) == 51 + 5 * layers
    first, *_, last = (value for of, _, value in lines if of == "all")
    assert (first, last) == (100.0, 0.0)
    medians = [value for of, measure, value in lines if of != "all" and measure == "50th percentile"]
    assert medians == pytest.approx(np.median(drops, axis=1))
