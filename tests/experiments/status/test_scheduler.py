"""What Slurm is asked, how often, and how its answers are put together."""

import getpass
import time
from typing import Any

import pytest

from experiments.status import scheduler, standing
from experiments.status.states import RunState, derive
from experiments.store.journal import BatchRun, Submission, of_launch
from tests.support.fake_slurm import ARRAY, LAUNCH, NAME, FakeSlurm, Submitted


def test_the_snapshot_serves_whoever_does_not_ask(submitted: Submitted, slurm: FakeSlurm) -> None:
    run = submitted.plan.unique[0]
    slurm.queued(0, "PENDING", "Priority")
    submitted.state()
    calls = slurm.calls("squeue")
    state = derive(submitted.store.run(run.run_id), run.eval_id, placements=scheduler.remembered(submitted.store))
    assert (state.label, state.detail) == ("QUEUED", "Priority")
    assert slurm.calls("squeue") == calls
    submitted.attempt(outcome="failed", failure_class="nan", detail="later", ended=time.time() + 1)
    state = derive(submitted.store.run(run.run_id), run.eval_id, placements=scheduler.remembered(submitted.store))
    assert state.label == "FAILED(nan)", "files that are newer than the snapshot come first"


def test_a_live_table_asks_slurm_now_and_then_only(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(0, "PENDING")
    key = [(run.run_id, run.eval_id) for run in submitted.plan.unique]
    for _ in range(4):
        standing.look(submitted.store, key, max_age=60)
    assert slurm.calls("squeue") == 1


def test_of_several_who_watch_one_asks(submitted: Submitted, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process was answered lately counts, unless it is not about every run, or something was submitted."""
    slurm.queued(0, "PENDING", "Priority")
    slurm.queued(1, "RUNNING")
    key = [(run.run_id, run.eval_id) for run in submitted.plan.unique]

    def elsewhere(keys: Any, max_age: float = 60) -> dict[Any, RunState]:
        monkeypatch.setattr(scheduler, "_ANSWERS", {})  # as in another process
        return standing.look(submitted.store, keys, max_age).states

    first = elsewhere(key[:3])
    assert (elsewhere(key[:3]), slurm.calls("squeue")) == (first, 1)
    assert elsewhere(key[:2]) == {one: first[one] for one in key[:2]}
    assert slurm.calls("squeue") == 1
    elsewhere(key)
    assert slurm.calls("squeue") == 2, "it is about a further run"
    elsewhere(key, max_age=0)
    assert slurm.calls("squeue") == 3, "a launch asks by itself"
    later = Submission("20260101-000001-later1", 0, "all", "headline.later.0", (BatchRun(*key[0]),), "a100", "lab", 0.0)
    of_launch(submitted.store, later.launch).submitting(later)
    elsewhere(key)
    assert slurm.calls("squeue") == 4, "something was submitted since"


def test_slurm_is_asked_about_the_jobs_of_those_who_launched_and_nobody_elses(
    submitted: Submitted, slurm: FakeSlurm
) -> None:
    """For one user the controller itself leaves out the others' jobs; its configuration is asked for once."""
    for _ in range(3):
        submitted.state()
    calls = (slurm.folder / "squeue.calls").read_text().splitlines()
    assert len(calls) == 3
    assert all(f"-u {getpass.getuser()} " in call and "--name" not in call for call in calls), calls
    assert slurm.calls("scontrol") == 1


def test_rounds_of_a_requeued_job_add_up(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.accounted(0, "PREEMPTED", elapsed=100, rss="2048K")
    slurm.accounted(0, "COMPLETED", elapsed=50, rss="1.5G")
    (job,) = scheduler.ask([_submission()]).jobs
    assert (job.state, job.elapsed, job.max_rss, job.gpus, job.cpus) == ("COMPLETED", 150, int(1.5 * 2**30), 2, 4)
    slurm.queued(0, "COMPLETED")
    (job,) = scheduler.ask([_submission()]).jobs
    assert (job.elapsed, job.source) == (150, "squeue")


def _submission() -> Submission:
    return Submission(LAUNCH, 0, "all", NAME, (), "a100", "lab", 0.0, ARRAY)
