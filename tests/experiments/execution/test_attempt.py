import contextlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from experiments.execution.attempt import Options, run_attempt
from experiments.status.states import State, derive, should_start
from experiments.store.attempt_dir import FailureClass
from experiments.store.files import read_json, write_json
from experiments.store.identity import eval_id
from experiments.store.run_dir import RunDir, Store
from mpformer.runtime.errors import UserError
from mpformer.training.checkpoints import cut_back

Make = Callable[..., Any]
Setting = Callable[[RunDir], str]


def _run(store: Store, run: RunDir, options: Options, runner: Any, stage: Any = "all") -> Any:
    return run_attempt(store.root, run.run_id, stage, options, runner)


def test_an_attempt_trains_evaluates_and_leaves_every_file(
    store: Store, one: RunDir, options: Options, counter: Make, setting: Setting
) -> None:
    assert _run(store, one, options, counter()).outcome == "done"
    state = derive(one, setting(one))
    assert (state.state, state.metrics) == (State.DONE, {"AP": 12.5})
    attempt = one.attempt(1).path
    assert read_json(attempt / "stage.json")["outcome"] == "done"
    origin = read_json(attempt / "provenance.json")
    assert {"git", "command", "host", "packages", "threads", "world_size", "job_id"} <= set(origin)
    events = [json.loads(line)["state"] for line in (attempt / "events.jsonl").read_text().splitlines()]
    assert events == ["RUNNING", "TRAINED", "EVALUATING", "DONE"]
    last = json.loads(one.metrics.read_text().splitlines()[-1])
    assert (last["kind"], last["final"], last["metrics"]) == ("evaluation", True, {"AP": 12.5})
    assert not list(one.path.rglob(".*.json.*")), "no temporary file is left"


def test_the_other_processes_of_a_run_help_to_evaluate(
    store: Store,
    one: RunDir,
    options: Options,
    counter: Make,
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 1 of 2 scores its share of a trained run, in the main process' attempt, and leaves the result to it."""
    assert _run(store, one, options, counter(), "train").outcome == "trained"
    asked: list[Path] = []

    class Scoring:
        def evaluate(self, config: Any, weights: Path, out: Path, data_root: Path, progress: Any) -> dict[str, Any]:
            progress({})
            asked.append(out)
            return {}

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("experiments.execution.attempt.own_attempt", lambda run: 1)
    assert _run(store, one, options, Scoring()).outcome == "done"
    assert asked == [one.evaluation(setting(one))]
    assert one.result(setting(one)) is None
    assert _run(store, one, options, counter(), "train").outcome == "skipped"


def test_a_run_that_is_done_is_left_alone(store: Store, one: RunDir, options: Options, counter: Make) -> None:
    _run(store, one, options, counter())
    before = {path: path.stat().st_mtime_ns for path in one.path.rglob("*.json*")}
    assert _run(store, one, options, counter()).outcome == "skipped"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_stages_can_be_executed_apart(
    store: Store, one: RunDir, options: Options, counter: Make, setting: Setting
) -> None:
    assert _run(store, one, options, counter(), "train").outcome == "trained"
    assert derive(one, setting(one)).state is State.TRAINED
    assert _run(store, one, options, counter(), "evaluate").outcome == "done"
    assert derive(one, setting(one)).state is State.DONE


def test_evaluating_what_was_not_trained_fails_with_its_reason(
    store: Store, one: RunDir, options: Options, counter: Make
) -> None:
    ending = _run(store, one, options, counter(), "evaluate")
    assert (ending.outcome, ending.failure_class) == ("failed", "data")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("nan", "nan"),
        ("data", "data"),
        ("oom", "oom"),
        ("enospc", "disk"),
        ("memory", "oom"),
        ("missing-module", "import"),
        ("bug", "error"),
        ("config", "config"),
    ],
)
def test_a_failure_is_marked_with_its_class_and_nothing_is_lost(
    store: Store, one: RunDir, options: Options, counter: Make, setting: Setting, kind: str, expected: str
) -> None:
    ending = _run(store, one, options, counter(fail={"m2f": kind}))
    state = derive(one, setting(one))
    assert (ending.failure_class, state.label) == (expected, f"FAILED({expected})")
    assert should_start(state) is not FailureClass(expected).repeats
    assert expected in (one.attempt(1).path / "log.txt").read_text()
    assert read_json(one.path / "checkpoints" / "state.json")["iteration"] == 5
    assert _run(store, one, options, counter()).outcome == "done", "the next attempt goes on from the checkpoint"
    iterations = [json.loads(line).get("iteration") for line in one.metrics.read_text().splitlines()]
    assert iterations[6:8] == [6, 7]


