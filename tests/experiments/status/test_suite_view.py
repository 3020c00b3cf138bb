"""Where runs of suites stand: scores, differences to the baseline, time that is left, what Slurm did not answer."""

import json
import shlex
import time
from typing import Any

import pytest

from experiments.cli.main import cli
from experiments.launch import begin
from experiments.status import suite_view, tables
from experiments.status.states import State
from experiments.status.suite_view import Delta, RunLine, TimeLeft, WorkLeft
from experiments.store.files import write_json
from experiments.store.launches import LaunchRecord, launch_dir
from experiments.store.run_dir import RunDir, Store
from experiments.suites.planning import Plan
from tests.support.fake_slurm import LAUNCH, FakeSlurm, Submitted, suite_record


def test_accounting_that_is_away_is_said(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(0, "RUNNING")
    slurm.say("sacct", err="sacct: error: slurmdbd: Connection refused\n", code=1)
    view = suite_view.views(submitted.store.root, [suite_record(submitted.plan)])[0]
    assert view.plain()["scheduler"]["accounting"] is None
    assert "sacct does not answer" in tables.notes([view])[0]
    assert view.runs[0].state.state is State.RUNNING


def test_a_machine_without_slurm_says_so(submitted: Submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    view = suite_view.views(submitted.store.root, [suite_record(submitted.plan)])[0]
    assert view.counts == {"UNKNOWN": 4}
    assert "squeue is not installed here" in tables.notes([view])[0]


def test_nodes_that_a_suites_jobs_avoid_are_named(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(0, "PENDING", "BeginTime")
    record, launched = suite_record(submitted.plan), launch_dir(submitted.store, LAUNCH)
    runs = tuple(run.run_id for run in submitted.plan.unique)
    launched.write(LaunchRecord("headline", "mini", "shapes", runs=runs, profile="a100"))
    launched.deaths_file.write_text("1 78 0 n1 105 9\n2 78 1 n1 137 9\n3 78 2 n2 137 9\n")
    (view,) = suite_view.views(submitted.store.root, [record])
    assert view.plain()["bad_nodes"] == {"n1": 2}
    (note,) = tables.notes([view])
    assert note.startswith("node n1 is left out: the infrastructure ended 2 starts of headline there; mpformer launch")
    command = shlex.split(note.split("; mpformer ")[1].split(" takes it back")[0])
    group: Any = cli
    made = group.commands[command[0]].make_context(command[0], command[1:])
    assert (made.params["forget_nodes"], made.params["on"]) == (True, "a100"), "a Slurm profile, else it is refused"
    assert (made.params["suite"], made.params["scale"], made.params["dataset"]) == ("headline", "mini", "shapes")


def test_the_keys_of_status_json_stay(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(0, "PENDING", "Priority")
    plain = json.loads(json.dumps(suite_view.views(submitted.store.root, [suite_record(submitted.plan)])[0].plain()))
    head = "suite scale dataset title primary baseline counts scheduler left bad_nodes runs"
    assert list(plain) == head.split()
    assert list(plain["scheduler"]) == ["time", "controller", "accounting", "problems"]
    assert list(plain["left"]) == ["runs", "running", "seconds", "unknown"]
    run = "row seed run_id eval_id state label failure_class detail lines attempt job active progress metrics"
    run += " metrics_iteration final eta_seconds eta_source delta delta_iteration"
    assert list(plain["runs"][0]) == run.split()


def _scored(run: RunDir, *lines: tuple[int, float], final: bool = False) -> None:
    for iteration, score in lines:
        line = {"kind": "evaluation", "iteration": iteration, "metrics": {"AP": score}, "final": final}
        with run.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n" + json.dumps({"kind": "train", "loss": 1.0, "iteration": 1}) + "\n")


def test_the_difference_is_at_the_last_iteration_that_both_have(plan: Plan, store: Store) -> None:
    begin.record(plan, store, "")
    base, row = (store.run(run.run_id) for run in plan.runs if run.seed == 0)
    _scored(base, (2, 10.0), (4, 20.0), (6, 30.0))
    _scored(row, (2, 11.0), (4, 22.0))
    (record,) = store.suite_records()

    def line() -> RunLine:
        return {(run.row, run.seed): run for run in suite_view.views(store.root, [record])[0].runs}["mp-former", 0]

    assert (line().score.metrics["AP"], line().score.iteration) == (22.0, 4)
    assert (line().delta, line().delta.value) == (Delta(22.0, 20.0, 4), 2.0)
    _scored(row, (8, 44.0))
    assert (line().score.metrics["AP"], line().delta) == (44.0, Delta(22.0, 20.0, 4))
    text = tables.text(suite_view.views(store.root, [record])[0], 250)
    assert "+2.0 @4" in text


def test_time_left_is_measured_by_the_run_else_by_its_row_else_by_the_suite(
    submitted: Submitted, slurm: FakeSlurm
) -> None:
    plan, store = submitted.plan, submitted.store
    begin.record(plan, store, "")
    (record,) = store.suite_records()
    view = suite_view.views(store.root, [record])[0]
    assert (view.left.seconds, view.left.unknown) == (0, 4)
    first = plan.unique[0]
    result = {"schema": 1, "run_id": first.run_id, "eval_id": first.eval_id, "complete": True, "metrics": {"AP": 1.0}}
    write_json(submitted.run(0).evaluation(first.eval_id) / "result.json", result)
    write_json(submitted.run(0).path / "trained.json", {"seconds": 24.0, "iterations": 12, "weights_sha256": "0"})
    for index in (1, 2, 3):
        slurm.queued(index, "PENDING")
    submitted.attempt(3, outcome="requeued", ended=time.time() - 1)
    write_json(submitted.run(3).attempt(1).path / "progress.json", {"iteration": 9, "max_iter": 12})
    view = suite_view.views(store.root, [record])[0]
    found = {run.state.run_id: run.left for run in view.runs}
    assert [found[run.run_id] for run in plan.unique] == [
        TimeLeft(), TimeLeft(24.0, "row"), TimeLeft(24.0, "suite"), TimeLeft(6.0, "suite")
    ]  # fmt: skip
    assert view.left == WorkLeft(runs=3, running=0, seconds=54.0, unknown=0)
    text = tables.text(view, 250)
    assert "54s of runs left, as measured" in text
    assert "~24s" in text
