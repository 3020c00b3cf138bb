"""What a run's page says of where the run comes from, and that its commands repeat it."""

import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.architecture import architecture
from experiments.store.files import write_json
from experiments.store.run_dir import Store
from experiments.suites import catalogue, planning, rows
from experiments.suites.planning import Request
from reports import pages, run_page
from reports.collect import SuiteReport, collect
from reports.run_page import RunSection
from reports.runs import Reader

Gather = Callable[..., SuiteReport]
SERVER = "http://127.0.0.1:5000"


def section(report: SuiteReport, row: str, seed: int) -> RunSection:
    (found,) = [s for r, runs in run_page.sections(report) if r.name == row for s in runs if s.view.seed == seed]
    return found


def launched(tmp_path: Path, **asked: object) -> tuple[planning.Plan, SuiteReport]:
    """The report of a suite that was planned into an empty store."""
    plan = planning.make(Request(**{"suite": "components", **asked}), tmp_path / "datasets")  # type: ignore[arg-type]
    store = Store(tmp_path / "store")
    planning.write_record(plan, store, "")
    (record,) = store.suite_records()
    return plan, collect(record, Reader(store))


@pytest.mark.parametrize("overrides", [(), (("schedule.max_iter", 40), ("dataset.shapes.side", 64))])
def test_the_commands_lead_to_the_very_runs(tmp_path: Path, overrides: tuple[tuple[str, object], ...]) -> None:
    plan, report = launched(tmp_path, overrides=overrides)
    known = {(run.row.name, run.seed): run.run_id for run in plan.runs}
    runs = [section for _, sections in run_page.sections(report) for section in sections][-3:]
    asked = shlex.split(runs[0].repeat_row)
    assert asked[:2] == ["mpformer", "launch"]
    planned = mpformer("plan", *asked[2:], "--json", cwd=tmp_path)
    assert {(run["row"], run["seed"]): run["run_id"] for run in planned} == {
        key: value for key, value in known.items() if key[0] == runs[0].row.name
    }
    one = [word for word in shlex.split(runs[0].repeat)[2:] if word != "--inline"]
    (planned_one,) = mpformer("plan", *one, "--json", cwd=tmp_path)
    assert planned_one["run_id"] == runs[0].view.run_id


