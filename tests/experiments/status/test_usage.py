"""What runs used: by accounting, one file a launch; by their own counters where there is none."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.execution.attempt import Options
from experiments.launch import begin
from experiments.runs import importing
from experiments.status import scheduler, usage
from experiments.status.scheduler import Job
from experiments.store.files import read_json, write_json
from experiments.store.journal import BatchRun, Submission, of_launch
from experiments.store.run_dir import Store
from experiments.store.usage import FILE
from experiments.suites.planning import Plan

Make = Callable[..., Any]
LAUNCH, NAME = "20260101-120000-abcdef", "headline.20260101-120000-abcdef.0"


@pytest.fixture
def accounts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What accounting knows, whether there is accounting, and how often it was asked."""
    said: dict[str, Any] = {"jobs": [], "accounting": True, "asked": 0}

    def accounted(submissions: Sequence[Submission]) -> tuple[tuple[Job, ...], bool | None]:
        said["asked"] += 1
        return tuple(said["jobs"]), said["accounting"]

    monkeypatch.setattr(scheduler, "accounted", accounted)
    return said


def _submitted(plan: Plan, store: Store) -> list[str]:
    begin.record(plan, store, "")
    runs = tuple(BatchRun(run.run_id, run.eval_id) for run in plan.unique)
    book = of_launch(store, LAUNCH)
    book.submitting(Submission(0, "all", NAME, runs, 0.0, "a100", "lab"))
    book.submitted(0, "1234")
    return [run.run_id for run in runs]


def _job(index: int, state: str = "COMPLETED") -> Job:
    return Job(f"1234_{index}", state, NAME, str(1235 + index), elapsed=50.0, gpus=2, max_rss=2**31, source="sacct")


def test_a_launch_has_one_file_and_nothing_is_asked_for_twice(
    plan: Plan, store: Store, accounts: dict[str, Any]
) -> None:
    run_ids = _submitted(plan, store)
    accounts["jobs"] = [_job(0), _job(1), _job(2, "RUNNING")]
    usage.settle(store, run_ids)
    path = store.launches / LAUNCH / FILE
    assert list(read_json(path)["jobs"]) == ["0/0", "0/1"], "what still runs, and what is not known yet, is left open"
    assert not any((store.run(run_id).path / FILE).exists() for run_id in run_ids)
    used = usage.used_by(store.run(run_ids[1]))
    assert used is not None
    assert used.text() == "0 h 1 min in 0 attempts, 0.03 GPU-hours, peak memory 2.00 GiB (sacct)"
    assert usage.used_by(store.run(run_ids[2])) is None
    usage.settle(store, run_ids[:2])
    assert accounts["asked"] == 1
    accounts["jobs"] = [_job(2), _job(3)]
    usage.settle(store, run_ids)
    assert list(read_json(path)["jobs"]) == ["0/0", "0/1", "0/2", "0/3"]
    assert usage.used_by(store.run(run_ids[2])) is not None
    usage.settle(store, run_ids)
    assert accounts["asked"] == 2


@pytest.mark.parametrize("accounting", [False, None])
def test_without_accounting_no_use_is_invented(
    plan: Plan, store: Store, accounts: dict[str, Any], accounting: bool | None
) -> None:
    run_ids = _submitted(plan, store)
    accounts["accounting"] = accounting
    usage.settle(store, run_ids)
    usage.settle(store, run_ids)
    assert accounts["asked"] == (1 if accounting is False else 2), "one that does not answer is asked again"
    assert usage.used_by(store.run(run_ids[0])) is None


def test_what_accounting_forgot_is_not_asked_for_for_ever(
    plan: Plan, store: Store, accounts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ids = _submitted(plan, store)
    later = time.time() + 2 * usage.FORGOTTEN
    monkeypatch.setattr(time, "time", lambda: later)
    usage.settle(store, run_ids)
    usage.settle(store, run_ids)
    assert accounts["asked"] == 1


def test_a_copy_of_a_run_has_its_part_of_the_launch(
    plan: Plan, store: Store, accounts: dict[str, Any], tmp_path: Path
) -> None:
    run_ids = _submitted(plan, store)
    accounts["jobs"] = [_job(0)]
    usage.settle(store, run_ids)
    there = Store(tmp_path / "elsewhere").run(run_ids[0])
    importing._copy(store.run(run_ids[0]), there.path)
    assert usage.used_by(there) == usage.used_by(store.run(run_ids[0]))
    assert list(read_json(there.path / FILE)["jobs"]) == ["1234_0"]


def test_own_counters_tell_what_a_run_used(plan: Plan, store: Store, options: Options, counter: Make) -> None:
    begin.record(plan, store, "")
    run = store.run(plan.unique[0].run_id)
    assert usage.used_by(run) is None
    write_json(run.attempt(1).path / "stage.json", {"started": 1000.0, "ended": None, "outcome": None})
    write_json(run.attempt(1).path / "progress.json", {"time": 1060.0})
    write_json(run.attempt(2).path / "stage.json", {"started": 2000.0, "ended": 2540.0, "outcome": "done"})
    used = usage.used_by(run)
    assert used is not None
    assert (used.attempts, used.seconds, used.gpu_seconds, used.source) == (2, 600.0, 0, "own counters")
    trained = {"weights_sha256": "0", "device": "cuda:0", "world_size": 4, "peak_memory_bytes": 2**30}
    write_json(run.path / "trained.json", trained)
    used = usage.used_by(run)
    assert used is not None
    assert used.gpu_seconds == 2400.0
    assert used.text() == "0 h 10 min in 2 attempts, 0.67 GPU-hours, peak memory 1.00 GiB (own counters)"


def test_accounted_jobs_count_instead_of_their_attempts(plan: Plan, store: Store) -> None:
    begin.record(plan, store, "")
    run = store.run(plan.unique[0].run_id)
    about = {"started": 0.0, "ended": 100.0, "outcome": "done"}
    write_json(run.attempt(1).path / "stage.json", {**about, "execution": {"job_id": "7", "array_id": "5_0"}})
    write_json(run.attempt(2).path / "stage.json", about)
    job = {"elapsed": 300.0, "gpus": 2, "max_rss": 2**31, "raw_id": "7"}
    write_json(run.path / FILE, {"schema": 1, "jobs": {"5_0": job}})
    used = usage.used_by(run)
    assert used is not None
    assert (used.seconds, used.gpu_seconds, used.peak_bytes) == (400.0, 600.0, 2**31)
    assert used.source == "sacct and own counters"
