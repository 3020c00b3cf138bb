"""What submitit and Slurm do to short jobs and after the loss of the controller: the run comes through all the same.

The trainer here counts instead of learning, so that a job starts within a second.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from experiments.slurm import submission
from experiments.slurm.batches import Target
from experiments.status.states import derive
from experiments.store.files import append_json, read_json, write_json
from experiments.store.launches import deaths
from experiments.store.run_dir import RunDir, Store
from experiments.suites.planning import PlannedRun
from mpformer.config.schema import Config
from mpformer.runtime.callbacks import Interrupted, TrainCallbacks
from mpformer.runtime.disk import sha256
from tests.support import chaos, counting_jobs, tiny_jobs
from tests.support.small_runs import Paced
from tests.support.tiny_jobs import client, job, lines, stages, submit, until, until_done

pytestmark = pytest.mark.slurm


@dataclass(frozen=True)
class Stepping:
    """Counts to the number of iterations; the state of iteration i is a checkpoint of its own."""

    seconds: float
    hungry: bool = False
    """Take memory until somebody minds."""

    def train(self, config: Config, directory: Path, data_root: Path, callbacks: TrainCallbacks) -> dict[str, Any]:
        state = directory / "checkpoints" / "state.json"
        taken, process = [], str(os.getpid())
        for iteration in range((read_json(state) or {"iteration": 0})["iteration"] + 1, config.schedule.max_iter + 1):
            append_json(directory / "witness.jsonl", {"process": process, "time": time.time()})
            callbacks.log({"kind": "train", "iteration": iteration, "loss": 1 / iteration, "time": time.time()})
            time.sleep(self.seconds)
            taken.append(b"x" * (50 << 20) if self.hungry else b"")
            reason = callbacks.stop()
            if reason:
                callbacks.confirm()
                write_json(state, {"iteration": iteration})
                raise Interrupted(reason, iteration)
        final = directory / "checkpoints" / "final.pth"
        final.parent.mkdir(exist_ok=True)
        final.write_text("weights")
        about = {"weights": "checkpoints/final.pth", "weights_sha256": sha256(final), "peak_memory_bytes": 1}
        return {"iterations": config.schedule.max_iter, "seconds": 1.0, **about}

    def evaluate(
        self, config: Config, weights: Path, out: Path, data_root: Path, progress: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        return {"iteration": config.schedule.max_iter, "complete": True, "images": 1, "metrics": {"AP": 12.5}}


cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def one(tmp_path: Path) -> tuple[PlannedRun, Store, RunDir]:
    """One planned run of sixty iterations."""
    run = counting_jobs.plan(counting_jobs.data_root(tmp_path), seeds=(0,), schedule__max_iter=60).runs[0]
    store = Store(tmp_path / "store")
    return run, store, tiny_jobs.planned(run, store)


def iterations(directory: RunDir) -> list[int]:
    entries = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    return [entry["iteration"] for entry in entries if entry["kind"] == "train"]


def test_a_short_job_is_warned_more_often_than_submitit_allows(
    devcluster: Callable[..., Any], one: tuple[PlannedRun, Store, RunDir], tmp_path: Path
) -> None:
    """submitit takes each warning of a job of ten minutes or less for a time-out, and ends a job after three."""
    devcluster("--nodes", "1")
    run, store, directory = one

    def trained(count: int) -> bool:
        return lines(directory) >= count

    def requeued(count: int) -> bool:
        return len([s for s in stages(directory) if s.get("outcome") == "requeued"]) == count

    number = submit(job(run, store, tmp_path, runner=Stepping(0.3)), store.root / "jobs", time=5)
    for warning in range(1, 6):
        until(partial(trained, 5 * warning), 120, lambda: tiny_jobs.logs(directory, store.root / "jobs"))
        client("scancel", "--signal=USR2", number)
        until(partial(requeued, warning), 60)
    until_done(directory, run, 120, lambda: tiny_jobs.logs(directory, store.root / "jobs"))
    assert [stage["outcome"] for stage in stages(directory)] == ["requeued"] * 5 + ["done"]
    assert iterations(directory) == list(range(1, 61)), "at the very iteration, each time"


def test_a_job_started_twice_after_the_loss_of_the_controller(
    devcluster: Callable[..., Any], one: tuple[PlannedRun, Store, RunDir], tmp_path: Path
) -> None:
    """Killed before it had saved that the job runs, slurmctld launches it again while it runs."""
    cluster = devcluster("--nodes", "2")
    run, store, directory = one
    submit(job(run, store, tmp_path, runner=Stepping(0.3)), store.root / "jobs")
    until(lambda: lines(directory) >= 1, 60, lambda: tiny_jobs.logs(directory, store.root / "jobs"))
    os.kill(cluster.status()["daemons"]["slurmctld"], signal.SIGKILL)
    until(lambda: cluster.status()["daemons"]["slurmctld"] is None, 20)
    cluster.call("up")
    until(lambda: released(directory, run), 180, lambda: tiny_jobs.logs(directory, store.root / "jobs"))
    assert not chaos.overlapping(directory.path / "witness.jsonl")


def released(directory: RunDir, run: PlannedRun) -> bool:
    """Whether the run is done; a job that Slurm holds (launch failed) is released on the way, as its user would."""
    for line in client("squeue", "-h", "-o", "%i %r", check=False).splitlines():
        if "held" in line.lower():
            client("scontrol", "release", line.split()[0], check=False)
    return directory.result(run.eval_id) is not None


def test_memory_beyond_the_jobs_fails_the_run_as_such(
    devcluster: Callable[..., Any], one: tuple[PlannedRun, Store, RunDir], tmp_path: Path
) -> None:
    """Slurm kills the whole step: the job that follows reads in its log why, and does not try again."""
    devcluster("--nodes", "1", accounting=True)
    run, store, directory = one
    made = job(run, store, tmp_path, runner=Stepping(0.1, hungry=True))
    number = submit(made, store.root / "jobs", mem="500MB")
    until(
        lambda: derive(directory, run.eval_id).label == "FAILED(oom)",
        150,
        lambda: tiny_jobs.logs(directory, store.root / "jobs"),
    )
    until(lambda: tiny_jobs.state(number) == "FAILED", 60, lambda: tiny_jobs.state(number))
    assert re.search("exceeded (job )?memory limit", derive(directory, run.eval_id).detail, re.IGNORECASE)
    assert len(stages(directory)) == 1


def test_a_daemon_that_is_away_when_srun_wants_its_task_ends_no_run(
    devcluster: Callable[..., Any], one: tuple[PlannedRun, Store, RunDir], tmp_path: Path
) -> None:
    """srun's exit code is none of the run's: the job is queued again after a pause, and the start counted apart."""
    cluster = devcluster("--nodes", "1")
    run, store, directory = one
    gate = tmp_path / "gate"
    wait = f'[ "${{SLURM_RESTART_COUNT:-0}}" != 0 ] || until [ -e {gate} ]; do sleep 0.2; done'
    folder = store.root / "jobs"
    number = submit(job(run, store, tmp_path, runner=Stepping(0.05)), folder, before=wait)
    until(lambda: tiny_jobs.state(number) == "RUNNING", 60)
    os.kill(cluster.status()["daemons"]["slurmd-n0"], signal.SIGKILL)
    until(lambda: cluster.status()["daemons"]["slurmd-n0"] is None, 20)
    gate.touch()
    until(lambda: deaths(folder / "deaths.txt"), 120, lambda: tiny_jobs.logs(directory, folder))
    cluster.call("up")
    until_done(directory, run, 240, lambda: tiny_jobs.logs(directory, folder) + client("squeue", "-a"))
    (death,) = deaths(folder / "deaths.txt")
    assert (death.job_id, death.start, death.node) == (number, 0, "n0")
    assert death.exit_code not in (0, 81, 82)
    assert [stage["outcome"] for stage in stages(directory)] == ["done"]


def test_a_watcher_killed_while_the_controller_is_away_ends_no_run(
    devcluster: Callable[..., Any], one: tuple[PlannedRun, Store, RunDir], tmp_path: Path
) -> None:
    cluster = devcluster("--nodes", "1")
    run, store, directory = one
    folder = store.root / "jobs"
    submit(job(run, store, tmp_path, runner=Stepping(0.3)), folder)
    until(lambda: lines(directory) >= 3, 60, lambda: tiny_jobs.logs(directory, folder))
    time.sleep(6)  # the controller saves its state every 5 s
    watcher = tiny_jobs.parent_of(read_json(directory.claims / "1")["pid"])
    os.kill(cluster.status()["daemons"]["slurmctld"], signal.SIGKILL)
    until(lambda: cluster.status()["daemons"]["slurmctld"] is None, 20)
    os.kill(watcher, signal.SIGKILL)
    until(lambda: deaths(folder / "deaths.txt"), 60, lambda: tiny_jobs.logs(directory, folder))
    time.sleep(15)  # the shell asks in vain meanwhile
    cluster.call("up")
    until(lambda: released(directory, run), 240, lambda: tiny_jobs.logs(directory, folder) + client("squeue", "-a"))
    (death,) = deaths(folder / "deaths.txt")
    assert (death.start, death.node, death.exit_code) == (0, "n0", 137)
    assert iterations(directory) == list(range(1, 61)), "from the checkpoint that the attempt left, nothing twice"


APPTAINER = """#!/bin/sh
while [ "$1" != /images/a.sif ]; do shift; done
shift
PATH=/nowhere exec "$@"
"""


def test_a_container_without_slurms_clients_chains_over_time_limits(
    devcluster: Callable[..., Any], tmp_path: Path
) -> None:
    """The batch shell queues the job again from outside. Apptainer is a script that takes the clients away."""
    devcluster("--nodes", "1")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apptainer").write_text(APPTAINER)
    (tmp_path / "bin" / "apptainer").chmod(0o755)
    keys = {"container": "/images/a.sif", "container_runtime": "apptainer", "container_mounts": "/a,/b:/c"}
    made = counting_jobs.profile(**keys, time=1, signal_delay=20, setup=[f"export PATH={tmp_path}/bin:$PATH"])
    data, store = counting_jobs.data_root(tmp_path), Store(tmp_path / "store")
    plan = counting_jobs.plan(data, seeds=(0,), schedule__max_iter=60)
    plan = replace(plan, runs=plan.runs[:1])
    done = submission.launch(plan, store, Target("test", made), runner=Stepping(1.0))
    run, directory = plan.runs[0], store.run(plan.runs[0].run_id)
    folder = done.directory / "jobs" / "0"
    until_done(directory, run, 300, lambda: tiny_jobs.logs(directory, folder) + client("squeue", "-a"))
    *earlier, last = [stage["outcome"] for stage in stages(directory)]
    assert (set(earlier), last) == ({"requeued"}, "done")
    assert iterations(directory) == list(range(1, 61)), "at the very iteration"


def test_what_preemption_cancels_the_last_job_launches_again(devcluster: Callable[..., Any], tmp_path: Path) -> None:
    """A partition with PreemptMode=CANCEL that sends no warning: another launch goes on from the checkpoint."""
    cluster = devcluster("--nodes", "1", accounting=True)
    text = cluster.conf.read_text().replace("SlurmctldParameters=preempt_send_user_signal\n", "")
    cluster.conf.write_text(
        text.replace("PriorityTier=10 GraceTime=30", "PriorityTier=10 GraceTime=20 PreemptMode=CANCEL")
    )
    client("scontrol", "reconfigure")
    plan, store = tiny_jobs.tiny_plan(tmp_path / "data"), Store(tmp_path / "store")
    made = counting_jobs.profile(report=True, resubmit=True, memory="4GB")
    (tmp_path / "site.yaml").write_text(json.dumps(made.model_dump(exclude_unset=True)))
    target = Target(str(tmp_path / "site.yaml"), made)
    first = submission.launch(plan, store, target, runner=Paced(2.0))
    run, directory = plan.runs[0], store.run(plan.runs[0].run_id)
    until(lambda: lines(directory) >= 3, 120, lambda: tiny_jobs.logs(directory, first.directory / "jobs" / "0"))
    client("sbatch", "-p", "high", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5")
    until_done(directory, run, 500, lambda: tiny_jobs.logs(directory) + client("squeue", "-a"))
    interrupted, done = stages(directory)
    assert interrupted["outcome"] == "interrupted"
    assert interrupted["launch"] == first.id != done["launch"]


def test_tasks_do_not_wait_for_a_main_one_that_refuses(
    devcluster: Callable[..., Any], one: tuple[PlannedRun, Store, RunDir], tmp_path: Path
) -> None:
    devcluster("--nodes", "2")
    run, store, directory = one
    write_json(directory.cancel_file, {})
    number = submit(job(run, store, tmp_path, runner=Stepping(0.1)), store.root / "jobs", nodes=2, ntasks_per_node=2)
    until(lambda: tiny_jobs.state(number) == "FAILED", 60, lambda: client("squeue", "-a"))
    assert not directory.attempts()
    assert "cancelled by the user" in (store.root / "jobs" / f"{number}_0_log.out").read_text()