def test_a_result_that_is_not_finite_is_no_result(
    store: Store, one: RunDir, options: Options, counter: Make, setting: Setting
) -> None:
    ending = _run(store, one, options, counter(metrics={"AP": math.nan}))
    assert ending.failure_class == "nan"
    assert not (one.evaluation(setting(one)) / "result.json").exists()
    assert derive(one, setting(one)).label == "FAILED(nan)"


def test_a_result_that_was_damaged_is_computed_again(
    store: Store, one: RunDir, options: Options, counter: Make, setting: Setting
) -> None:
    _run(store, one, options, counter())
    path = one.evaluation(setting(one)) / "result.json"
    path.write_text(path.read_text()[:40])
    assert derive(one, setting(one)).state is State.TRAINED
    assert _run(store, one, options, counter()).outcome == "done"


def test_damaged_final_weights_are_trained_again(
    store: Store, one: RunDir, options: Options, counter: Make, setting: Setting
) -> None:
    _run(store, one, options, counter(), "train")
    good = (one.path / "checkpoints" / "final.pth").read_text()
    (one.path / "checkpoints" / "final.pth").write_text(good[:10])
    assert _run(store, one, options, counter()).outcome == "done"
    assert (one.path / "checkpoints" / "final.pth").read_text() == good
    assert (one.attempt(2).path / "trained.damaged.json").exists()


def test_a_stop_file_checkpoints_and_ends(
    store: Store, one: RunDir, options: Options, counter: Make, setting: Setting, tmp_path: Path
) -> None:
    stop = tmp_path / "stop.json"
    write_json(stop, {"reason": "interrupted: Ctrl-C"})
    ending = _run(store, one, replace(options, stop_file=stop), counter())
    state = derive(one, setting(one))
    assert (ending.outcome, state.state) == ("interrupted", State.CANCELLED)
    assert "launch again" in state.detail
    assert read_json(one.path / "checkpoints" / "state.json")["iteration"] == 1
    stop.unlink()
    assert _run(store, one, options, counter()).outcome == "done"


def test_a_cancelled_run_ends_as_cancelled(
    store: Store, one: RunDir, options: Options, counter: Make, setting: Setting
) -> None:
    write_json(one.cancel_file, {})
    assert _run(store, one, options, counter()).outcome == "cancelled"
    assert derive(one, setting(one)).state is State.CANCELLED


