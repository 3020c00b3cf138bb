"""What a job does with its attempt, without Slurm: earlier starts' claims, crash loops, failures, memory, the code."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from experiments.execution.attempt import Options
from experiments.execution.worker import Task
from experiments.slurm import batch_shell, inside_job
from experiments.slurm import job as slurm_job
from experiments.slurm.inside_job import oom_kills
from experiments.slurm.job import MAX_DEATHS, Coded, SlurmJob
from experiments.status import failures
from experiments.status.states import State, derive
from experiments.store import claims
from experiments.store.attempt_dir import Execution
from experiments.store.claims import acquire, holder
from experiments.store.files import read_json, write_json
from experiments.store.identity import eval_id
from experiments.store.launches import LaunchRecord, launch_dir
from experiments.store.run_dir import RunDir, Store
from mpformer.runtime.errors import RunFailure

Make = Callable[..., Any]


@pytest.fixture
def make(store: Store, one: RunDir, options: Options) -> Callable[..., SlurmJob]:
    """The run as a job with this runner."""

    def made(runner: Any, **changes: Any) -> SlurmJob:
        config = one.config()
        task = Task(one.run_id, eval_id(config), config)
        return replace(SlurmJob(store.root, "test", options, runner=runner, task=task), **changes)

    return made


@pytest.fixture(autouse=True)
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A job's variables, and a squeue that knows nothing."""
    for name, value in {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_STEP_NUM_TASKS", "WORLD_SIZE", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "squeue").write_text("#!/bin/sh\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def _again(job: Callable[[], Any]) -> None:
    """Call a job that wants to be queued again."""
    with pytest.raises(SystemExit) as ended:
        job()
    assert ended.value.code == batch_shell.AGAIN


def test_a_job_executes_its_run_and_ends_well(make: Callable[..., SlurmJob], counter: Make, one: RunDir) -> None:
    job = pickle.loads(cloudpickle.dumps(make(counter())))
    assert job() == "done"
    assert derive(one, job.task.eval_id).state is State.DONE
    assert job() == "skipped"
    assert one.attempts() == [1]


def test_checkpoint_gives_submitit_the_same_job_again(make: Callable[..., SlurmJob], counter: Make) -> None:
    job = make(counter())
    delayed = Coded(job).checkpoint()
    assert delayed.function == Coded(job)
    assert (delayed.args, delayed.kwargs) == ((), {})


@pytest.mark.parametrize("kind", ["nan", "oom", "missing-module", "data"])
def test_a_failure_ends_the_job_with_its_class_and_is_not_repeated(
    make: Callable[..., SlurmJob], counter: Make, one: RunDir, slurm: Path, kind: str
) -> None:
    job = make(counter(fail={"m2f": kind}))
    with pytest.raises(SystemExit) as ended:
        Coded(job)()
    assert ended.value.code == batch_shell.FAILED
    failed = ended.value.__cause__
    assert isinstance(failed, RunFailure)
    expected = {"missing-module": "import"}.get(kind, kind)
    assert failed.failure_class == expected
    assert derive(one, job.task.eval_id).label == f"FAILED({expected})"
    launch_dir(Store(job.root), job.launch).write(LaunchRecord("headline", "mini", "shapes"))
    again = f"mpformer retry headline --scale mini --dataset shapes --class {expected} --root {job.root} --data-root "
    with pytest.raises(RunFailure, match=re.escape(again)):
        replace(job, runner=counter())()
    assert one.attempts() == [1], "a job that Slurm starts again does not repeat a failure"


def test_a_later_launch_tries_again_what_may_have_passed(make: Callable[..., SlurmJob], counter: Make) -> None:
    first = make(counter(fail={"m2f": "nan"}))
    with pytest.raises(RunFailure):
        first()
    later = make(counter(), options=replace(first.options, launch="later"))
    with pytest.raises(RunFailure, match="nan"):
        later()
    assert replace(later, retry=("nan",))() == "done"


def test_a_cancelled_run_is_not_begun(make: Callable[..., SlurmJob], counter: Make, one: RunDir) -> None:
    write_json(one.cancel_file, {})
    with pytest.raises(RunFailure, match="cancelled"):
        make(counter())()
    assert not one.attempts()


def test_a_stage_without_its_result_fails_the_job(make: Callable[..., SlurmJob], counter: Make, one: RunDir) -> None:
    with pytest.raises(RunFailure, match="no trained weights"):
        make(counter(), stage="evaluate")()
    assert make(counter(), stage="train", options=replace(make(counter()).options, launch="b"))() == "trained"
    assert one.trained() is not None


def test_a_killed_attempt_is_recorded_and_requeued(
    make: Callable[..., SlurmJob], counter: Make, one: RunDir, slurm: Path
) -> None:
    job = make(counter(kill_once=slurm / "killed"))
    _again(job)
    stage = read_json(one.attempt(1).path / "stage.json")
    assert (stage["outcome"], stage["failure_class"], stage["detail"]) == ("lost", "killed", "killed by SIGKILL")
    assert job() == "done"


class _Doomed:
    """A trainer that is killed each time before it has completed anything."""

    def train(self, *_: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def test_a_crash_loop_ends_as_a_failure_with_its_reason(
    make: Callable[..., SlurmJob], counter: Make, one: RunDir, slurm: Path
) -> None:
    job = make(_Doomed())
    for _ in range(MAX_DEATHS - 1):
        _again(job)
    with pytest.raises(RunFailure, match="5 attempts in a row completed nothing, the last: killed by SIGKILL"):
        job()
    assert derive(one, job.task.eval_id).label == "FAILED(killed)"
    with pytest.raises(RunFailure):
        job()
    assert len(one.attempts()) == MAX_DEATHS
    later = make(counter(), options=replace(job.options, launch="later"))
    assert later() == "done", "another launch starts to count anew"


class _Slow:
    """Completes one checkpoint and is killed, each time: slow, but no crash loop."""

    def train(self, config: Any, directory: Path, *_: Any) -> dict[str, Any]:
        (directory / "checkpoints").mkdir(exist_ok=True)
        (directory / "checkpoints" / f"iteration_{time.monotonic_ns()}.pth").touch()
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def test_attempts_that_get_on_are_no_crash_loop(make: Callable[..., SlurmJob], slurm: Path) -> None:
    job = make(_Slow())
    for _ in range(MAX_DEATHS + 2):
        _again(job)


class _Broken:
    """A trainer whose GPU fails: by an exception, or under a process that NCCL's watchdog then ends."""

    def __init__(self, killed: bool) -> None:
        self.killed = killed

    def train(self, *_: Any) -> dict[str, Any]:
        if self.killed:
            print("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)", flush=True)
            os.kill(os.getpid(), signal.SIGABRT)
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")


@pytest.mark.parametrize("killed", [False, True])
def test_a_gpu_that_fails_is_not_the_runs_doing(
    make: Callable[..., SlurmJob], counter: Make, one: RunDir, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    with pytest.raises(SystemExit) as ended:
        make(_Broken(killed))()
    assert ended.value.code == batch_shell.BROKEN
    state = derive(one, make(None).task.eval_id)
    assert state.label == "LOST(gpu)"
    assert state.detail.endswith("(on n7)")
    assert make(counter())() == "done"


def test_starts_that_the_infrastructure_ended_are_no_crash_loop(
    make: Callable[..., SlurmJob], counter: Make, one: RunDir, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the batch shell noted as such, whatever the attempt's record says, counts apart."""
    monkeypatch.setenv(batch_shell.DEATHS, str(slurm / "deaths.txt"))
    for start in range(MAX_DEATHS + 1):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        _again(make(_Doomed()))
        with (slurm / "deaths.txt").open("a") as file:
            file.write(f"1767268800 77 {start} n0 137 30\n")
    assert make(counter())() == "done"


PROGRAM = """
import pickle, sys
pickle.load(open(sys.argv[1], "rb"))()
"""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_signals_checkpoint_and_only_a_warning_requeues(
    make: Callable[..., SlurmJob], counter: Make, one: RunDir, slurm: Path, number: signal.Signals
) -> None:
    (slurm / "job.pkl").write_bytes(cloudpickle.dumps(make(counter(seconds=0.3))))
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(slurm / "job.pkl")])
    _until(lambda: one.metrics.exists())
    process.send_signal(number)
    _until(lambda: (read_json(one.attempt(1).path / "stage.json") or {}).get("outcome"))
    reached = read_json(one.path / "checkpoints" / "state.json")["iteration"]
    requeued = number == signal.SIGUSR2
    if requeued:
        assert process.wait(60) == batch_shell.AGAIN
        assert read_json(one.attempt(1).path / "stage.json")["outcome"] == "requeued"
    else:
        time.sleep(3)
        assert process.poll() is None, "Slurm has not said yet what it wants"
    process.kill()
    process.wait()
    make(counter())()
    iterations = [json.loads(line)["iteration"] for line in one.metrics.read_text().splitlines()]
    assert iterations == [*range(1, 13), 12], f"resumed after {reached}, nothing twice"


def _until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


class _Deaf:
    """A trainer that never looks whether it is to stop."""

    def train(self, config: Any, directory: Path, data_root: Path, callbacks: Any) -> dict[str, Any]:
        callbacks.log({"kind": "train", "iteration": 1, "loss": 1.0})
        time.sleep(600)
        return {}


def test_an_attempt_that_does_not_end_before_the_limit_is_left_behind(
    make: Callable[..., SlurmJob], one: RunDir, slurm: Path
) -> None:
    """A job that ran into its limit would not be requeued."""
    (slurm / "bin" / "squeue").write_text("#!/bin/sh\necho 0:05\n")
    (slurm / "job.pkl").write_bytes(cloudpickle.dumps(make(_Deaf())))
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(slurm / "job.pkl")])
    _until(lambda: one.metrics.exists())
    process.send_signal(signal.SIGUSR2)
    assert process.wait(60) == batch_shell.AGAIN
    stage = read_json(one.attempt(1).path / "stage.json")
    assert (stage["outcome"], stage["failure_class"]) == ("lost", "timeout")
    assert stage["detail"] == "did not end in time after SIGUSR2; raise the profile's signal_delay"


