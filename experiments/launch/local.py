"""Launching: write the suite's record, hand the missing runs to workers, and show how they get on.

The executor is a seam: anything that starts :func:`experiments.execution.worker.work` (or, on a cluster,
:func:`experiments.execution.attempt.run_attempt`) somewhere and says whether it still runs.
"""

import contextlib
import os
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from experiments.execution.attempt import Options, Outcome, Runner, run_attempt
from experiments.execution.worker import Task, WorkerJob, work
from experiments.status.states import RunState, State, should_start
from experiments.store.files import read_json, write_json
from experiments.store.launches import live_workers
from experiments.store.run_dir import Store
from experiments.suites import datasets, planning, scales
from experiments.suites.planning import Plan, PlannedRun
from mpformer.runtime.errors import UserError
from mpformer.runtime.signals import Handler, handled


class Executor(Protocol):
    """Starts worker jobs."""

    def submit(self, jobs: Sequence[WorkerJob], folder: Path) -> list[str]:
        """Start the jobs and return their ids."""

    def running(self) -> bool:
        """Whether one of the submitted jobs still runs."""

    def problems(self) -> list[str]:
        """What ended jobs, one line each, other than the failures of their runs."""


class LocalExecutor:
    """submitit's local executor: every worker is a process of this machine that outlives this one."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._jobs: list[Any] = []

    def submit(self, jobs: Sequence[WorkerJob], folder: Path) -> list[str]:
        """Start one process a job."""
        import submitit

        executor = submitit.LocalExecutor(
            folder
        )  # never AutoExecutor's guess: it takes Slurm where srun is on the path
        gpus = visible_gpus()
        for index, job in enumerate(jobs):
            executor.update_parameters(timeout_min=_FOREVER_MINUTES, stderr_to_stdout=True, **_gpu(gpus, index))
            with _environment(self._threads), handled(_IGNORED), _code_importable():
                self._jobs.append(executor.submit(work, job))
        return [str(job.job_id) for job in self._jobs]

    def running(self) -> bool:
        """Whether a controller process is left."""
        return any(not job.done() for job in self._jobs)

    def problems(self) -> list[str]:
        """The exceptions of the workers themselves, and workers that died."""
        found = []
        for job in self._jobs:
            if not job.paths.result_pickle.exists():
                found.append(f"worker {job.job_id} died; its log: {job.paths.stdout}")
            elif (error := job.exception()) is not None:
                found.append(f"worker {job.job_id}: {_telling(str(error))}; its log: {job.paths.stdout}")
        return found


def _telling(trace: str) -> str:
    """The line of a printed traceback that says what went wrong."""
    lines = [line for line in trace.splitlines() if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line)]
    return lines[-1] if lines else trace.strip()[:200]


_FOREVER_MINUTES = 60 * 24 * 365

_IGNORED: Mapping[int, Handler] = {signal.SIGINT: signal.SIG_IGN, signal.SIGHUP: signal.SIG_IGN}
"""Children inherit ignored signals: Ctrl-C and a closed terminal reach the launcher alone, which asks properly."""


@dataclass(frozen=True)
class Width:
    """How many workers, and threads each."""

    workers: int
    threads: int


@dataclass(frozen=True)
class Launch:
    """What a launch started; ``started`` is empty if every run was done or in other hands."""

    id: str
    directory: Path
    store: Store
    started: tuple[PlannedRun, ...]
    executor: Executor | None
    left_alone: dict[str, str]
    """Failed runs that would fail again, with their failure class."""

    def stop(self, reason: str) -> None:
        """Ask the workers to checkpoint their runs and end."""
        write_json(self.directory / "stop.json", {"reason": reason, "time": time.time()})

    def working(self) -> bool:
        """Whether one of this launch's jobs still runs."""
        return self.executor is not None and self.executor.running()

    def problems(self) -> list[str]:
        """What ended workers before their time."""
        return self.executor.problems() if self.executor is not None else []

    def close(self) -> None:
        """Note that nothing of the launch runs any more, so that its waiting runs are no longer QUEUED."""
        path = self.directory / "launch.json"
        content = read_json(path)
        if isinstance(content, dict) and not content.get("ended"):
            with contextlib.suppress(OSError):
                write_json(path, {**content, "ended": time.time()})

    def kill(self) -> None:
        """End the workers now; their runs continue from the last checkpoint at the next launch."""
        for pid in live_workers(self.directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def launch(
    plan: Plan,
    store: Store,
    data_root: Path,
    *,
    command: str = "",
    width: Width | None = None,
    retry: tuple[str, ...] = (),
    executor: Executor | None = None,
    runner: Runner | None = None,
    notify: str | None = None,
) -> Launch:
    """Start what is missing of a plan and return at once.

    Raises UserError if data or weights are missing, or if the store cannot be written.
    """
    if plan.missing:
        raise UserError("; ".join(plan.missing))
    record(plan, store, command)
    missing, left_alone = to_start(plan, store, retry)
    uncancel(missing, store)
    name = new_id()
    directory = store.launches / name
    if not missing:
        return Launch(name, directory, store, (), None, left_alone)
    width = fit(width, len(missing))
    options = Options(data_root.resolve(), name, width.threads, directory.resolve() / "stop.json")
    tasks = tuple(Task(run.run_id, run.eval_id, run.config) for run in missing)
    job = WorkerJob(store.root.resolve(), name, tasks, options, retry=retry, runner=runner)
    executor = executor or LocalExecutor(width.threads)
    about = {"schema": 1, "suite": plan.suite.name, "scale": plan.scale, "dataset": plan.dataset, "command": command}
    about |= {"runs": [run.run_id for run in missing], "created": time.time(), "workers": width.workers}
    about |= {"notify": notify}
    write_json(directory / "launch.json", about)
    jobs = executor.submit([job] * width.workers, directory / "jobs")
    write_json(directory / "launch.json", {**about, "job_ids": jobs})
    return Launch(name, directory, store, tuple(missing), executor, left_alone)


def record(plan: Plan, store: Store, command: str) -> None:
    """Write the suite's record and the runs' immutable files; raises UserError if the store cannot be written."""
    try:
        with ThreadPoolExecutor(16) as pool:  # each file waits for its disk
            list(pool.map(lambda run: store.run(run.run_id).create(run.config, run.row.name), plan.unique))
        planning.write_record(plan, store, command)
    except OSError as error:
        raise UserError(f"cannot write to {store.root}: {error.strerror or error}; choose another --root") from None


def to_start(plan: Plan, store: Store, retry: tuple[str, ...] = ()) -> tuple[list[PlannedRun], dict[str, str]]:
    """Return the runs that a launch has to start, and the failed ones that it leaves alone with their class."""
    states = planning.states(plan, store)
    missing = [run for run in plan.unique if should_start(states[run.run_id], retry)]
    rest = [state for state in states.values() if state.state is State.FAILED and not should_start(state, retry)]
    return missing, {state.run_id: state.failure_class for state in rest}


def uncancel(runs: Sequence[PlannedRun], store: Store) -> None:
    """Take back earlier requests to stop these runs: they are launched again."""
    for run in runs:
        store.run(run.run_id).cancel_file.unlink(missing_ok=True)


def new_id() -> str:
    """Return an id for a launch: its time, and what tells it from others of the same second."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


def inline(plan: Plan, store: Store, data_root: Path, command: str = "", runner: Runner | None = None) -> Outcome:
    """Execute the plan's only run in this process, for a debugger; raises UserError if there are several."""
    if len(plan.unique) != 1:
        raise UserError(f"--inline executes one run, this is {len(plan.unique)}; name one with --row and --seed")
    if plan.missing:
        raise UserError("; ".join(plan.missing))
    record(plan, store, command)
    run = plan.unique[0]
    store.run(run.run_id).cancel_file.unlink(missing_ok=True)
    options = Options(data_root.resolve(), "inline", capture=False)
    return run_attempt(store.root.resolve(), run.run_id, "all", options, runner, run.config)


def prepare_data(plan: Plan, data_root: Path, progress: Callable[[int, int], None] | None = None) -> Plan:
    """Prepare what can be prepared without the user's help (drawn images), and return the plan with it in place."""
    if not plan.data.preparable:
        return plan
    from mpformer.data.prepare import prepare_shapes

    assert plan.base.dataset.shapes is not None
    prepare_shapes(plan.base.dataset.shapes, data_root, progress)
    return planning.make(plan.request, data_root)


def fetch_weights(plan: Plan, data_root: Path) -> Plan:
    """Download initial weights that have an address and are not there, and return the plan with them in place.

    Jobs may run where there is no internet. Raises UserError if an address does not answer.
    """
    names = [run.config.model.init_weights for run in plan.runs]
    return planning.make(plan.request, data_root) if datasets.fetch_weights(names, data_root) else plan


def fit(width: Width | None, runs: int) -> Width:
    """Return the width that fits the machine: a worker a core (or GPU) with one thread, as many as memory allows."""
    if width is not None:
        return replace(width, workers=max(1, min(width.workers, runs)))
    gpus = len(visible_gpus())
    by_memory = max(1, int(available_gib() // scales.DECLARED_GIB))
    return Width(max(1, min(gpus or cores(), by_memory, runs)), 1)


def cores() -> int:
    """Return the number of processors that this process may use, by affinity and by control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(int(quota) / int(period))))
    return count


def available_gib() -> float:
    """Return the memory that is free to use, in GiB, by the kernel and by control group; infinite if unknown."""
    free = float("inf")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, (limit - used) / 2**30)
    return free


def visible_gpus() -> list[int]:
    """Return the GPUs of this machine by number, without asking CUDA."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [int(part) for part in listed.split(",") if part.strip().isdigit()]
    return sorted(int(path.name[6:]) for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())


def _gpu(gpus: Sequence[int], index: int) -> dict[str, Any]:
    if not gpus:
        return {}
    return {"gpus_per_node": 1, "visible_gpus": [gpus[index % len(gpus)]]}


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Give children the number of threads before their libraries are loaded, and unbuffered, plain output."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _code_importable() -> Iterator[None]:
    """Let children import this very code, wherever they are started."""
    root = str(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = root + (os.pathsep + before if before else "")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONPATH")
        else:
            os.environ["PYTHONPATH"] = before


def snapshot(plan: Plan, store: Store, max_age: float = 0.0) -> list[RunState]:
    """Return the states of the plan's runs now, in the plan's order; Slurm is asked every ``max_age`` seconds."""
    return list(planning.states(plan, store, max_age).values())


def only_new(plan: Plan, store: Store) -> Plan:
    """Return the plan's runs that were never begun; raises UserError if there are none."""
    chosen = tuple(run for run in plan.runs if not store.run(run.run_id).attempts())
    if not chosen:
        raise UserError("every run of it was begun before; launch without --new to go on with what is not done")
    return replace(plan, runs=chosen)


def only_failed(plan: Plan, store: Store, classes: Sequence[str] = ()) -> Plan:
    """Return the plan's failed runs (of these classes); raises UserError with the classes that there are."""
    failed = {state.run_id: state.failure_class for state in snapshot(plan, store) if state.state in _RETRIED}
    chosen = {run_id for run_id, kind in failed.items() if not classes or kind in classes}
    if not chosen:
        there = ", ".join(sorted(set(failed.values()))) or "none"
        raise UserError(
            f"no failed run to retry{' of class ' + ', '.join(classes) if classes else ''}; failed: {there}"
        )
    return replace(plan, runs=tuple(run for run in plan.runs if run.run_id in chosen))


_RETRIED = (State.FAILED, State.TIMEOUT, State.LOST)


def failure_classes(plan: Plan, store: Store) -> tuple[str, ...]:
    """Return the failure classes of the plan's runs."""
    return tuple({state.failure_class for state in snapshot(plan, store) if state.failure_class})