class _Interrupted:
    """Ctrl-C while nothing looks out for it."""

    def train(self, *_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt


def test_ctrl_c_in_a_debugger_is_no_failure(
    store: Store, one: RunDir, options: Options, counter: Make, setting: Setting
) -> None:
    assert _run(store, one, options, _Interrupted()).outcome == "interrupted"
    assert derive(one, setting(one)).state is State.CANCELLED


def _killed(store: Store, run: RunDir, options: Options, runner: Any) -> None:
    process = multiprocessing.get_context("fork").Process(target=_run, args=(store, run, options, runner))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_attempt_is_lost_and_the_next_one_ends_as_if_nothing_had_happened(
    store: Store, one: RunDir, options: Options, counter: Make, setting: Setting, tmp_path: Path, plan: Any
) -> None:
    _killed(store, one, options, counter(kill_once=tmp_path / "killed"))
    lost = derive(one, setting(one))
    assert (lost.state, lost.failure_class) == (State.LOST, "killed")
    assert _run(store, one, options, counter()).outcome == "done"
    assert read_json(one.attempt(1).path / "stage.json")["outcome"] == "lost"
    undisturbed = Store(tmp_path / "other").run(one.run_id)
    undisturbed.create(plan.runs[0].config, "")
    _run(Store(tmp_path / "other"), undisturbed, options, counter())
    final = Path("checkpoints") / "final.pth"
    assert (one.path / final).read_text() == (undisturbed.path / final).read_text()


def test_sigterm_checkpoints_and_ends(
    store: Store, one: RunDir, options: Options, counter: Make, setting: Setting
) -> None:
    process = multiprocessing.get_context("fork").Process(target=_run, args=(store, one, options, counter(seconds=0.2)))
    process.start()
    end = time.monotonic() + 30
    while not one.metrics.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 0
    assert derive(one, setting(one)).state is State.CANCELLED


def test_a_run_in_other_hands_is_skipped(store: Store, one: RunDir, options: Options, counter: Make) -> None:
    from experiments.store.claims import acquire

    claim = acquire(one.path / "claims")
    assert claim is not None
    assert _run(store, one, options, counter()).outcome == "skipped"
    assert not one.attempts()


class _TakenOver:
    """A trainer whose run another process takes over in the middle."""

    def __init__(self, inner: Any, run: RunDir) -> None:
        self.inner, self.run = inner, run

    def train(self, config: Any, directory: Path, data_root: Path, callbacks: Any) -> dict[str, Any]:
        def log(line: dict[str, Any]) -> None:
            callbacks.log(line)
            if line["iteration"] == 7:
                (self.run.path / "claims" / "2").write_text("{}")

        return self.inner.train(config, directory, data_root, replace(callbacks, log=log))


def test_an_attempt_that_lost_its_claim_writes_no_checkpoint(
    store: Store, one: RunDir, options: Options, counter: Make
) -> None:
    ending = _run(store, one, options, _TakenOver(counter(), one))
    assert ending.failure_class == "claim-lost"
    assert read_json(one.path / "checkpoints" / "state.json")["iteration"] == 5
    assert one.trained() is None


def test_a_void_run_is_done_again_and_what_was_there_is_kept(
    store: Store, one: RunDir, options: Options, counter: Make, setting: Setting
) -> None:
    _run(store, one, options, counter())
    write_json(one.void_file, {"reason": "a bug"})
    state = derive(one, setting(one))
    assert (state.state, state.detail) == (State.VOID, "a bug")
    assert should_start(state)
    assert _run(store, one, options, counter(metrics={"AP": 13.0})).outcome == "done"
    assert derive(one, setting(one)).metrics == {"AP": 13.0}
    kept = one.path / "voided" / "1" / "evals" / setting(one) / "result.json"
    assert read_json(kept)["metrics"] == {"AP": 12.5}


def test_a_damaged_run_record_is_a_clear_error(store: Store, one: RunDir, options: Options, counter: Make) -> None:
    config = one.config()
    (one.path / "run.json").write_text('{"schema": 1, "con')
    with pytest.raises(UserError, match=r"run\.json is damaged .*: launch its suite again"):
        _run(store, one, options, counter())
    one.create(config, "row")
    assert one.config() == config


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield place
    subprocess.run(["umount", str(place)], check=True)


class _Hoarder:
    """A trainer that fills the disk."""

    def train(self, config: Any, directory: Path, data_root: Path, callbacks: Any) -> dict[str, Any]:
        callbacks.log({"kind": "train", "iteration": 1, "loss": 1.0})
        _fill(directory / "big")
        return {}


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)


