"""Status against a real Slurm, with and without accounting: what it says of jobs that misled others."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from experiments.launch import begin, choosing
from experiments.runs import cancelling
from experiments.status import notify, standing, usage
from experiments.status.states import RunState, State
from experiments.store.files import write_json
from experiments.store.journal import BatchRun, Submission, of_launch
from experiments.store.run_dir import Store
from experiments.suites import planning
from experiments.suites.planning import Plan, PlannedRun

pytestmark = pytest.mark.slurm

LAUNCH = "20260101-120000-abcdef"
HUNGRY = f"{sys.executable} -c 'import time; x = bytearray(700 << 20); time.sleep(120)'"


def client(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def until(condition: Callable[[], Any], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.5)


@dataclass
class Suite:
    """Runs of a plan whose jobs are shell lines."""

    plan: Plan
    store: Store

    def submit(self, number: int, runs: list[PlannedRun], lines: list[str], *options: str, name: str = "") -> str:
        """Submit an array whose element i executes line i, and journal it."""
        folder = self.store.launches / LAUNCH / "jobs" / str(number)
        folder.mkdir(parents=True)
        cases = "\n".join(f"{index}) {line};;" for index, line in enumerate(lines))
        script = folder / "script.sh"
        script.write_text(f"#!/bin/bash\ncase $SLURM_ARRAY_TASK_ID in\n{cases}\nesac\n")
        job_name = f"suite.{LAUNCH}.{number}"
        batch = tuple(BatchRun(run.run_id, run.eval_id) for run in runs)
        cluster = "dev"
        of_launch(self.store, LAUNCH).submitting(Submission(number, "all", job_name, batch, 0.0, "devcluster", cluster))
        out = ["-o", f"{folder}/%A_%a_0_log.out", "--parsable", f"--array=0-{len(lines) - 1}"]
        job_id = client("sbatch", "-J", name or job_name, *out, "--mem=100", *options, str(script))
        of_launch(self.store, LAUNCH).submitted(number, job_id)
        return job_id

    def state(self, index: int) -> RunState:
        run = self.plan.unique[index]
        return standing.look(self.store, [(run.run_id, run.eval_id)]).states[run.run_id, run.eval_id]

    def labels(self) -> list[str]:
        return [state.label for state in choosing.snapshot(self.plan, self.store)]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    request = planning.Request("headline", seeds=(0, 1, 2, 3), overrides=(("schedule.max_iter", 12),))
    plan, store = planning.make(request, tmp_path), Store(tmp_path / "store")
    begin.record(plan, store, "")
    return Suite(plan, store)


@pytest.mark.parametrize("accounting", [False, True], ids=["no-accounting", "accounting"])
def test_status_is_right_about_jobs_that_end_in_every_way(
    devcluster: Callable[..., Any], accounting: bool, suite: Suite
) -> None:
    cluster = devcluster(accounting=accounting)
    runs = list(suite.plan.unique)
    first = suite.submit(0, runs[:4], ["sleep 600", "echo 'ImportError: nothing'; exit 3", "exit 0", HUNGRY])
    held = suite.submit(1, runs[4:6], ["sleep 600", "sleep 600"], "--hold")
    suite.submit(2, runs[6:7], ["sleep 600"], f"--dependency=afterok:{first}_1")
    # our id, another name: a number used again
    suite.submit(3, runs[7:8], ["sleep 600"], "-o", "/dev/null", name="somebody-elses")
    client("scancel", f"{held}_0")

    until(lambda: suite.state(0).state is State.RUNNING)
    assert suite.state(0).detail == "the job has begun, the attempt not yet"
    until(lambda: suite.state(1).label == "FAILED(import)")
    assert "ImportError: nothing" in suite.state(1).detail
    until(lambda: suite.state(2).label == "LOST")
    assert "Slurm says COMPLETED, but there is no result" in suite.state(2).detail
    assert suite.state(4).label == "CANCELLED", "a cancelled pending element leaves no trace, and is not waited for"
    assert "left the queue before it began" in suite.state(4).detail
    assert suite.state(5).label == "QUEUED"
    assert suite.state(5).detail == f"held (JobHeldUser): scontrol release {held}_1"
    until(lambda: suite.state(6).label == "LOST")
    assert "never starts" in suite.state(6).detail
    assert suite.state(7).label == "CANCELLED", "the job of that number is not ours"
    if accounting:  # without it, nothing watches the memory here
        until(lambda: suite.state(3).label == "FAILED(oom)")
    _away_and_back(cluster, suite)
    _requeued(suite, first)
    _cancelled(suite, first, held)
    _used(suite, accounting)


def _away_and_back(cluster: Any, suite: Suite) -> None:
    """The controller dies: said, waited for within bounds, and nothing is guessed; then it is back."""
    time.sleep(6)  # it saves its state every 5 s
    os.kill(cluster.status()["daemons"]["slurmctld"], signal.SIGKILL)
    began = time.monotonic()
    state = suite.state(5)
    assert time.monotonic() - began < 40
    assert (state.state, state.live) == (State.UNKNOWN, True)
    assert "Slurm does not answer about job" in state.detail
    assert "Slurm said PENDING at" in state.detail
    command = [sys.executable, "-m", "experiments.cli.main", "status", "--root", str(suite.store.root)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout
    assert "squeue does not answer" in shown.replace("did not answer within", "does not answer")
    cluster.call("up")
    until(lambda: suite.state(5).detail.startswith("held"))
    until(lambda: suite.state(0).state is State.RUNNING)


def _requeued(suite: Suite, first: str) -> None:
    """Queued again, and held, after an attempt of the launch."""
    run = suite.store.run(suite.plan.unique[0].run_id)
    about = {"stage": "all", "started": time.time(), "ended": None, "outcome": None, "launch": LAUNCH}
    write_json(run.attempt(1).path / "stage.json", about)
    client("scontrol", "requeuehold", f"{first}_0")
    until(lambda: suite.state(0).label == "REQUEUED" and "scontrol release" in suite.state(0).detail)
    client("scontrol", "release", f"{first}_0")
    until(lambda: suite.state(0).state is State.RUNNING, 180)


def _cancelled(suite: Suite, first: str, held: str) -> None:
    """Waiting jobs leave the queue, running ones stay until they have seen the file, unless it is to be now."""
    states = [suite.state(0), suite.state(5)]
    done = cancelling.cancel(suite.store, states)
    assert (done.jobs, done.trouble) == ((f"{held}_1",), "")
    assert f"{first}_0" in client("squeue", "-h", "-r", "-t", "PENDING,RUNNING", "-j", first, "-o", "%i").split()
    assert suite.state(0).detail == f"by the user; Slurm still has job {first}_0 (RUNNING)"
    assert cancelling.cancel(suite.store, states[:1], now=True).jobs == (f"{first}_0",)
    until(lambda: suite.state(0).detail == "by the user")
    others = client("squeue", "-h", "-r", "-t", "RUNNING", "-n", "somebody-elses", "-o", "%i")
    assert others, "no job of another name was touched"


def _used(suite: Suite, accounting: bool) -> None:
    run = suite.store.run(suite.plan.unique[3].run_id)
    if not accounting:
        cancelling.cancel(suite.store, [suite.state(3)], now=True)
        usage.settle(suite.store, [run.run_id])
        assert usage.used_by(run) is None, "no attempt, no accounting: nothing is invented"
        return

    def settled() -> bool:
        usage.settle(suite.store, [run.run_id])
        return usage.used_by(run) is not None

    until(settled)
    used = usage.used_by(run)
    assert used is not None
    assert used.source == "sacct"
    assert 1 <= used.seconds < 120
    assert used.peak_bytes > 100 << 20, "MaxRSS of what was killed for its memory"


def test_a_job_that_slurm_does_not_know_any_more_is_not_pending_for_ever(
    devcluster: Callable[..., Any], suite: Suite, tmp_path: Path
) -> None:
    """Without accounting an ended job vanishes after MinJobAge; and the profile's command is told that all is over."""
    cluster = devcluster("--nodes", "1")
    conf = cluster.conf
    conf.write_text(conf.read_text().replace("MinJobAge=300", "MinJobAge=2"))
    client("scontrol", "reconfigure")
    told = tmp_path / "told"
    about = {"suite": "headline", "scale": "mini", "dataset": "shapes", "notify": f"tee {told}"}
    runs = list(suite.plan.unique)[:2]
    write_json(suite.store.launches / LAUNCH / "launch.json", {**about, "runs": [run.run_id for run in runs]})
    job = suite.submit(0, runs, ["exit 1", "sleep 5"])
    assert notify.check(suite.store, standing.look(suite.store, [(run.run_id, run.eval_id) for run in runs])) == []
    assert not told.exists()
    until(lambda: job not in client("squeue", "-h", "-t", "all", "-o", "%A %i"))
    found = standing.look(suite.store, [(run.run_id, run.eval_id) for run in runs])
    assert {state.label for state in found.states.values()} == {"LOST(killed)"}, "it has a log: it was not cancelled"
    assert notify.check(suite.store, found) == []
    assert "headline@mini on shapes has ended: 2 LOST(killed)" in told.read_text()
