"""Jobs of a real Slurm that are disturbed in every way that Slurm knows: the numbers are those of an undisturbed run.

All runs are disturbed at the same time on one cluster, since each of them mostly waits.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from experiments.store.files import read_json
from experiments.store.run_dir import RunDir, Store
from experiments.suites.planning import PlannedRun
from tests.support import tiny_jobs
from tests.support.small_runs import Paced, numbers
from tests.support.tiny_jobs import client, fail_node, job, kill_attempt, lines, stages, submit, until

pytestmark = pytest.mark.slurm

DISTURBANCES = (
    "time limit",
    "preemption",
    "signal",
    "external requeue",
    "attempt killed",
    "job killed",
    "node failure",
)
PATIENCE = 600


@dataclass
class Case:
    """One run, how it is disturbed, and its job."""

    run: PlannedRun
    directory: RunDir
    job: str = ""
    disturbed: bool = False

    def disturb(self, way: str, cluster: Any) -> None:
        """Do it, once the run has come some way."""
        number = self.job
        if way == "preemption":
            client("sbatch", "-p", "high", "-w", "n1", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
        elif way == "signal":
            client("scancel", "--signal=USR2", number)
        elif way == "external requeue":
            client("scontrol", "requeue", number)
        elif way == "attempt killed":
            kill_attempt(self.directory)
        elif way == "job killed":
            os.kill(parent(self.directory), signal.SIGKILL)
        elif way == "node failure":
            fail_node(cluster, "n2")


def parent(directory: RunDir) -> int:
    """The process that submitit started, which watches the attempt."""
    claim = read_json(directory.path / "claims" / "1")
    return tiny_jobs.parent_of(claim["pid"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    base = tmp_path_factory.mktemp("disturbed")
    return base / "data", Store(base / "store")


@pytest.fixture(scope="module")
def cases(world: tuple[Path, Store], shared_devcluster: Callable[..., Any]) -> dict[str, Case]:
    """Every run after its disturbance, done."""
    cluster = shared_devcluster("--nodes", "3")
    data, store = world
    plan = tiny_jobs.tiny_plan(data, seeds=tuple(range(len(DISTURBANCES))), schedule__max_iter=24)
    found = {}
    for way, run in zip(DISTURBANCES, plan.runs, strict=True):
        found[way] = case = Case(run, tiny_jobs.planned(run, store))
        made = job(run, store, data, runner=Paced(4.0, 0.1) if way == "time limit" else Paced(0.5))
        where = {"preemption": "n1", "node failure": "n2"}.get(way, "n0")
        limits: dict[str, Any] = {"time": 2, "signal_delay_s": 15} if way == "time limit" else {}
        case.job = submit(made, store.root / "jobs", additional_parameters={"nodelist": where}, **limits)
    _disturb(found, cluster)
    for case in found.values():
        where_ = lambda case=case: client("squeue", "-a") + tiny_jobs.logs(case.directory, store.root / "jobs")  # noqa: E731
        until(partial(case.directory.result, case.run.eval_id), PATIENCE, where_)
    return found


def _disturb(found: dict[str, Case], cluster: Any) -> None:
    end = time.monotonic() + PATIENCE
    while waiting := [way for way, case in found.items() if not case.disturbed]:
        assert time.monotonic() < end, f"never came far: {waiting}"
        for way in waiting:
            if lines(found[way].directory) >= 8:
                found[way].disturb(way, cluster)
                found[way].disturbed = True
        time.sleep(0.2)


@pytest.mark.parametrize("way", DISTURBANCES)
def test_the_numbers_are_those_of_an_undisturbed_run(
    way: str, cases: dict[str, Case], world: tuple[Path, Store], tmp_path: Path
) -> None:
    case = cases[way]
    assert len(stages(case.directory)) > 1, "it was disturbed"
    expected = tiny_jobs.undisturbed(case.run, Store(tmp_path), world[0])
    assert numbers(case.directory, case.run) == expected
    until(lambda: tiny_jobs.state(case.job) == "COMPLETED", 30, lambda: tiny_jobs.state(case.job))


@pytest.mark.parametrize("way", ["time limit", "preemption", "signal"])
def test_a_warned_run_goes_on_at_the_very_iteration(way: str, cases: dict[str, Case]) -> None:
    """No periodic checkpoint is due in these runs: the only one is that of the signal."""
    directory = cases[way].directory
    first = stages(directory)[0]
    assert first["outcome"] == "requeued"
    iteration = int(str(first["detail"]).split("iteration ")[1].split(":")[0])
    log = (directory.attempt(2).path / "log.txt").read_text()
    assert f"Starting training from iteration {iteration}\n" in log
    assert [stage["execution"]["restarts"] for stage in stages(directory)][:2] == [0, 1]


def test_a_death_is_recorded_with_its_class(cases: dict[str, Case]) -> None:
    first = {way: stages(cases[way].directory)[0] for way in DISTURBANCES}
    for way in ("attempt killed", "node failure"):
        assert (first[way]["outcome"], first[way]["failure_class"]) == ("lost", "killed"), way
    assert "SIGKILL" in str(first["attempt killed"]["detail"])
    assert first["external requeue"]["outcome"] in ("interrupted", "lost")


def test_how_long_was_left_is_kept(cases: dict[str, Case]) -> None:
    text = (cases["time limit"].directory.attempt(1).path / "events.jsonl").read_text()
    assert '"the job is to be queued again, with 0:' in text
