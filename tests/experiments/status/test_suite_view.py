"""The other commands: cancel, logs, reevaluate, prune, import-runs, and who is told when a suite ends or stalls."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from experiments.execution import attempt
from experiments.execution.attempt import Options, run_attempt
from experiments.launch import begin, choosing
from experiments.runs import cancelling, importing, pruning, reevaluating
from experiments.status import logs, notify, standing
from experiments.status.states import State
from experiments.store import claims
from experiments.store.attempt_dir import Progress
from experiments.store.files import read_json, write_json
from experiments.store.run_dir import RunDir, Store
from experiments.suites.planning import Plan
from mpformer.runtime.errors import UserError

Make = Callable[..., Any]


def execute(plan: Plan, store: Store, options: Options, runner: Any, count: int = 1) -> list[RunDir]:
    """Plan all, train and evaluate some."""
    begin.record(plan, store, "")
    chosen = [store.run(run.run_id) for run in plan.unique[:count]]
    for run in chosen:
        assert run_attempt(store.root, run.run_id, "all", options, runner).outcome == "done"
    return chosen


# reevaluate


def test_reevaluate_scores_again_without_training_and_keeps_the_earlier_result(
    plan: Plan, store: Store, options: Options, counter: Make, setting: Callable[[RunDir], str]
) -> None:
    (run,) = execute(plan, store, options, counter())
    weights = read_json(run.path / "trained.json")["weights_sha256"]
    (one,) = reevaluating.chosen([run], [], {})
    reevaluating.check([one], options.data_root)
    ending = reevaluating.evaluate(one, store, options.data_root, _Scorer())
    assert ending.outcome == "done"
    assert run.result(setting(run)).metrics == {"AP": 99.0}  # type: ignore[union-attr]
    (earlier,) = (run.path / "superseded").glob("*/*/result.json")
    assert read_json(earlier)["metrics"]["AP"] == 12.5
    assert (earlier.parent / "layers.parquet").exists()
    assert read_json(run.path / "trained.json")["weights_sha256"] == weights
    (other,) = reevaluating.chosen([run], [("evaluation.layer_mask_images", 3)], {})
    assert reevaluating.evaluate(other, store, options.data_root, _Scorer()).outcome == "done"
    assert len(list(run.path.glob("evals/*/result.json"))) == 2, "another setting has a directory of its own"
    assert len(list((run.path / "superseded").iterdir())) == 1


@dataclass(frozen=True)
class _Fails:
    """Fails in the middle of scoring, in one of the ways there are."""

    error: BaseException

    def evaluate(self, config: Any, weights: Path, out: Path, data_root: Path, progress: Any) -> dict[str, Any]:
        (out / "layers.parquet").write_text("half of it")
        raise self.error


@pytest.mark.parametrize("error", [UserError("no such data"), KeyboardInterrupt(), MemoryError(), OSError(28, "full")])
def test_reevaluate_that_does_not_succeed_leaves_the_result_in_place(
    plan: Plan, store: Store, options: Options, counter: Make, setting: Callable[[RunDir], str], error: BaseException
) -> None:
    """Issue 12, 5.1: a finished run stays DONE, with its number, whatever becomes of a second scoring."""
    (run,) = execute(plan, store, options, counter())
    place = run.evaluation(setting(run))
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    (one,) = reevaluating.chosen([run], [], {})
    assert reevaluating.evaluate(one, store, options.data_root, _Fails(error)).outcome != "done"  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert not (run.path / "superseded").exists()
    state = standing.look(store, [(run.run_id, setting(run))]).states[run.run_id, setting(run)]
    assert (state.state, state.metrics["AP"]) == (State.DONE, 12.5)


def test_reevaluate_checks_data_and_weights_of_all_runs_first(
    plan: Plan, store: Store, options: Options, counter: Make, tmp_path: Path
) -> None:
    """Issue 12, 5.1: a wrong --data-root or a damaged weights file is one line, before anything is touched."""
    from click.testing import CliRunner

    from experiments.cli.run_commands import reevaluate

    runs = execute(plan, store, options, counter(), 2)
    attempts = [run.attempts() for run in runs]
    wrong = ["--yes", "--root", str(store.root), "--data-root", str(tmp_path / "elsewhere")]
    done = CliRunner().invoke(reevaluate, [*(run.run_id for run in runs), *wrong])
    assert isinstance(done.exception, UserError)
    assert "or name the right --data-root" in str(done.exception)
    (runs[1].path / "checkpoints" / "final.pth").write_text("damaged")
    chosen = reevaluating.chosen(runs, [], {})
    with pytest.raises(UserError, match=r"final.pth is missing or damaged: `mpformer launch` trains"):
        reevaluating.check(chosen, options.data_root)
    assert [run.attempts() for run in runs] == attempts


class _Scorer:
    """Scores, and must not be asked to train."""

    def train(self, *_: Any) -> dict[str, Any]:
        raise AssertionError("reevaluate trained")

    def evaluate(self, config: Any, weights: Path, out: Path, data_root: Path, progress: Any) -> dict[str, Any]:
        return {"iteration": 12, "complete": True, "images": 1, "metrics": {"AP": 99.0}}


def test_reevaluate_refuses_what_would_train(plan: Plan, store: Store, options: Options, counter: Make) -> None:
    run, other = execute(plan, store, options, counter(), 2)
    with pytest.raises(UserError, match="would change what is trained"):
        reevaluating.chosen([run], [("schedule.max_iter", 3)], {})
    (other.path / "trained.json").unlink()
    with pytest.raises(UserError, match="nothing is trained of"):
        reevaluating.chosen([run, other], [], {})
    claim = claims.acquire(run.path / "claims")
    assert claim is not None
    with pytest.raises(UserError, match="being worked on"):
        reevaluating.check(reevaluating.chosen([run], [], {}), options.data_root)


# prune


def test_prune_offers_leavings_with_reasons_and_removes_nothing_by_itself(
    plan: Plan, store: Store, options: Options, counter: Make
) -> None:
    (run,) = execute(plan, store, options, counter())
    leavings = {
        "checkpoints/iteration_000005.pth": "checkpoint of a run that is done; its final weights stay",
        "voided/1/trained.json": "set aside when the run was declared void and done again",
        "superseded/20260101/x/result.json": "set aside by reevaluate",
        "attempts/1/evaluation/layers.parquet": "an evaluation by reevaluate that did not complete",
        "attempts/1/.reserve": "space reserved by an attempt that died",
    }
    for name in leavings:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("x" * 100)
    before = sorted(store.root.rglob("*"))
    found, kept = pruning.find(store)
    assert sorted(one.reason for one in found) == sorted(leavings.values())
    assert {one.bytes for one in found} == {100}
    assert kept == []
    assert sorted(store.root.rglob("*")) == before
    assert pruning.remove(found, store) == 5
    assert run.result(_eval(run)) is not None
    assert (run.path / "checkpoints" / "final.pth").exists()
    assert pruning.find(store)[0] == []


def _eval(run: RunDir) -> str:
    return next(path.parent.name for path in (run.path / "evals").glob("*/result.json"))


def test_prune_never_offers_a_run_because_no_suite_names_it(
    plan: Plan, store: Store, options: Options, counter: Make
) -> None:
    run, other = execute(plan, store, options, counter(), 2)
    shutil.rmtree(store.root / "suites")
    assert pruning.find(store)[0] == []
    (leaving,), _ = pruning.find(store, [run])
    assert (leaving.path, leaving.reason) == (run.path, "you named it")
    claim = claims.acquire(run.path / "claims")
    assert claim is not None
    found, kept = pruning.find(store, [run])
    assert found == []
    assert "kept: something works on it" in kept[0]
    assert pruning.remove([leaving], store) == 0, "somebody began to use it between the two looks"
    claim.release()
    assert pruning.remove([leaving], store) == 1
    assert [left.run_id for left in store.runs() if left.trained()] == [other.run_id]


def test_prune_keeps_code_and_smoke_runs_of_launches_that_are_not_over(store: Store) -> None:
    old = time.time() - 2 * pruning.OLD
    for name in ("new", "old"):
        write_json(store.launches / name / "launch.json", {"runs": [], "code": str(store.root / "code" / name)})
        (store.launches / name / "smoke" / "runs" / "r").mkdir(parents=True)
        (store.root / "code" / name).mkdir(parents=True)
    _age(store.root / "code" / "new", old)
    _age(store.root / "code" / "old", old)
    _age(store.launches / "old" / "launch.json", old)
    assert {one.path.relative_to(store.root).as_posix() for one in pruning.find(store)[0]} == {
        "launches/old/smoke/runs",
        "code/old",
    }


def _age(path: Path, at: float) -> None:
    import os

    os.utime(path, (at, at))


# import-runs


@pytest.fixture
def other(plan: Plan, tmp_path: Path, options: Options, counter: Make) -> Store:
    """Another store with two finished runs and two that were only planned."""
    found = Store(tmp_path / "other")
    execute(plan, found, options, counter(), 2)
    return found


def _what(store: Store, other: Store, dry_run: bool = False) -> list[str]:
    return [one.what for one in importing.import_runs(store, other, dry_run)]


def test_runs_are_imported_once_whole_and_only_if_sound(plan: Plan, store: Store, other: Store) -> None:
    ids = [run.run_id for run in plan.unique]
    assert sorted(_what(store, other, dry_run=True)) == ["refused", "refused", "would import", "would import"]
    assert not (store.root / "runs").exists()
    reasons = {one.run_id: (one.what, one.reason) for one in importing.import_runs(store, other)}
    assert [reasons[name][0] for name in ids] == ["imported", "imported", "refused", "refused"]
    assert reasons[ids[2]][1] == "it is not trained to the end"
    mine, theirs = store.run(ids[0]), other.run(ids[0])
    names = {str(path.relative_to(theirs.path)) for path in theirs.path.rglob("*") if path.is_file()}
    assert {str(path.relative_to(mine.path)) for path in mine.path.rglob("*") if path.is_file()} == names
    assert {state.label for state in choosing.snapshot(plan, store)} == {"DONE", "PLANNED"}
    assert sorted(_what(store, other)) == ["kept", "kept", "refused", "refused"]
    assert [path.name for path in (store.root / "runs").iterdir() if path.name.startswith(".")] == []


def test_what_is_here_is_never_overwritten(plan: Plan, store: Store, other: Store) -> None:
    run = store.run(plan.unique[0].run_id)
    run.create(plan.unique[0].config, "mine")
    write_json(run.attempt(1).path / "stage.json", {"outcome": "failed", "failure_class": "nan"})
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    found = {one.run_id: one for one in importing.import_runs(store, other)}
    assert found[run.run_id].what == "kept"
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_run_that_is_only_planned_here_is_filled_in(
    plan: Plan, store: Store, other: Store, options: Options, counter: Make
) -> None:
    begin.record(plan, store, "")
    record = (store.run(plan.unique[0].run_id).path / "run.json").read_bytes()
    assert _what(store, other).count("imported") == 2
    run = store.run(plan.unique[0].run_id)
    assert (run.path / "run.json").read_bytes() == record
    assert run.result(_eval(run)) is not None
    assert claims.holder(run.path / "claims") is None
    assert run.attempts() == [1]
    write_json(run.void_file, {"reason": "again"})
    assert run_attempt(store.root, run.run_id, "all", options, counter()).attempt == 2


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: (run.path / "checkpoints" / "final.pth").write_text("other"), "do not match their checksum"),
        (lambda run: (run.path / "checkpoints" / "final.pth").unlink(), "weights are missing"),
        (lambda run: write_json(run.path / "evals" / _eval(run) / "result.json", {"AP": 1}), "is damaged"),
        (lambda run: write_json(run.void_file, {"reason": "bug"}), "it is void: bug"),
        (lambda run: _edit(run, lambda record: record["config"]["schedule"].update(base_lr=1.0)), "configuration is"),
        (lambda run: _edit(run, lambda record: record.update(scheme=0)), "identity scheme 0"),
    ],
)
def test_a_run_that_is_not_what_it_says_is_refused(
    plan: Plan, store: Store, other: Store, damage: Callable[[RunDir], Any], reason: str
) -> None:
    run = other.run(plan.unique[0].run_id)
    damage(run)
    found = {one.run_id: one for one in importing.import_runs(store, other)}[run.run_id]
    assert found.what == "refused"
    assert reason in found.reason
    assert not store.run(run.run_id).path.exists()


def _edit(run: RunDir, change: Callable[[dict[str, Any]], Any]) -> None:
    record = read_json(run.path / "run.json")
    change(record)
    write_json(run.path / "run.json", record)


def test_a_store_that_is_none_is_one_line(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run store"):
        importing.import_runs(store, Store(tmp_path / "nothing"))


# notify


@pytest.fixture
def launched(plan: Plan, store: Store, tmp_path: Path) -> Callable[[str], Path]:
    """A launch of the plan whose profile has something to tell."""
    begin.record(plan, store, "")

    def launch(target: str) -> Path:
        about = {"suite": "headline", "scale": "mini", "dataset": "shapes", "notify": target}
        write_json(store.launches / "l" / "launch.json", {**about, "runs": [run.run_id for run in plan.unique]})
        return store.launches / "l"

    return launch


def _standing(plan: Plan, store: Store) -> standing.Standing:
    return standing.look(store, [(run.run_id, run.eval_id) for run in plan.unique])


def test_a_command_is_told_of_the_end_once_and_no_shell_reads_it(
    plan: Plan, store: Store, tmp_path: Path, launched: Callable[[str], Path]
) -> None:
    out, hit = tmp_path / "told $(touch x); it's", tmp_path / "hit"
    script = tmp_path / "tell"
    script.write_text('#!/bin/sh\n{ cat; echo; echo "$MPFORMER_TEXT"; } >> "$1"\n')
    script.chmod(0o755)
    launched(f'{script} "{out}" ; touch {hit}')
    assert notify.check(store, _standing(plan, store)) == []
    assert notify.check(store, _standing(plan, store)) == []
    message, text = out.read_text().splitlines()
    assert json.loads(message)["event"] == "ended"
    assert json.loads(message)["counts"] == {"PLANNED": 4}
    assert text == "mpformer: headline@mini on shapes has ended: 4 PLANNED"
    assert not hit.exists(), "; is an argument like any other"


def test_nothing_is_told_while_something_works(plan: Plan, store: Store, launched: Callable[[str], Path]) -> None:
    directory = launched("/bin/false")
    claim = claims.acquire(store.run(plan.unique[0].run_id).path / "claims")
    assert claim is not None
    assert notify.check(store, _standing(plan, store)) == []
    assert not (directory / "told").exists()


def test_a_telling_that_failed_is_said_and_tried_again(
    plan: Plan, store: Store, launched: Callable[[str], Path]
) -> None:
    launched("/bin/sh -c 'echo no network >&2; exit 3'")
    for _ in range(2):
        (line,) = notify.check(store, _standing(plan, store))
        assert line == "headline has ended, but its profile's notify failed: no network"


def test_held_jobs_and_silent_runs_are_a_stall(
    plan: Plan, store: Store, tmp_path: Path, launched: Callable[[str], Path]
) -> None:
    directory = launched("/bin/true")
    found = _standing(plan, store)
    held = {
        key: replace(state, state=State.QUEUED, detail="held (JobHeldUser): scontrol release 1_0", live=True)
        for key, state in found.states.items()
    }
    assert notify.check(store, standing.Standing(held)) == []
    (told,) = (directory / "told").iterdir()
    assert told.name.startswith("stalled-")
    notify.check(store, standing.Standing(held))
    assert len(list((directory / "told").iterdir())) == 1
    waiting = {key: replace(state, detail="Priority") for key, state in held.items()}
    silent = {
        key: replace(
            state, state=State.RUNNING, detail="train", progress=Progress(time=time.time() - 2 * notify.STALLED)
        )
        for key, state in held.items()
    }
    notify.check(store, standing.Standing(waiting))
    assert len(list((directory / "told").iterdir())) == 1
    notify.check(store, standing.Standing(silent))
    assert len(list((directory / "told").iterdir())) == 2


class _Hook(BaseHTTPRequestHandler):
    received: list[Any] = []  # noqa: RUF012

    def do_POST(self) -> None:
        self.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def webhook() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook"
    server.shutdown()
    server.server_close()


def test_a_webhook_gets_the_event(
    plan: Plan, store: Store, webhook: str, launched: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    launched(webhook)
    assert notify.check(store, _standing(plan, store)) == []
    (message,) = _Hook.received
    assert message["text"].endswith("has ended: 4 PLANNED")
    assert message["suite"] == "headline"


# cancel, logs, usage without Slurm (with it: tests/slurm/test_status_slurm.py)


def test_cancel_writes_the_file_that_workers_look_for(plan: Plan, store: Store) -> None:
    begin.record(plan, store, "")
    states = choosing.snapshot(plan, store)
    done = cancelling.cancel(store, states[:1])
    assert (done.asked, done.jobs, done.trouble) == (1, (), "")
    assert choosing.snapshot(plan, store)[0].state is State.CANCELLED


def test_logs_follow_a_run_through_its_attempts(
    plan: Plan, store: Store, options: Options, counter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin.record(plan, store, "")
    run = store.run(plan.unique[0].run_id)
    with pytest.raises(UserError, match="unknown attempt"):
        list(logs.log(store, run, None, follow=False))
    for number in (1, 2):
        write_json(run.attempt(number).path / "stage.json", {"outcome": "requeued"})
        (run.attempt(number).path / "log.txt").write_text(f"round {number}\n")
    assert list(logs.log(store, run, None, follow=False)) == ["round 2\n"]
    assert list(logs.log(store, run, 1, follow=False)) == ["round 1\n"]
    text: list[str] = []
    claim = claims.Claim(run.path / "claims", 2, "t")
    claim.directory.mkdir()
    assert claims.acquire(claim.directory) is not None
    held = claims.acquire(claim.directory, timeout=0)
    assert held is None, "this process lives"

    def later() -> None:
        time.sleep(0.3)
        whole = run.path / "3"
        write_json(whole / "stage.json", {"outcome": "done"})
        (whole / "log.txt").write_text("round 3\n")
        whole.rename(run.attempt(3).path)
        claims.create(claim.directory / "1.released", "")

    thread = threading.Thread(target=later)
    thread.start()
    text = list(logs.log(store, run, None, follow=True, period=0.05))
    thread.join()
    assert "".join(text) == "round 2\n--- attempt 3 ---\nround 3\n"


def test_commands_about_runs(
    plan: Plan, store: Store, options: Options, counter: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The commands themselves, once each."""
    from click.testing import CliRunner

    from experiments.cli.run_commands import import_runs, prune, reevaluate, void

    (run,) = execute(plan, store, options, counter())
    monkeypatch.setattr(attempt, "Model", _Scorer)
    where = ["--root", str(store.root)]
    (run.path / "checkpoints" / "iteration_000005.pth").write_text("x")
    cli = CliRunner()
    done = cli.invoke(prune, where)
    assert (done.exit_code, "nothing was removed: --yes does that" in done.output) == (0, True)
    assert "checkpoint of a run that is done" in done.output
    assert (run.path / "checkpoints" / "iteration_000005.pth").exists()
    assert "removed 1 of 1" in cli.invoke(prune, ["--yes", *where]).output
    assert isinstance(cli.invoke(prune, ["--yes", "--dry-run", *where]).exception, UserError)
    other = tmp_path / "third"
    done = cli.invoke(import_runs, [str(store.root), "--root", str(other)])
    assert "1 of 4 runs were imported" in done.output
    data = ["--data-root", str(options.data_root)]
    assert cli.invoke(reevaluate, [run.run_id, *where, *data], input="n\n").exit_code == 1
    done = cli.invoke(reevaluate, [run.run_id, "--yes", *where, *data])
    assert (done.exit_code, "done" in done.output) == (0, True)
    assert run.result(_eval(run)).metrics == {"AP": 99.0}  # type: ignore[union-attr]
    done = cli.invoke(reevaluate, ["--suite", "headline", "--yes", *where, *data])
    assert done.exit_code == 0, done.output
    assert isinstance(cli.invoke(reevaluate, where).exception, UserError)
    assert isinstance(cli.invoke(void, [run.run_id, "--reason", " ", *where]).exception, UserError)