@pytest.mark.parametrize(
    ("left", "expected"),
    [("0:25", 25), ("59:42", 3582), ("1:00:00", 3600), ("2-01:00:01", 176401), ("UNLIMITED", inf), ("", inf)],
)  # fmt: skip
def test_time_left_as_slurm_writes_it(left: str, expected: float) -> None:
    assert inside_job.seconds(left) == expected


# --- claims of a job that was started again ---------------------------------------------------------------------------


def _claim(directory: Path, age: float, job_id: str = "77", restarts: int = 0, machine: str = "other") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    content = {"host": "n7", "machine": machine, "pid": 2**22, "born": "1", "token": "t"}
    (directory / "1").write_text(json.dumps({**content, "job_id": job_id, "restarts": restarts}))
    then = time.time() - age
    os.utime(directory / "1", (then, then))


def test_a_restarted_job_takes_over_from_a_silent_node_at_once(tmp_path: Path) -> None:
    _claim(tmp_path, age=claims.RESTART_TIMEOUT + 5)
    assert acquire(tmp_path) is None, "others wait for the long silence"
    assert acquire(tmp_path, job=Execution("78", restarts=1)) is None
    assert acquire(tmp_path, job=Execution("77", restarts=0)) is None, "the same start is no successor"
    assert acquire(tmp_path, job=Execution("77", restarts=1)) is not None


