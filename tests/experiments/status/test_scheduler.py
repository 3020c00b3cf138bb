"""What Slurm is asked, how often, and how its answers are put together."""

import getpass
import os
import re
import shutil
import time
from dataclasses import replace
from typing import Any

import pytest

from experiments.launch.profiles import SlurmProfile
from experiments.runs import cancelling
from experiments.status import scheduler, standing
from experiments.status.states import RunState, derive
from experiments.store import scheduler_record
from experiments.store.files import write_json
from experiments.store.journal import BatchRun, Submission, of_launch
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan
from tests.support.fake_slurm import ARRAY, LAUNCH, NAME, FakeSlurm, Submitted, submit


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


def test_while_one_process_asks_the_others_take_an_older_answer(submitted: Submitted, slurm: FakeSlurm) -> None:
    """Tables that are watched ask at most every fifteen seconds, however many begin to look at the same moment."""
    slurm.queued(0, "PENDING")
    key = [(run.run_id, run.eval_id) for run in submitted.plan.unique]
    book = of_launch(submitted.store, LAUNCH).path
    book.write_text(re.sub(r'"time": [\d.]+', '"time": 1.0', book.read_text()))  # submitted long ago
    standing.look(submitted.store, key, max_age=15)
    scheduler._ANSWERS.clear()  # another process
    then, kept = time.time() - 30, scheduler_record.read(submitted.store)
    aged = {run_id: replace(one, time=then) for run_id, one in kept.jobs.items()}
    scheduler_record.write(submitted.store, replace(kept, time=then, jobs=aged))
    mark = submitted.store.root / ".asking"
    mark.touch()
    standing.look(submitted.store, key, max_age=15)
    assert slurm.calls("squeue") == 1
    os.utime(mark, (0, 0))  # of a process that was killed
    standing.look(submitted.store, key, max_age=15)
    assert slurm.calls("squeue") == 2
    assert not mark.exists()


def test_a_run_that_gets_its_result_while_slurm_is_asked_is_done(
    submitted: Submitted, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a launch at that moment would submit it a second time."""
    real, run = scheduler.placements, submitted.plan.unique[0]

    def asked(*given: Any) -> Any:
        answer = real(*given)
        submitted.attempt(0, outcome="done", ended=time.time())
        content = {"run_id": run.run_id, "eval_id": run.eval_id, "complete": True, "metrics": {"AP": 1.0}}
        write_json(submitted.run(0).evaluation(run.eval_id) / "result.json", content)
        write_json(submitted.run(0).trained_file, {"weights": "w", "weights_sha256": "0"})
        return answer

    slurm.queued(0, "COMPLETED")
    monkeypatch.setattr(scheduler, "placements", asked)
    assert submitted.state(0).label == "DONE"


def test_the_clusters_name_is_asked_once_an_hour_by_whoever_looks(
    submitted: Submitted, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.queued(0, "PENDING", "Priority")
    for _ in range(3):
        monkeypatch.setattr(scheduler, "_CLUSTERS", {})  # another process
        submitted.state()
    assert (slurm.calls("scontrol"), slurm.calls("squeue")) == (1, 3)


def test_another_cluster_is_asked_about_its_own_jobs(plan: Plan, store: Store, slurm: FakeSlurm) -> None:
    submit(plan, store, clusters="gpus")
    slurm.say("squeue", f"CLUSTER: gpus\n{ARRAY}_0|1235|PENDING|Priority|1767268800|N/A||{NAME}\n")
    shutil.copy(slurm.folder / "squeue", slurm.folder / "scancel")
    slurm.say("scancel")
    found = Submitted(plan, store)
    assert found.said() == ("QUEUED", "Priority")
    assert cancelling.cancel(store, [found.state()]).jobs == (f"{ARRAY}_0",)
    for client in ("squeue", "sacct", "scontrol", "scancel"):
        asked = (slurm.folder / f"{client}.calls").read_text().splitlines()
        assert all(line.startswith("--clusters=gpus ") for line in asked), client


def test_the_release_of_another_clusters_held_job_names_the_cluster(plan: Plan, store: Store, slurm: FakeSlurm) -> None:
    submit(plan, store, clusters="gpus")
    slurm.queued(0, "PENDING", "JobHeldUser")
    assert Submitted(plan, store).said()[1] == f"held (JobHeldUser): scontrol --clusters=gpus release {ARRAY}_0"


def test_the_keys_to_change_are_keys_of_a_profile() -> None:
    advised = {*scheduler._HOPELESS.values(), *scheduler._RESOURCES.values(), "sbatch"}
    assert {key for text in advised for key in re.split(", | or ", text)} <= set(SlurmProfile.model_fields)


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
    later = Submission(0, "all", "headline.later.0", (BatchRun(*key[0]),), 0.0, "a100", "lab")
    of_launch(submitted.store, "20260101-000001-later1").submitting(later)
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
    return Submission(0, "all", NAME, (), 0.0, "a100", "lab", job_id=ARRAY)
