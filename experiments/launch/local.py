"""Launching on this machine: the missing runs are handed to worker processes, which outlive the command.

Each worker is :func:`experiments.execution.worker.work`, a process that submitit's local executor starts.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.execution.attempt import Options, Runner, run_attempt
from experiments.execution.worker import Task, WorkerJob, work
from experiments.launch.begin import begin, record, uncancel
from experiments.launch.machine import Width, fit, visible_gpus
from experiments.launch.profiles import LocalProfile
from experiments.store.attempt_dir import Ending, Stop, StopReason
from experiments.store.launches import LaunchDir, LaunchRecord
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan, PlannedRun
from mpformer.runtime import code
from mpformer.runtime.errors import UserError
from mpformer.runtime.signals import Handler, handled


def _start_workers(job: WorkerJob, width: Width, folder: Path) -> tuple[Any, ...]:
    """Start the processes that all work on a job, and outlive this one; returns submitit's jobs."""
    import submitit

    # never AutoExecutor's guess: it takes Slurm where srun is on the path
    executor = submitit.LocalExecutor(folder)
    gpus, started = visible_gpus(), []
    for index in range(width.workers):
        executor.update_parameters(timeout_min=_FOREVER_MINUTES, stderr_to_stdout=True, **_gpu(gpus, index))
        # children have the number of threads before their libraries are loaded, and this very code to import
        with code.variables(code.environment(width.threads)), handled(_IGNORED):
            started.append(executor.submit(work, job))
    return tuple(started)


def _telling(trace: str) -> str:
    """The line of a printed traceback that says what went wrong."""
    lines = [line for line in trace.splitlines() if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line)]
    return lines[-1] if lines else trace.strip()[:200]


_FOREVER_MINUTES = 60 * 24 * 365

_IGNORED: Mapping[int, Handler] = {signal.SIGINT: signal.SIG_IGN, signal.SIGHUP: signal.SIG_IGN}
"""Children inherit ignored signals: Ctrl-C and a closed terminal reach the launcher alone, which asks properly."""


@dataclass(frozen=True)
class Launch:
    """What a launch started; ``started`` is empty if every run was done or in other hands."""

    id: str
    directory: Path
    started: tuple[PlannedRun, ...]
    width: Width
    left_alone: dict[str, str]
    """Failed runs that would fail again, with their failure class."""
    workers: tuple[Any, ...] = ()
    """submitit's jobs, processes of this machine that outlive this one."""

    def working(self) -> bool:
        """Whether one of this launch's workers still runs."""
        return any(not job.done() for job in self.workers)

    def problems(self) -> list[str]:
        """The exceptions of the workers themselves, and workers that died."""
        found = []
        for job in self.workers:
            if not job.paths.result_pickle.exists():
                found.append(f"worker {job.job_id} died; its log: {job.paths.stdout}")
            elif (error := job.exception()) is not None:
                found.append(f"worker {job.job_id}: {_telling(str(error))}; its log: {job.paths.stdout}")
        return found

    def kill(self) -> None:
        """End the workers now; their runs continue from the last checkpoint at the next launch."""
        for pid in LaunchDir(self.directory).live_workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def start(plan: Plan, store: Store, profile: LocalProfile, *, command: str = "", retry: tuple[str, ...] = ()) -> Launch:
    """Launch as a profile says: see :func:`launch`."""
    width = Width(profile.workers or fit(None, len(plan.unique)).workers, profile.threads)
    return launch(plan, store, command=command, width=width, retry=retry, notify=profile.notify)


def launch(
    plan: Plan,
    store: Store,
    *,
    command: str = "",
    width: Width | None = None,
    retry: tuple[str, ...] = (),
    runner: Runner | None = None,
    notify: str | None = None,
) -> Launch:
    """Start what is missing of a plan and return at once.

    Raises UserError if data or weights are missing, OSError if the store cannot be written.
    """
    with begin(plan, store, command, retry) as beginning:
        missing = beginning.missing
        width = fit(width, len(missing))
        found = Launch(beginning.id, beginning.directory, missing, width, beginning.left_alone)
        if not missing:
            return found
        here = LaunchDir(beginning.directory)
        options = Options(plan.data_root.resolve(), found.id, width.threads, here.stop_file.resolve())
        tasks = tuple(Task(run.run_id, run.eval_id, run.config) for run in missing)
        job = WorkerJob(store.root.resolve(), found.id, options, retry=retry, runner=runner, tasks=tasks)
        about = LaunchRecord(
            plan.suite.name, plan.scale, plan.dataset, command, tuple(run.run_id for run in missing), time.time(),
            notify, workers=width.workers,
        )  # fmt: skip
        here.write(about)
        try:
            workers = _start_workers(job, width, here.jobs)
        except KeyboardInterrupt:
            here.ask_to_stop(StopReason(Stop.INTERRUPTED, "the launch"))  # those that have been started
            raise
        return replace(found, workers=workers)


def inline(plan: Plan, store: Store, command: str = "", runner: Runner | None = None) -> Ending:
    """Execute the plan's only run in this process, for a debugger; raises UserError if there are several."""
    if len(plan.unique) != 1:
        raise UserError(f"--inline executes one run, this is {len(plan.unique)}; name one with --row and --seed")
    if plan.missing:
        raise UserError("; ".join(plan.missing))
    record(plan, store, command)
    uncancel(plan.unique, store)
    run = plan.unique[0]
    options = Options(plan.data_root.resolve(), "inline", capture=False)
    return run_attempt(store.root.resolve(), run.run_id, "all", options, runner, run.config)


def _gpu(gpus: Sequence[int], index: int) -> dict[str, Any]:
    if not gpus:
        return {}
    return {"gpus_per_node": 1, "visible_gpus": [gpus[index % len(gpus)]]}