def test_a_restarted_job_leaves_a_node_that_still_works_alone(tmp_path: Path) -> None:
    """Slurm gives a node up that has merely lost touch: its process goes on, and its heart beats."""
    _claim(tmp_path, age=claims.HEARTBEAT_PERIOD)
    assert acquire(tmp_path, job=Execution("77", restarts=1)) is None


def test_a_restarted_job_never_takes_over_from_a_live_process_of_this_machine(tmp_path: Path) -> None:
    assert acquire(tmp_path, job=Execution("77", restarts=0)) is not None
    os.utime(tmp_path / "1", (0, 0))
    assert holder(tmp_path, job=Execution("77", restarts=1)) == 1


def test_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    _claim(tmp_path, age=0, machine=claims.machine())
    assert acquire(tmp_path, job=Execution("77", restarts=0)) is not None


def test_a_job_waits_for_the_silence_of_its_earlier_start(
    make: Callable[..., SlurmJob], counter: Make, one: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    _claim(one.path / "claims", age=claims.RESTART_TIMEOUT - 3)
    began = time.monotonic()
    assert make(counter())() == "done"
    assert time.monotonic() - began > 2
    stage = read_json(one.attempt(2).path / "stage.json")
    assert stage["execution"]["restarts"] == 1


def test_a_job_gives_way_to_another_that_is_at_work(
    make: Callable[..., SlurmJob], counter: Make, one: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_job, "CLAIM_SECONDS", 2.0)
    claim = acquire(one.path / "claims", job=Execution("5", restarts=0))
    assert claim is not None
    with claims.Heartbeat(claim, period=0.2), pytest.raises(RunFailure, match=r"job 5 on .* is at work on this run"):
        make(counter())()
    assert not one.attempts()


def test_an_attempt_lost_with_its_node_is_recorded_as_such(
    make: Callable[..., SlurmJob], counter: Make, one: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    _claim(one.path / "claims", age=600)
    write_json(one.attempt(1).path / "stage.json", {"stage": "all", "started": 1.0, "outcome": None, "launch": "test"})
    assert make(counter())() == "done"
    first = read_json(one.attempt(1).path / "stage.json")
    assert (first["outcome"], first["failure_class"]) == ("lost", "node")
    assert first["detail"] == "the process died on n7 and did not say why"


# --- memory and code --------------------------------------------------------------------------------------------------


def test_kills_for_memory_are_read_from_the_control_group(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/system.slice/job_77/step_0/user/task_0\n")
    assert oom_kills(tmp_path, own) == 0
    group = tmp_path / "system.slice" / "job_77" / "step_0"
    group.mkdir(parents=True)
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 1\noom_kill 2\noom_group_kill 0\n")
    assert oom_kills(tmp_path, own) == 2
    own.write_text("4:memory:/slurm/uid_0/job_77\n3:cpu:/\n")
    old = tmp_path / "memory" / "slurm" / "uid_0" / "job_77"
    old.mkdir(parents=True)
    (old / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert oom_kills(tmp_path, own) == 1


def test_an_attempt_killed_for_memory_fails_as_such(
    make: Callable[..., SlurmJob], one: RunDir, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([0, 1])
    monkeypatch.setattr(slurm_job, "oom_kills", lambda: next(counts))
    job = make(_Doomed())
    with pytest.raises(RunFailure, match="out of memory"):
        job()
    assert derive(one, job.task.eval_id).label == "FAILED(oom)"


@pytest.mark.parametrize(
    ("words", "label"),
    [
        ("slurmstepd-n0: error: StepId=77.0 exceeded memory limit (12 > 6), being killed", "FAILED(oom)"),
        (
            "slurmstepd: error: Detected 1 oom_kill event in StepId=77.0.",
            "FAILED(oom)",
        ),
        ("slurmstepd-n0: error: *** JOB 77 ON n0 CANCELLED AT 2026-01-01T00:00:00 DUE TO NODE FAILURE ***", "DONE"),
    ],
)
def test_the_next_start_reads_in_the_log_how_the_last_one_ended(
    make: Callable[..., SlurmJob], counter: Make, one: RunDir, slurm: Path, monkeypatch: pytest.MonkeyPatch,
    words: str, label: str,
) -> None:  # fmt: skip
    """Slurm killed the whole step: nothing of it could say why."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(slurm))
    start = f"{failures.START}0 of job 77 on n0"
    (slurm / "77_0_log.out").write_text(f"{start}\n{words}\n{start}\n")
    record = {"stage": "all", "started": 1.0, "outcome": None, "launch": "test", "execution": {"job_id": "77"}}
    write_json(one.attempt(1).path / "stage.json", record)
    _claim(one.path / "claims", age=600)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    job = make(counter())
    if label == "DONE":
        assert job() == "done"
        assert read_json(one.attempt(1).path / "stage.json")["failure_class"] == "node"
    else:
        with pytest.raises(RunFailure, match=r"memory|oom"):
            job()
    assert derive(one, job.task.eval_id).label == label


def test_a_job_refuses_to_run_other_code_than_its_snapshot(
    make: Callable[..., SlurmJob], counter: Make, tmp_path: Path
) -> None:
    with pytest.raises(RunFailure, match=r"analysis was imported from .*, not from the snapshot") as failed:
        make(counter(), code=tmp_path)()
    assert failed.value.failure_class == "import"
    assert make(counter(), code=Path(slurm_job.__file__).resolve().parents[2])() == "done"