def test_a_full_disk_is_said_on_the_full_disk(
    small_disk: Path, plan: Any, options: Options, counter: Make, setting: Setting
) -> None:
    store = Store(small_disk)
    run = store.run(plan.runs[0].run_id)
    run.create(plan.runs[0].config, "")
    ending = _run(store, run, options, _Hoarder())
    assert (ending.outcome, ending.failure_class) == ("failed", "disk")
    assert derive(run, setting(run)).label == "FAILED(disk)"
    (run.path / "big").unlink()
    assert _run(store, run, options, counter()).outcome == "done"


@dataclass(frozen=True)
class _Filling:
    """Trains by a counter with long lines of metrics; the disk is full from the seventh on."""

    counter: Any
    full: bool

    def train(self, config: Any, directory: Path, data_root: Path, callbacks: Any) -> dict[str, Any]:
        def log(line: dict[str, Any]) -> None:
            if self.full and line["iteration"] == 7:
                with contextlib.suppress(OSError):
                    _fill(directory / "big")
            callbacks.log(line | {"more": "x" * 700})

        return dict(self.counter.train(config, directory, data_root, replace(callbacks, log=log)))

    def evaluate(self, *arguments: Any) -> dict[str, Any]:
        return dict(self.counter.evaluate(*arguments))


def test_the_curve_is_complete_after_a_full_disk(
    small_disk: Path, plan: Any, options: Options, counter: Make, setting: Setting
) -> None:
    """The line that the disk took in part is taken back, and written anew by the attempt that goes on."""
    store = Store(small_disk)
    run = store.run(plan.runs[0].run_id)
    run.create(plan.runs[0].config, "")
    ending = _run(store, run, options, _Filling(counter(), full=True))
    assert (ending.outcome, ending.failure_class) == ("failed", "disk")
    before = [json.loads(line)["iteration"] for line in run.metrics.read_bytes().splitlines()]
    assert before == list(range(1, len(before) + 1)), "every line is whole"
    assert 5 <= len(before) < 12
    (run.path / "big").unlink()
    cut_back(run.metrics, 5)  # as the trainer does for the checkpoint that it resumes from
    assert _run(store, run, options, _Filling(counter(), full=False)).outcome == "done"
    lines = [json.loads(line) for line in run.metrics.read_bytes().splitlines()]
    assert [line["iteration"] for line in lines] == [*range(1, 13), 12]


def test_a_disk_that_is_full_before_the_attempt_begins(
    small_disk: Path, plan: Any, options: Options, counter: Make
) -> None:
    store = Store(small_disk)
    run = store.run(plan.runs[0].run_id)
    run.create(plan.runs[0].config, "")
    with pytest.raises(OSError, match="No space"):
        _fill(small_disk / "big")
    ending = _run(store, run, options, counter())
    assert (ending.outcome, ending.failure_class) == ("failed", "disk")
    assert "No space" in ending.detail


def test_another_evaluation_setting_scores_the_same_weights_again(
    store: Store, one: RunDir, options: Options, counter: Make, setting: Setting
) -> None:
    _run(store, one, options, counter())
    config = one.config().replace({"evaluation.val_images": 3, "runtime.workers": 1})
    ending = run_attempt(store.root, one.run_id, "all", options, counter(metrics={"AP": 7.0}), config)
    assert ending.outcome == "done"
    assert derive(one, eval_id(config)).metrics == {"AP": 7.0}
    assert derive(one, setting(one)).metrics == {"AP": 12.5}
    assert read_json(one.evaluation(eval_id(config)) / "setting.json")["evaluation"]["val_images"] == 3
    assert read_json(one.attempt(2).path / "provenance.json")["runtime"]["workers"] == 1
    lines = [json.loads(line) for line in one.metrics.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [*range(1, 13), 12, 12], "it was not trained again"


def test_the_configuration_of_another_run_is_refused(
    store: Store, one: RunDir, options: Options, counter: Make
) -> None:
    with pytest.raises(UserError, match="is not the run of this configuration"):
        run_attempt(store.root, one.run_id, "all", options, counter(), one.config().replace({"seed": 5}))
