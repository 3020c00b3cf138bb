import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.execution.worker import MAX_LOST
from experiments.launch import choosing, local, machine, watching
from experiments.launch.local import launch
from experiments.launch.machine import Width
from experiments.status.states import State
from experiments.store.files import read_json, write_json
from experiments.store.launches import queued_runs
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan, Request, make
from mpformer.runtime.errors import UserError

Make = Callable[..., Any]
TWO = Width(2, 1)


def _follow(plan: Plan, store: Store, started: local.Launch) -> str:
    text = io.StringIO()
    watching.follow(plan, store, started, Console(file=text, width=200))
    return text.getvalue()


def _states(plan: Plan, store: Store) -> set[str]:
    return {state.label for state in choosing.snapshot(plan, store)}


def _wait(condition: Callable[[], Any], seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def _attempts(plan: Plan, store: Store) -> list[int]:
    return [len(store.run(run.run_id).attempts()) for run in plan.unique]


def test_a_suite_is_launched_followed_and_done(plan: Plan, store: Store, counter: Make) -> None:
    started = launch(plan, store, command="test", width=TWO, runner=counter(seconds=0.02))
    assert len(started.started) == 4
    text = _follow(plan, store, started)
    assert _states(plan, store) == {"DONE"}
    assert "mp-former seed 1: DONE" in text
    assert _attempts(plan, store) == [1, 1, 1, 1]
    origins = [read_json(store.run(run.run_id).attempt(1).path / "provenance.json") for run in plan.unique]
    assert len(list((started.directory / "workers").iterdir())) == 2
    assert all(list(started.directory.glob(f"jobs/{origin['job_id']}_*")) for origin in origins)
    assert {origin["environment"]["OMP_NUM_THREADS"] for origin in origins} == {"1"}

    again = launch(plan, store, width=TWO, runner=counter())
    assert again.started == ()
    assert _attempts(plan, store) == [1, 1, 1, 1]


def test_a_failed_run_stops_neither_the_others_nor_the_worker(plan: Plan, store: Store, counter: Make) -> None:
    started = launch(plan, store, width=Width(1, 1), runner=counter(fail={"m2f-s0": "nan"}))
    text = _follow(plan, store, started)
    assert sorted(state.label for state in choosing.snapshot(plan, store)) == ["DONE", "DONE", "DONE", "FAILED(nan)"]
    assert "it was asked to fail as nan" in text
    assert _attempts(plan, store) == [1, 1, 1, 1], "a launch tries a failing run once"

    again = launch(plan, store, width=TWO, runner=counter())
    assert again.started == ()
    assert list(again.left_alone.values()) == ["nan"]
    failed, kinds = choosing.only_failed(plan, store)
    with pytest.raises(UserError, match="of class oom; failed: nan"):
        choosing.only_failed(plan, store, ("oom",))
    retried = launch(failed, store, width=TWO, retry=kinds, runner=counter())
    _follow(failed, store, retried)
    assert _states(plan, store) == {"DONE"}


def test_a_killed_attempt_is_taken_up_again_by_the_same_launch(
    plan: Plan, store: Store, counter: Make, tmp_path: Path
) -> None:
    started = launch(plan, store, width=Width(1, 1), runner=counter(kill_once=tmp_path / "killed"))
    _follow(plan, store, started)
    assert _states(plan, store) == {"DONE"}
    assert _attempts(plan, store) == [2, 1, 1, 1]
    lost = read_json(store.run(plan.runs[0].run_id).attempt(1).path / "stage.json")
    assert (lost["outcome"], lost["failure_class"]) == ("lost", "killed")
    assert "SIGKILL" in lost["detail"]


class _Deadly:
    """Dies at once, every time."""

    def train(self, *_: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def evaluate(self, *_: Any) -> dict[str, Any]:
        raise AssertionError("it never comes to an evaluation")


def test_a_run_that_always_kills_its_process_is_given_up(plan: Plan, store: Store) -> None:
    first = replace(plan, runs=plan.runs[:1])
    started = launch(first, store, width=Width(1, 1), runner=_Deadly())
    _follow(first, store, started)
    assert _attempts(first, store) == [MAX_LOST]
    assert _states(first, store) == {"LOST(killed)"}


def test_killed_workers_are_replaced_by_the_next_launch(plan: Plan, store: Store, counter: Make) -> None:
    started = launch(plan, store, width=TWO, runner=counter(seconds=0.3))
    _wait(lambda: sum(_attempts(plan, store)) >= 2)
    time.sleep(0.7)
    _kill_everything(plan, store, started)
    left = [state.state for state in choosing.snapshot(plan, store)]
    assert State.LOST in left
    again = launch(plan, store, width=TWO, runner=counter())
    assert len(again.started) == 4 - left.count(State.DONE)
    _follow(plan, store, again)
    assert _states(plan, store) == {"DONE"}


def _kill_everything(plan: Plan, store: Store, started: local.Launch) -> None:
    """SIGKILL the workers and the attempts, as a power cut would."""
    for run in plan.unique:
        for path in (store.run(run.run_id).path / "claims").glob("[0-9]"):
            os.kill(int(read_json(path)["pid"]), signal.SIGKILL)
    started.kill()
    _wait(lambda: not started.working())


def test_ctrl_c_checkpoints_stops_and_the_next_launch_continues(
    plan: Plan, store: Store, counter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = launch(plan, store, width=TWO, runner=counter(seconds=0.3))

    def interrupted(*_: Any) -> None:
        _wait(lambda: sum(_attempts(plan, store)) >= 2)
        time.sleep(0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(watching, "_follow", interrupted)
    text = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        watching.follow(plan, store, started, Console(file=text, width=200))
    monkeypatch.undo()
    assert "launch again to continue" in text.getvalue()
    states = choosing.snapshot(plan, store)
    assert {state.state for state in states} <= {State.CANCELLED, State.PLANNED, State.DONE}
    stopped = store.run(next(state.run_id for state in states if state.state is State.CANCELLED))
    reached = read_json(stopped.path / "checkpoints" / "state.json")["iteration"]
    _follow(plan, store, launch(plan, store, width=TWO, runner=counter()))
    assert _states(plan, store) == {"DONE"}
    iterations = [json.loads(line)["iteration"] for line in stopped.metrics.read_text().splitlines()]
    assert iterations == [*range(1, 13), 12], f"went on after iteration {reached}, and was scored at the end"


def _launch(barrier: Any, arguments: tuple[Any, ...]) -> None:
    plan, store, runner = arguments
    barrier.wait()
    started = launch(plan, store, width=TWO, runner=runner)
    while started.working():
        time.sleep(0.1)


def test_simultaneous_launches_start_nothing_twice(plan: Plan, store: Store, counter: Make) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    arguments = (plan, store, counter(seconds=0.02))
    launchers = [context.Process(target=_launch, args=(barrier, arguments)) for _ in range(4)]
    for process in launchers:
        process.start()
    for process in launchers:
        process.join(120)
    assert [process.exitcode for process in launchers] == [0] * 4
    assert _states(plan, store) == {"DONE"}
    for run in plan.unique:
        directory = store.run(run.run_id)
        iterations = [json.loads(line)["iteration"] for line in directory.metrics.read_text().splitlines()]
        assert iterations == [*range(1, 13), 12], "every iteration was done once"
        assert directory.attempts() == [1]


def test_a_launch_while_another_works_waits_for_it(plan: Plan, store: Store, counter: Make) -> None:
    first = launch(plan, store, width=Width(1, 1), runner=counter(seconds=0.05))
    assert queued_runs(store) == {run.run_id for run in plan.unique}
    second = launch(plan, store, width=TWO, runner=counter())
    assert second.started == ()
    _follow(plan, store, second)
    assert _states(plan, store) == {"DONE"}
    assert _attempts(plan, store) == [1, 1, 1, 1]
    _wait(lambda: not first.working())


def test_missing_data_stops_a_launch_before_anything_is_written(store: Store, tmp_path: Path) -> None:
    plan = make(Request("headline", dataset="nuclei"), tmp_path)
    with pytest.raises(UserError, match="mpformer data prepare nuclei SRC"):
        launch(plan, store)
    assert not store.root.exists()


def test_a_store_that_cannot_be_written_is_a_clear_error(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):  # a line of the command's: test_unwritable.py
        launch(plan, Store(tmp_path / "file"))


def test_inline_executes_one_run_in_this_process(plan: Plan, store: Store, counter: Make) -> None:
    with pytest.raises(UserError, match="executes one run, this is 4"):
        local.inline(plan, store, runner=counter())
    single = replace(plan, runs=plan.runs[:1])
    assert local.inline(single, store, runner=counter()).outcome == "done"


def test_the_width_fits_cores_memory_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: [])
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(machine, "available_gib", lambda: 9.0)
    assert machine.fit(None, 100) == Width(3, 1)
    assert machine.fit(None, 2) == Width(2, 1)
    monkeypatch.setattr(machine, "available_gib", lambda: 0.5)
    assert machine.fit(None, 100) == Width(1, 1)
    assert machine.fit(Width(50, 4), 5) == Width(5, 4)


def test_a_waiting_run_can_be_cancelled_before_it_begins(plan: Plan, store: Store, counter: Make) -> None:
    started = launch(plan, store, width=Width(1, 1), runner=counter(seconds=0.1))
    last = store.run(plan.runs[-1].run_id)
    write_json(last.cancel_file, {})
    _follow(plan, store, started)
    assert [state.label for state in choosing.snapshot(plan, store)] == ["DONE", "DONE", "DONE", "CANCELLED"]
    assert not last.attempts()
    again = launch(plan, store, width=Width(1, 1), runner=counter())
    assert [run.run_id for run in again.started] == [last.run_id]
    _follow(plan, store, again)
    assert _states(plan, store) == {"DONE"}


class _Unpicklable:
    """Cannot be loaded by a worker."""

    def __reduce__(self) -> Any:
        return (int, ("not a number",))


def test_a_worker_that_cannot_begin_says_why(plan: Plan, store: Store) -> None:
    started = launch(plan, store, width=Width(1, 1), runner=_Unpicklable())  # type: ignore[arg-type]
    _follow(plan, store, started)
    assert "invalid literal for int" in " ".join(started.problems())
    assert _states(plan, store) == {"PLANNED"}
