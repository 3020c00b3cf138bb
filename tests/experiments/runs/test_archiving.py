"""archive: a finished run is one file, read as before; nothing is lost on the way there or back."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.execution.attempt import Options, run_attempt
from experiments.launch import choosing
from experiments.runs import archiving, importing, pruning
from experiments.store import claims
from experiments.store.identity import eval_id
from experiments.store.run_dir import RunDir, Store
from experiments.suites.planning import Plan
from mpformer.runtime.errors import UserError
from tests.support.executed_runs import execute

Make = Callable[..., Any]


@pytest.fixture
def done(plan: Plan, store: Store, options: Options, counter: Make) -> list[RunDir]:
    """Two finished runs of a suite of which the others are only planned."""
    execute(plan, store, options, counter(), 2)
    return [store.run(run.run_id) for run in plan.unique[:2]]


def contents(run: RunDir) -> dict[str, tuple[bytes, int]]:
    files = (path for path in run.path.rglob("*") if path.is_file())
    return {str(path.relative_to(run.path)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def archive(store: Store, **options: Any) -> list[str]:
    return [one.what for one in archiving.archive(store, store.suite_records(), **options)]


def test_finished_runs_become_one_file_and_come_back_as_they_were(plan: Plan, store: Store, done: list[RunDir]) -> None:
    before = [contents(run) for run in done]
    assert archive(store, dry_run=True) == ["would be archived", "would be archived", "kept", "kept"]
    assert [contents(run) for run in done] == before
    assert archive(store) == ["archived", "archived", "kept", "kept"]
    assert archive(store) == ["kept"] * 4
    names = {path.name for path in (store.root / "runs").iterdir()}
    assert {f"{run.run_id}.zip" for run in done} <= names
    assert not {run.run_id for run in done} & names
    assert [run.run_id for run in store.runs()] == sorted(run.run_id for run in plan.unique)
    assert [one.what for one in archiving.unpack(store, store.suite_records())] == ["unpacked", "unpacked"]
    assert [contents(run) for run in done] == before
    assert not list((store.root / "runs").glob("*.zip"))


def test_an_archived_run_is_done_for_launches_and_taken_up_again_for_another_setting(
    plan: Plan, store: Store, done: list[RunDir], options: Options, counter: Make
) -> None:
    archive(store)
    assert {state.label for state in choosing.snapshot(plan, store)} == {"DONE", "PLANNED"}
    run, planned = done[0], plan.unique[0]
    assert run.record().run_id == run.run_id
    assert run_attempt(store.root, run.run_id, "all", options, counter()).outcome == "skipped"
    assert run.packed, "there was nothing to do"
    other = planned.config.replace({"evaluation.val_images": 3})
    assert run_attempt(store.root, run.run_id, "evaluate", options, counter(), other).outcome == "done"
    assert not run.packed
    assert run.result(planned.eval_id) is not None
    assert run.result(eval_id(other)) is not None


def test_an_archived_run_is_imported_and_never_over_one_that_is_here(
    store: Store, done: list[RunDir], tmp_path: Path
) -> None:
    archive(store)
    ours = Store(tmp_path / "ours")
    assert sorted(one.what for one in importing.import_runs(ours, store)) == ["imported"] * 2 + ["refused"] * 2
    assert all(ours.run(run.run_id).trained() is not None for run in done)
    assert {one.what for one in importing.import_runs(store, ours)} == {"kept"}


def test_whoever_dies_in_between_loses_nothing(
    plan: Plan, store: Store, done: list[RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = contents(done[0])
    for moment in ("rename", "replace"):  # of the directory, after the archive is there; of the archive
        with monkeypatch.context() as patch:
            patch.setattr(Path, moment, dies)
            with pytest.raises(KeyboardInterrupt):
                done[0].pack()
        assert contents(done[0]) == before
        assert not done[0].packed
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            done[0].pack()
    assert done[0].packed
    left = [one for one in (store.root / "runs").iterdir() if one.name.startswith(".")]
    assert len(left) == 1
    monkeypatch.setattr(pruning, "OLD", -1.0)
    assert left[0] in [one.path for one in pruning.find(store)[0]]
    done[0].unpack()
    assert contents(done[0]) == before


def test_a_run_that_somebody_works_on_or_a_full_disk_keeps_it(
    store: Store, done: list[RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    claim = claims.acquire(done[0].claims)
    assert claim is not None
    with monkeypatch.context() as patch:
        patch.setattr("experiments.store.archive._write", full)
        with pytest.raises(UserError, match=r"cannot archive .*No space left.*nothing of it is lost"):
            archive(store)
    assert not done[1].packed
    assert archive(store)[:2] == ["kept", "archived"]


def test_a_damaged_archive_is_one_line(plan: Plan, store: Store, done: list[RunDir]) -> None:
    archive(store)
    done[0].archive.write_bytes(done[0].archive.read_bytes()[:200])
    states = {state.run_id: state for state in choosing.snapshot(plan, store)}
    assert (states[done[0].run_id].state, states[done[1].run_id].state) == ("UNKNOWN", "DONE")
    assert "take its archive from a backup" in states[done[0].run_id].detail
    with pytest.raises(UserError, match="is damaged"):
        archiving.unpack(store, store.suite_records())
    assert store.reading(done[0].run_id) == done[0]
