"""Real training, small and paced, as jobs of a real Slurm; and what it comes to when nothing happens to it."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.execution.attempt import Options, run_attempt
from experiments.execution.worker import Task
from experiments.launch import inputs
from experiments.slurm import batch_shell
from experiments.slurm.job import MAX_TIMEOUTS, Coded, SlurmJob
from experiments.store.files import read_json
from experiments.store.run_dir import RunDir, Store
from experiments.suites import planning
from experiments.suites.planning import Plan, PlannedRun, Request
from tests.support import small_runs
from tests.support.small_runs import Paced, numbers

TINY = small_runs.TINY | {"schedule.batch_size": 4, "runtime.checkpoint_period": 1000}
ROOT = Path(__file__).resolve().parents[2]


def tiny_plan(data: Path, seeds: tuple[int, ...] = (0,), rows: tuple[str, ...] = ("mp-former",), **over: Any) -> Plan:
    """Tiny runs of the headline suite, their dataset prepared; ``over`` with ``__`` for dots."""
    overrides = TINY | {key.replace("__", "."): value for key, value in over.items()}
    request = Request("headline", rows=rows, seeds=seeds, overrides=tuple(overrides.items()))
    return inputs.prepare_data(planning.make(request, data))


def planned(run: PlannedRun, store: Store) -> RunDir:
    """The run, recorded in the store."""
    directory = store.run(run.run_id)
    directory.create(run.config, run.row.name)
    return directory


def undisturbed(run: PlannedRun, store: Store, data: Path) -> dict[str, Any]:
    """The numbers of the run when it is executed in this process, in a store of its own."""
    directory = planned(run, store)
    ending = run_attempt(store.root, run.run_id, "all", Options(data, threads=1), None, run.config)
    assert ending.outcome == "done", ending
    return numbers(directory, run)


def job(run: PlannedRun, store: Store, data: Path, **changes: Any) -> SlurmJob:
    """The run as a job, one second an iteration."""
    options = Options(data, launch="test", threads=1)
    made = SlurmJob(store.root, "test", options, runner=Paced(1.0), task=Task(run.run_id, run.eval_id, run.config))
    return replace(made, **changes)


def submit(made: SlurmJob, folder: Path, before: str = "", **parameters: Any) -> str:
    """Hand the job to Slurm as a launch does, with a shell line ``before`` its srun; returns its id."""
    import submitit

    executor = submitit.SlurmExecutor(folder, max_num_timeout=MAX_TIMEOUTS)
    setup = [
        f"export PYTHONPATH={ROOT}",
        "export OMP_NUM_THREADS=1",
        *batch_shell.before(folder / "deaths.txt"),
        before,
    ]
    defaults = {"time": 60, "mem": "2GB", "cpus_per_task": 1, "signal_delay_s": 30, "stderr_to_stdout": True}
    extra = {"requeue": True, **parameters.pop("additional_parameters", {})}
    defaults |= {"additional_parameters": extra, "setup": setup, "teardown": batch_shell.AFTER}
    executor.update_parameters(**(defaults | parameters))
    return str(executor.submit(Coded(made)).job_id)  # the job's object would go on asking sacct


def client(*command: str, check: bool = True) -> str:
    """What a Slurm client prints."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=check).stdout.strip()


def state(job_id: str) -> str:
    """The job's state by Slurm, such as RUNNING; empty once it is forgotten."""
    return client("squeue", "-h", "-t", "all", "-j", str(job_id), "-o", "%T", check=False)


def lines(directory: RunDir) -> int:
    """Lines of the run's metrics so far."""
    return directory.metrics.read_text().count("\n") if directory.metrics.exists() else 0


def until(condition: Callable[[], Any], seconds: float, what: Callable[[], str] = lambda: "") -> None:
    """Wait for it; fails after that many seconds with what there is to see."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not happen in {seconds:.0f} s\n{what()}"
        time.sleep(0.2)


def logs(directory: RunDir, folder: Path | None = None) -> str:
    """The ends of the attempts' logs and of the jobs' output, for a failing test."""
    files = [*sorted(directory.path.glob("attempts/*/*")), *sorted(folder.glob("*_log.out") if folder else ())]
    files = [file for file in files if file.is_file() and file.name != "provenance.json"]
    shown = [f"--- {file}\n{file.read_text(errors='replace')[-1500:]}" for file in files]
    return "\n".join(shown)


def stages(directory: RunDir) -> list[Mapping[str, Any]]:
    """The records of the run's attempts."""
    return [read_json(directory.attempt(number).path / "stage.json") for number in directory.attempts()]


def until_done(directory: RunDir, run: PlannedRun, seconds: float, what: Callable[[], str]) -> None:
    """Wait for the run's result, and for the outcome of its attempt, which is written after it."""
    until(lambda: directory.result(run.eval_id), seconds, what)
    until(lambda: stages(directory)[-1]["outcome"] == "done", 60, what)


def kill_attempt(directory: RunDir, number: int = signal.SIGKILL) -> bool:
    """Send a signal to the process that holds the run."""
    claims = directory.path / "claims"
    newest = max((int(path.name) for path in claims.glob("[0-9]*") if path.name.isdigit()), default=0)
    claim = read_json(claims / str(newest))
    if not claim or (claims / f"{newest}.released").exists():
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(claim["pid"], number)
    return True


def fail_node(cluster: Any, node: str) -> None:
    """What a power cut does: everything on the node is gone at once, and the controller notices; then it is back."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(cluster.status()["daemons"][f"slurmd-{node}"], signal.SIGKILL)
    jobs = on_node(cluster.conf, node)
    steps = {parent for parent in map(parent_of, jobs) if parent and _named(parent, "slurmstepd")}
    for pid in [*steps, *jobs]:  # the step daemons first: they would report the end of their tasks
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    client("scontrol", "update", f"nodename={node}", "state=down", "reason=power")
    cluster.call("up")
    client("scontrol", "update", f"nodename={node}", "state=resume", check=False)  # refused if it is back already


def on_node(conf: Path, node: str) -> list[int]:
    """The processes of jobs on a virtual node of the cluster."""
    wanted = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={conf}".encode()}
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                found.append(int(entry.name))
    return found


def parent_of(pid: int) -> int:
    """The parent of a process, 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def _named(pid: int, name: str) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == name
    except OSError:
        return False
