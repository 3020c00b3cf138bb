"""The figures of why mask piloting works: what their data is, and that they are drawn."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.style import look, styled
from reports import why_figures
from reports.collect import SuiteReport
from reports.figures import Plan, pairs, row_labels, row_looks, suite_figures
from reports.figures import _plans as figure_plans
from tests.support.present import present

Gather = Callable[..., SuiteReport]
LAYERS = 7


def plans(report: SuiteReport) -> dict[str, Plan]:
    return {plan.name: plan for plan in why_figures.plans(report)}


@pytest.fixture
def measured(store: Path) -> Path:
    """The fixture store with probes of two evaluations, and with gradients and misses in the results."""
    for number, run in enumerate(sorted(store.glob("runs/shapes-*"))):
        lines = [
            {"iteration": i, "layer": layer, "Util": 100.0 if layer == LAYERS - 1 else 10 * i + layer, "mIoU-L": 50.0,
             "IoU-gt": 40.0, "empty_attention_share": np.nan if layer == LAYERS - 1 else 5.0 + number,
             "stability": np.nan if i == 1 else 60.0 + layer}
            for i in (1, 2) for layer in range(LAYERS)
        ]  # fmt: skip
        pd.DataFrame(lines).to_parquet(run / "probes.parquet")
        for path in run.glob("evals/*/result.json"):
            result = json.loads(path.read_text())
            result["layers"] |= {
                "gradient_cosine": [1.0, *[0.5] * (LAYERS - 1)],
                "gradient_relative_error": [0.0, *[0.8] * (LAYERS - 1)],
                "attention_miss_share": [20.0] * (LAYERS - 1),
            }
            path.write_text(json.dumps({**result, "gradient_images": 64}))
    return store


@pytest.mark.usefixtures("measured")
def test_data_of_each_figure(gather: Gather) -> None:
    found = plans(gather("headline"))
    assert set(found) == {"stability", "attention", "matching-over-training"}
    assert "on 64 images" in found["attention"].caption

    data = found["attention"].data
    assert set(data["measure"]) == {"empty_attention_share", "attention_miss_share", "cosine", "relative_error"}
    cosine = data[data["measure"] == "cosine"]
    assert cosine.groupby(["row", "seed"]).size().tolist() == [LAYERS] * 6
    assert sorted(cosine["value"].unique()) == [0.5, 1.0]

    data = found["stability"].data
    last = data[data["measure"] == "stability"]
    assert last[last["layer"] == 3]["value"].unique().tolist() == [63.0]  # of the last evaluation
    consecutive = data[data["measure"] == "Util-consecutive"]
    assert consecutive["layer"].max() == LAYERS - 2  # the last layer has no next one

    data = found["matching-over-training"].data
    first = data[(data["measure"] == "Util") & (data["iteration"] == 1)]
    assert first["value"].unique().tolist() == [pytest.approx(10 + 2.5)]  # layers 0 … 5, without the last
    assert set(data[data["measure"] == "stability"]["iteration"]) == {2}


@pytest.mark.usefixtures("measured")
def test_they_are_drawn_with_their_data(gather: Gather, tmp_path: Path) -> None:
    report = gather("headline")
    drawn = suite_figures(report, (), (), tmp_path, ["svg"], further=why_figures.plans(report))
    names = {figure.name for figure in drawn}
    assert {"stability", "attention", "matching-over-training"} <= names
    for name in names:
        assert (tmp_path / f"{name}.svg").stat().st_size > 5000
        assert len(pd.read_csv(tmp_path / f"{name}.csv")) > (2 if name == "effects" else 10)


def test_without_probes_or_with_damaged_ones(gather: Gather, store: Path) -> None:
    for run in store.glob("runs/shapes-*"):
        (run / "probes.parquet").write_text("half a file")
    found = plans(gather("headline"))
    assert found["matching-over-training"].data.empty
    assert set(found["stability"].data["measure"]) == {"Util-consecutive"}
    assert set(found["attention"].data["measure"]) == {"empty_attention_share"}


def test_schedules_are_compared_where_only_their_length_differs(gather: Gather) -> None:
    report = gather("headline")
    assert "schedules" not in plans(report)
    halves = []
    for row in report.rows:
        config = json.loads(json.dumps(row.views[0].config))
        config["schedule"]["max_iter"] //= 2
        view = replace(row.views[0])
        # as if it had been read from run.json
        view.__dict__["record"] = replace(present(row.views[0].record), config=config)
        halves.append(replace(row, name=f"{row.name},half", label=f"{row.label}, half", views=(view,)))
    whole = [replace(row, label=f"{row.label}, full") for row in report.rows]
    found = plans(replace(report, rows=(*whole, *halves)))["schedules"]
    assert set(found.data["row"]) == {"Mask2Former", "MP-Former"}
    assert found.data["schedule"].nunique() == 2
    assert found.draw().axes


def test_one_look_a_method_in_all_figures(gather: Gather, store: Path) -> None:
    report = gather("components")
    looks = row_looks(report)
    labels = row_labels(report.rows)
    assert set(labels.values()) <= set(looks)
    (_, (compared, _)) = next(pairs(report))
    baseline = present(report.baseline)
    with styled():
        assert looks[labels[baseline.name]]["color"] == look(0)["color"]
        assert looks[labels[compared.name]]["color"] == look(1)["color"]
    # a row that differs from the baseline in its schedule alone: same colour, other dashes
    longer = report.rows[1]
    for view in longer.views:
        config: Any = view.config
        config.update({key: present(report.baseline).views[0].config[key] for key in ("dataset", "model", "toggles")})
        config["schedule"] = {**config["schedule"], "max_iter": 99}
    looks = row_looks(report)
    mine, theirs = looks[labels[longer.name]], looks[labels[baseline.name]]
    assert mine["color"] == theirs["color"]
    assert mine["linestyle"] != theirs["linestyle"]


def test_effects_and_numbers(gather: Gather, store: Path) -> None:
    report = gather("headline")
    found = {plan.name: plan for plan in figure_plans(report, (), ())}
    delta = present(report.table.rows[1].cells[0].delta)
    effects = found["effects"].data
    assert effects["value"].mean() == pytest.approx(delta.mean)
    assert len(effects) == delta.n
    assert found["along"].data.empty
    report = gather("components")
    for number, row in enumerate(report.rows):
        for view in row.views:
            config = json.loads(json.dumps(present(report.baseline).views[0].config))
            config["toggles"]["point_noise"] = number / 10
            given: Any = view.config
            given.update(config)
    along = next(plan for plan in figure_plans(report, (), ()) if plan.name == "along").data
    assert set(along["key"]) == {"toggles.point_noise"}
    assert along["number"].is_monotonic_increasing
    assert {round(10 * n) for n in along["number"]} == {i for i, row in enumerate(report.rows) if row.done}