def test_a_suite_of_a_file_is_repeated_from_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 12, 3: the printed command alone is enough, in any folder, root and data root included."""
    monkeypatch.setattr(rows, "SUITES", dict(rows.SUITES))
    monkeypatch.setattr(catalogue, "SUITES", rows.SUITES)
    monkeypatch.setattr(catalogue, "_SOURCES", {})
    file = tmp_path / "my_suites.py"
    file.write_text(
        "from experiments.suites.rows import Row, suite\n"
        "@suite(title='T', baseline='a')\n"
        "def mine(scale, dataset):\n"
        "    yield Row('a', 'A', {'model.mask_weight': 2.0})\n"
    )
    catalogue.add_file(file)
    plan, report = launched(tmp_path, suite="mine")
    file.unlink()
    ((_, sections),) = run_page.sections(report)
    asked = shlex.split(sections[0].repeat)
    given = dict(itertools.pairwise(asked))
    assert given["--root"] == f"{(tmp_path / 'store').resolve()}-repeated", "the store itself has the run already"
    assert given["--data-root"] == str((tmp_path / "datasets").resolve())
    one = [word for word in asked[2:] if word != "--inline"]
    (planned,) = mpformer("plan", *one, "--json", cwd=tmp_path)
    assert planned["run_id"] == plan.runs[0].run_id


def mpformer(*words: str, cwd: Path) -> list[dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli.main", *words], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    runs: list[dict[str, str]] = json.loads(done.stdout)["runs"]
    return runs


def test_a_dirty_run_says_to_apply_its_changes_and_seeds_of_other_commits_are_named(gather: Gather) -> None:
    found = section(gather("headline"), "mp-former", 2)
    first, second = found.repeat.splitlines()
    assert first == f"git checkout {'b' * 40}  # and apply the uncommitted changes of the run's page"
    assert second == "mpformer launch headline --scale mini --dataset shapes --row mp-former --seed 2 --inline"
    assert found.repeat_row.splitlines()[:2] == [f"git checkout {'a' * 40}", f"# some seeds: {first}"]


def test_everything_that_the_run_left_behind_is_on_its_page(gather: Gather) -> None:
    report = gather("components")
    page = pages.run_page(report, section(report, "mp-queries", 2))
    for part in (
        "failed: failed (out of memory) at iteration 320 of 1200",
        "laptop-7",
        "torch 2.4.1, detectron2 0.6",
        "4711",
        "guided_layers",
        "out of memory at iteration 321",
        "training loss over iterations",
        "schedule.max_iter = 1200",
        "iteration 40 loss 49.1",
        "not mirrored yet",
        "4 min in 1 attempt",
    ):
        assert part in page
    done = pages.run_page(report, section(report, "mp-former", 0))
    for part in ("3 min 51 s", "1.77 GiB", "AP of the probes over iterations", "0 min 31 s", "mp-former/paper"):
        assert part in done


def test_how_a_run_computed_and_that_resuming_is_not_exact_is_on_its_page(gather: Gather) -> None:
    path = section(gather("headline"), "mp-former", 0).view.directory.path / "trained.json"
    numerics = {"resume": "not bit-exact: runtime.deterministic is off", "TF32 products": True, "precision": "bfloat16"}
    write_json(path, {**json.loads(path.read_text()), "numerics": numerics})
    report = gather("headline")
    page = pages.run_page(report, section(report, "mp-former", 0))
    assert "not bit-exact: runtime.deterministic is off" in page
    assert "TF32 products: True; precision: bfloat16" in page


def test_a_run_that_was_never_launched_has_a_page_that_says_so(gather: Gather) -> None:
    report = gather("components")
    page = pages.run_page(report, section(report, "guided", 2))
    assert "planned: never launched" in page
    assert "None yet." in page


def test_mlflow_is_linked_where_the_mirror_has_been(gather: Gather) -> None:
    report = gather("headline")
    view = section(report, "mp-former", 0).view
    ledger = {"mlflow_run": "abc", "experiment": "7"}
    servers = {SERVER: ledger, "sqlite:////a b/mlflow.db": ledger, "javascript:alert(1)": ledger}
    write_json(view.directory.path / "mlflow.json", {"schema": 1, "servers": servers})
    page = pages.run_page(report, section(report, "mp-former", 0))
    assert f'href="{SERVER}/#/experiments/7/runs/abc"' in page
    assert "mlflow ui --backend-store-uri &#39;sqlite:////a b/mlflow.db&#39;" in page
    assert 'href="javascript' not in page
    (view.directory.path / "mlflow.json").write_text("[]")
    assert run_page.mlflow_runs(view) == ()


def test_every_rows_pages_have_the_architecture_with_what_it_switches_on(gather: Gather) -> None:
    for suite in ("headline", "components"):
        report = gather(suite)
        for row, sections in run_page.sections(report):
            known = [found for found in sections if found.view.config]
            assert known
            for found in known:
                assert architecture(row.toggles, 6) in pages.run_page(report, found)


def test_curves_leave_out_what_cannot_be_drawn(gather: Gather) -> None:
    from reports.chart import curves

    lines = [{"kind": "train", "iteration": i, "loss": loss} for i, loss in enumerate([3.0, float("nan"), None, 2.0])]
    probes = [{"kind": "evaluation", "iteration": i, "metrics": {"AP": i}} for i in (1, 2)]
    final = {"kind": "evaluation", "iteration": 3, "metrics": {"AP": 9, "PQ": 1}, "final": True}
    loss, score = curves([*lines, *probes, final], 3)
    assert "training loss over iterations, 2 to 3" in loss
    assert "AP of the probes over iterations, 1 to 2" in score
    assert curves([], 0) == ()
