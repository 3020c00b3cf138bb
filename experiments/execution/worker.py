"""A worker job: claims the next missing run, executes it in a process of its own, and goes on until none is left."""

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from experiments.execution.attempt import Options, Runner, Stage, run_attempt
from experiments.status.states import derive, should_start
from experiments.store import claims
from experiments.store.attempt_dir import Ending, FailureClass, Outcome
from experiments.store.launches import LaunchDir
from experiments.store.run_dir import RunDir, Store
from mpformer.config.schema import Config
from mpformer.runtime.errors import UserError
from mpformer.runtime.signals import handled

MAX_LOST = 3
"""Attempts of one launch that may die without progress before the launch leaves a run alone."""


@dataclass(frozen=True)
class Task:
    """A run to execute, with the runtime and evaluation settings of this launch."""

    run_id: str
    eval_id: str
    config: Config


@dataclass(frozen=True)
class Work:
    """What every process of a launch needs to know; pickled into a job."""

    root: Path
    """The store's."""
    launch: str
    options: Options
    stage: Stage = "all"
    retry: tuple[str, ...] = ()
    """Failure classes of earlier launches to try again that would otherwise be left alone."""
    runner: Runner | None = None
    """None: the real model."""


@dataclass(frozen=True, kw_only=True)
class WorkerJob(Work):
    """What a worker does."""

    tasks: tuple[Task, ...]
    """In the order in which to try them."""

    @property
    def directory(self) -> LaunchDir:
        """The launch's directory."""
        return LaunchDir(self.root / "launches" / self.launch)


def work(job: WorkerJob) -> dict[str, str]:
    """Execute the missing runs one after the other; returns how each attempt of this worker ended."""
    ended: list[tuple[str, str]] = []
    with job.directory.worker():
        while not _stopped(job) and (task := _next(job, [run_id for run_id, _ in ended])) is not None:
            ended.append((task.run_id, _in_process(job, task)))
            print(": ".join(ended[-1]), flush=True)
    return dict(ended)


def _next(job: WorkerJob, tried: Sequence[str]) -> Task | None:
    """The next run to execute; ``tried`` are those that this worker has had in hand, once for each time."""
    store = Store(job.root)
    for task in job.tasks:
        run = store.run(task.run_id)
        given_up = tried.count(task.run_id) >= MAX_LOST or _exhausted(run, job.launch) or run.cancel_file.exists()
        if not given_up and should_start(derive(run, task.eval_id), job.retry):
            return task
    return None


def _exhausted(run: RunDir, launch: str) -> bool:
    """Whether this launch has already tried the run in vain: one failure, or several deaths."""
    records = [run.attempt(number).sound_record() for number in run.attempts()]
    mine = [record for record in records if record is not None and record.launch == launch]
    return any(not record.silent for record in mine) or len(mine) >= MAX_LOST


def _stopped(job: WorkerJob) -> bool:
    return job.options.stop_file is not None and job.options.stop_file.exists()


def _in_process(job: WorkerJob, task: Task) -> str:
    """Run one attempt in a child: what kills it (memory, a crash) leaves the worker alive to go on."""
    child = Child(job, task)
    with handled({signal.SIGTERM: lambda number, _: child.send(number)}):  # it checkpoints and ends
        while child.alive(5.0):
            with contextlib.suppress(OSError):
                os.utime(job.directory.file)
    if child.killed_by:
        how = f"killed by {signal.Signals(child.killed_by).name}"
        mark_killed(Store(job.root).run(task.run_id), how)
        return how
    return "ended" if child.process.exitcode == 0 else f"failed (exit code {child.process.exitcode})"


class Child:
    """A process that executes one attempt of a run, so that its death is seen by one that goes on."""

    def __init__(self, work: Work, task: Task) -> None:
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(work, task, sender), name=task.run_id)
        self.process.start()
        sender.close()

    def alive(self, seconds: float) -> bool:
        """Wait that long for its end at most; whether it still runs."""
        self.process.join(seconds)
        return self.process.is_alive()

    def send(self, number: int) -> None:
        """Send it a signal."""
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    @property
    def killed_by(self) -> int:
        """The signal that killed it, 0 for none."""
        return max(0, -(self.process.exitcode or 0))

    def ending(self) -> Ending | None:
        """Return how the attempt ended; None if the process died without saying so."""
        try:
            return self._receiver.recv() if self._receiver.poll() else None
        except EOFError:
            return None


def _child(work: Work, task: Task, sender: Connection) -> None:
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the launching terminal arrives as a stop file
    # until the attempt looks out for them: nothing is lost yet by dying; who sends SIGUSR2 sends it again
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        ending = run_attempt(work.root, task.run_id, work.stage, work.options, work.runner, task.config)
    except UserError as error:
        print(f"{task.run_id}: {error}", file=sys.stderr, flush=True)
        sender.send(Ending(Outcome.FAILED, FailureClass.CONFIG, str(error)))
        os._exit(2)
    sender.send(ending)
    sys.stdout.flush()
    os._exit(1 if ending.outcome is Outcome.FAILED else 0)


def mark_killed(run: RunDir, detail: str) -> None:
    """Record the death of the attempt that has just died, unless another one has begun meanwhile."""
    last = run.last_attempt()
    if last is not None and claims.holder(run.claims) is None:
        with contextlib.suppress(OSError):
            last.conclude(Ending(Outcome.LOST, FailureClass.KILLED, detail), only_if_open=True)


def _die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the worker dies: the child then checkpoints instead of running on unwatched."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
