"""import-runs: finished runs of another store come over once, whole, and only if they are sound."""

import errno
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.execution.attempt import Options, run_attempt
from experiments.launch import begin, choosing
from experiments.runs import archiving, importing
from experiments.store import claims
from experiments.store.archive import Keeping
from experiments.store.files import read_json, write_json
from experiments.store.run_dir import RunDir, Store
from experiments.suites.planning import Plan
from mpformer.runtime.errors import UserError
from tests.support.executed_runs import eval_id_of, execute

Make = Callable[..., Any]


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


def test_a_full_disk_is_one_line_that_names_where_it_is_full(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 12, 5.10: a copy's own error names the file that was read."""

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(UserError, match="No space left on device; free some space there and import again") as error:
        importing.import_runs(store, other)
    assert str(error.value).startswith(f"cannot write {store.root / 'runs'}")
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
    assert run.result(eval_id_of(run)) is not None
    assert claims.holder(run.path / "claims") is None
    assert run.attempts() == [1]
    write_json(run.void_file, {"reason": "again"})
    assert run_attempt(store.root, run.run_id, "all", options, counter()).attempt == 2


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: (run.path / "checkpoints" / "final.pth").write_text("other"), "do not match their checksum"),
        (lambda run: (run.path / "checkpoints" / "final.pth").unlink(), "weights are missing"),
        (lambda run: write_json(run.path / "evals" / eval_id_of(run) / "result.json", {"AP": 1}), "is damaged"),
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


@pytest.mark.parametrize("keeping", Keeping)
def test_an_archive_comes_over_as_one(plan: Plan, store: Store, other: Store, keeping: Keeping) -> None:
    suites = other.suite_records()
    archiving.archive(other, suites, keeping=keeping)
    begin.record(plan, store, "")  # planned here, and nothing more
    assert sorted(_what(store, other, dry_run=True)) == ["refused", "refused", "would import", "would import"]
    assert sorted(_what(store, other)) == ["imported", "imported", "refused", "refused"]
    for run in plan.unique[:2]:
        mine, theirs = store.run(run.run_id), other.run(run.run_id)
        assert mine.packed
        assert mine.archive.read_bytes() == theirs.archive.read_bytes()
    assert {state.label for state in choosing.snapshot(plan, store)} == {"DONE", "PLANNED"}
    assert sorted(_what(store, other)) == ["kept", "kept", "refused", "refused"]


@pytest.mark.parametrize("damage", ["a file less", "other weights"])
def test_an_archive_that_is_not_what_its_manifest_says_is_refused(
    plan: Plan, store: Store, other: Store, damage: str
) -> None:
    archiving.archive(other, other.suite_records(), keeping=Keeping.LIGHT)
    run = other.run(plan.unique[0].run_id)
    with zipfile.ZipFile(run.archive) as packed:
        content = {name: packed.read(name) for name in packed.namelist()}
    if damage == "a file less":
        del content["metrics.jsonl"]
    else:
        content["archive.json"] = re.sub(rb'("sha256": ")[0-9a-f]{64}', rb"\g<1>" + b"0" * 64, content["archive.json"])
    with zipfile.ZipFile(run.archive, "w") as packed:
        for name, data in content.items():
            packed.writestr(name, data)
    found = {one.run_id: one for one in importing.import_runs(store, other)}[run.run_id]
    assert found.what == "refused"
    assert ("is damaged" if damage == "a file less" else "do not match their checksum") in found.reason
    assert not store.run(run.run_id).exists()


def _edit(run: RunDir, change: Callable[[dict[str, Any]], Any]) -> None:
    record = read_json(run.path / "run.json")
    change(record)
    write_json(run.path / "run.json", record)


def test_a_store_that_is_none_is_one_line(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run store"):
        importing.import_runs(store, Store(tmp_path / "nothing"))
