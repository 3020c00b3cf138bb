"""What every executor owes to a launch, beyond the first steps that all share; ``docs/executors.md`` says it in words.

Slurm is here a ``sbatch`` that executes the elements of an array, one after the other, on this machine; the rest is
what runs on a cluster: the batch script, submitit, the pickles, the journal. ``tests/slurm`` has the real one.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from experiments.launch import choosing, local
from experiments.launch.machine import Width
from experiments.runs import cancelling
from experiments.slurm import submission
from experiments.slurm.batches import Target
from experiments.status import scheduler
from experiments.store.launches import launch_dir
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan, Request, make
from mpformer.runtime.errors import UserError
from tests.support.counting_jobs import profile

Make = Callable[..., Any]

SBATCH = """#!/bin/bash
cd "$(dirname "$0")"
echo call >> calls
id=$((100 * $(wc -l < calls)))
name=$(sed -n 's/^#SBATCH --job-name=//p' "$2")
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$2")
# Renamed into place: a reader that finds the file being written would see no job at all.
say() {
  job=$((id + 1 + $1))
  echo "${id}_$1|$job|$2|None|1767268800|N/A|n0|$name" > "$job.next" && mv "$job.next" "$job.state"
}
for i in $(seq 0 "$last"); do say "$i" PENDING; done
for i in $(seq 0 "$last"); do
  say "$i" RUNNING
  export SLURM_JOB_ID=$((id + 1 + i)) SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID=$i SLURM_STEP_ID=0
  export SLURM_JOB_NODELIST=n0 SLURM_NTASKS=1 SLURM_NNODES=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
  if bash "$2"; then say "$i" COMPLETED; else say "$i" FAILED; fi
done > log 2>&1 &
echo "$id"
"""
SRUN = '#!/bin/sh\nwhile [ "$1" != -u ]; do before=$1; shift; done\nexec "$before" "$@"\n'


@dataclass(frozen=True)
class Begun:
    """What an executor says of a launch."""

    id: str
    started: tuple[str, ...]
    left_alone: dict[str, str]


class Here:
    """The workers of this machine."""

    name = "local"

    def __init__(self, _: Path, __: pytest.MonkeyPatch) -> None:
        self._launches: list[local.Launch] = []

    def launch(self, plan: Plan, store: Store, runner: Any, retry: tuple[str, ...] = ()) -> Begun:
        done = local.launch(plan, store, width=Width(2, 1), runner=runner, retry=retry)
        self._launches.append(done)
        return Begun(done.id, tuple(run.run_id for run in done.started), done.left_alone)

    def working(self) -> bool:
        return any(launch.working() for launch in self._launches)


class Slurm:
    """Job arrays."""

    name = "slurm"

    def __init__(self, place: Path, patch: pytest.MonkeyPatch) -> None:
        self.bin = place / "bin"
        self.bin.mkdir()
        says = {
            "scontrol": "#!/bin/sh\necho ClusterName = lab\n",
            "sacct": "#!/bin/sh\necho storage is disabled >&2\nexit 1\n",
        }
        says |= {"squeue": '#!/bin/sh\ncat "$(dirname "$0")"/*.state 2>/dev/null || true\n', "scancel": "#!/bin/sh\n"}
        for name, text in (says | {"sbatch": SBATCH, "srun": SRUN}).items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        patch.setenv("PATH", str(self.bin), prepend=":")
        patch.setattr(scheduler, "_CLUSTERS", {})

    def launch(self, plan: Plan, store: Store, runner: Any, retry: tuple[str, ...] = ()) -> Begun:
        done = submission.launch(
            plan, store, Target("test", profile(python=sys.executable)), runner=runner, retry=retry
        )
        assert not done.problem
        return Begun(done.id, tuple(run.run_id for run in done.started), done.left_alone)

    def working(self) -> bool:
        return any("RUNNING" in path.read_text() or "PENDING" in path.read_text() for path in self.bin.glob("*.state"))


@pytest.fixture(params=[Here, Slurm], ids=["local", "slurm"])
def executor(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return request.param(tmp_path, monkeypatch)


@pytest.fixture
def two(plan: Plan) -> Plan:
    """A run of each row."""
    return replace(plan, runs=tuple(run for run in plan.runs if run.seed == 0))


def _ended(executor: Any) -> None:
    end = time.monotonic() + 120
    while executor.working():
        assert time.monotonic() < end, "it did not end"
        time.sleep(0.1)


def _labels(plan: Plan, store: Store) -> list[str]:
    return [state.label for state in choosing.snapshot(plan, store)]


def _until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_each_missing_run_is_executed_once_whoever_launches_meanwhile(
    executor: Any, two: Plan, store: Store, data_root: Path, counter: Make
) -> None:
    ids = tuple(run.run_id for run in two.unique)
    begun = executor.launch(two, store, counter(seconds=0.05))
    assert begun.started == ids
    record = launch_dir(store, begun.id).record()
    assert record is not None
    assert (record.runs, record.suite, record.executor or "local") == (ids, "headline", executor.name)
    assert set(_labels(two, store)) <= {"QUEUED", "RUNNING", "DONE"}
    assert executor.launch(two, store, counter()).started == (), "they are in hand"
    _ended(executor)
    assert _labels(two, store) == ["DONE"] * len(ids)
    for run_id in ids:
        (number,) = store.run(run_id).attempts()
        ended = store.run(run_id).attempt(number).record()
        assert ended is not None
        assert (ended.outcome, ended.launch) == ("done", begun.id)
    assert executor.launch(two, store, counter()).started == ()


def test_a_failure_stops_no_other_run_and_is_left_alone_until_it_is_retried(
    executor: Any, two: Plan, store: Store, data_root: Path, counter: Make
) -> None:
    executor.launch(two, store, counter(fail={"m2f": "nan"}))
    _ended(executor)
    failed = [state.run_id for state in choosing.snapshot(two, store) if state.label == "FAILED(nan)"]
    assert len(failed) == 1
    assert sorted(_labels(two, store)) == ["DONE", "FAILED(nan)"]
    again = executor.launch(two, store, counter())
    assert (again.started, again.left_alone) == ((), dict.fromkeys(failed, "nan"))
    assert set(executor.launch(two, store, counter(), ("nan",)).started) == set(failed)
    _ended(executor)
    assert set(_labels(two, store)) == {"DONE"}


def test_a_cancelled_run_checkpoints_and_a_later_launch_goes_on_where_it_was(
    executor: Any, two: Plan, store: Store, data_root: Path, counter: Make
) -> None:
    first = store.run(two.unique[0].run_id)
    executor.launch(two, store, counter(seconds=0.2))
    _until(first.metrics.exists)
    states = choosing.snapshot(two, store)
    cancelling.cancel(store, [state for state in states if state.active])
    _ended(executor)
    assert "CANCELLED" in _labels(two, store)
    assert not {"RUNNING", "QUEUED"} & set(_labels(two, store))
    executor.launch(two, store, counter())
    _ended(executor)
    assert set(_labels(two, store)) == {"DONE"}
    lines = [json.loads(line)["iteration"] for line in first.metrics.read_text().splitlines()]
    assert lines == [*range(1, 13), 12], "nothing twice, nothing left out"


def test_what_is_missing_is_said_before_anything_is_written(
    executor: Any, store: Store, tmp_path: Path, counter: Make
) -> None:
    missing = make(Request("headline", overrides=(("schedule.max_iter", 12),)), tmp_path / "nothing")
    with pytest.raises(UserError, match="is not under"):
        executor.launch(missing, store, counter())
    assert not store.root.exists()
