"""archive: a finished run is one file, read as before; nothing is lost on the way there or back."""

import hashlib
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from analysis import layer_table
from experiments.cli.main import cli
from experiments.execution.attempt import Options, run_attempt
from experiments.launch import begin, choosing
from experiments.runs import archiving, exporting, importing, pruning, reevaluating, visualizing
from experiments.store import archive as packing
from experiments.store import claims
from experiments.store.archive import Keeping
from experiments.store.identity import eval_id
from experiments.store.run_dir import RunDir, Store
from experiments.suites.planning import Plan, PlannedRun
from mpformer.runtime.errors import UserError
from tests.support.executed_runs import eval_id_of, execute

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


@pytest.fixture
def heavy(done: list[RunDir]) -> list[RunDir]:
    """The finished runs with files of every kind that an evaluation leaves."""
    for run in done:
        folder = run.evaluation(eval_id_of(run))
        (folder / "layer_masks").mkdir()
        (folder / "layer_masks" / "1.png").write_bytes(b"a photograph")
        (folder / "layer_masks" / "1.json").write_text("{}")
        (folder / "per_image.parquet").write_bytes(b"a table")
        layer_table.write(table(), folder / "layers.parquet")
    return done


def table() -> layer_table.LayerTable:
    """Two layers of 200 objects, with what does not exist in some."""
    generator = np.random.default_rng(0)
    columns: dict[str, np.ndarray] = {name: np.zeros(400, dtype) for name, dtype in layer_table.COLUMNS.items()}
    columns |= {name: generator.random(400).astype(np.float32) for name in ("iou_previous", "iou_gt", "score")}
    columns["iou_previous"][:200] = np.nan
    columns["layer"] = np.repeat([0, 1], 200).astype(np.int16)
    columns["object"] = np.tile(np.arange(200, dtype=np.int32), 2)
    return layer_table.LayerTable(columns, 2, 10)


def test_a_light_archive_names_what_it_lacks_and_reads_as_before(plan: Plan, store: Store, heavy: list[RunDir]) -> None:
    run, setting = heavy[0], eval_id_of(heavy[0])
    before = {name: content for name, (content, _) in contents(run).items()}
    result, folder = run.result(setting), f"evals/{setting}"
    assert archive(store, keeping=Keeping.LIGHT) == ["archived", "archived", "kept", "kept"]
    about = packing.manifest(run.archive)
    lacks = {"checkpoints/final.pth", "checkpoints/state.json"} | {
        f"{folder}/{name}" for name in ("per_image.parquet", "layer_masks/1.png", "layer_masks/1.json")
    }
    assert about.left_out == {
        name: packing.LeftOut(hashlib.sha256(before[name]).hexdigest(), len(before[name])) for name in lacks
    }
    assert about.changed.keys() == before.keys() - lacks
    assert list(about.rewritten) == [f"{folder}/layers.parquet"]
    assert run.result(setting) == result
    assert {state.label for state in choosing.snapshot(plan, store)} == {"DONE", "PLANNED"}
    read = store.reading(run.run_id).path
    assert {name: (read / name).read_bytes() for name in about.changed if name not in about.rewritten} == {
        name: before[name] for name in about.changed if name not in about.rewritten
    }
    again = layer_table.read(read / folder / "layers.parquet")
    for name, values in table().columns.items():
        np.testing.assert_array_equal(again[name], values)


def test_what_needs_what_was_left_out_says_so_in_one_line(
    plan: Plan, store: Store, heavy: list[RunDir], options: Options, counter: Make, tmp_path: Path
) -> None:
    archive(store, keeping=Keeping.LIGHT)
    run, before = heavy[0], heavy[0].archive.read_bytes()
    lacking = pytest.raises(UserError, match=r"archived without its .*train it again")
    with lacking:
        visualizing.newest_evaluation(store.reading(run.run_id))
    with pytest.raises(UserError, match="its weights are not there: use the store that it was archived from"):
        exporting.export(run, "mask2former", tmp_path / "model.pth")
    with lacking:
        reevaluating.check([reevaluating.Evaluation(run, run.config())], options.data_root)
    (unpacked, *_) = archiving.unpack(store, store.suite_records())
    assert (unpacked.what, unpacked.reason) == ("kept", "it was archived without its weights and stays an archive")
    other = replace(plan, runs=tuple(rescored(one) for one in plan.runs))
    needed = "and 1 more runs were archived without weights, which evaluating needs"
    with pytest.raises(UserError, match=needed), begin.begin(other, store):
        pass
    assert run.archive.read_bytes() == before
    assert not run.path.exists()


def rescored(run: PlannedRun) -> PlannedRun:
    config = run.config.replace({"evaluation.val_images": 3})
    return replace(run, config=config, eval_id=eval_id(config))


def test_nothing_is_removed_without_a_yes(store: Store, done: list[RunDir]) -> None:
    words = ["archive", "headline", "--light", "--root", str(store.root)]
    with pytest.raises(UserError, match="say --yes, or archive into another store with --out"):
        CliRunner().invoke(cli, words, standalone_mode=False, catch_exceptions=False)
    assert not any(run.packed for run in done)
    said = CliRunner().invoke(cli, [*words, "--yes", "--seeds", "1"], catch_exceptions=False).output
    assert said.splitlines()[-1].endswith("of 2 runs")
    assert [run.packed for run in done] == [run.sound_record().seed == 1 for run in done]  # type: ignore[union-attr]


def test_archives_go_into_another_store_which_is_then_readable(
    plan: Plan, store: Store, heavy: list[RunDir], options: Options, counter: Make, tmp_path: Path
) -> None:
    other, suites = Store(tmp_path / "kept"), store.suite_records()
    before = [contents(run) for run in heavy]
    failing = store.run(plan.unique[2].run_id)
    fails = counter(fail={failing.run_id: "nan"})
    assert run_attempt(store.root, failing.run_id, "all", options, fails).outcome == "failed"

    def into(**more: Any) -> dict[str, str]:
        return {one.run_id: one.what for one in archiving.archive_into(other, store, suites, **more)}

    first, second = (run.run_id for run in heavy)
    seed = [run.seed for run in plan.unique if run.run_id == first]
    assert into(keeping=Keeping.NO_IMAGES, seeds=seed) == {first: "archived", failing.run_id: "archived"}
    made = {path.name: path.read_bytes() for path in (other.root / "runs").iterdir()}
    found = into(keeping=Keeping.LIGHT)
    assert (found[first], found[second], found[failing.run_id]) == ("kept", "archived", "kept")
    assert {path.name: path.read_bytes() for path in (other.root / "runs").iterdir()}.items() >= made.items()
    assert [contents(run) for run in heavy] == before, "here everything stays as it was"
    assert set(into(keeping=Keeping.LIGHT).values()) == {"kept"}
    with zipfile.ZipFile(other.run(first).archive) as packed:
        names = packed.namelist()
    assert not [name for name in names if name.endswith(".png")]
    assert {Path(name).name for name in names} >= {"final.pth", "1.json", "per_image.parquet"}
    assert [replace(one, data_root="") for one in suites] == other.suite_records()
    states = {state.run_id: state.label for state in choosing.snapshot(plan, other)}
    assert (states[first], states[second], states[failing.run_id]) == ("DONE", "DONE", "FAILED(nan)")
    assert run_attempt(store.root, failing.run_id, "all", options, counter()).outcome == "done"
    assert into(keeping=Keeping.LIGHT)[failing.run_id] == "archived"
    assert {state.label for state in choosing.snapshot(plan, other)} == {"DONE", "PLANNED"}
