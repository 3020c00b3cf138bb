"""What a Slurm job executes: one attempt of one run, in a process that this one watches.

submitit calls the pickled :class:`SlurmJob` in each task. The main task starts the attempt in a child and sees to what
becomes of it:

- SIGUSR2 (before the time limit, on preemption, by ``scancel --signal=USR2``): the child checkpoints after the
  iteration it is in, the job requeues itself, and its next start goes on at the next iteration;
- SIGTERM alone (``scancel``, an external ``scontrol requeue``, preemption on a site that does not send SIGUSR2): the
  child checkpoints, and the job waits for what Slurm has in mind, since only Slurm knows;
- the child dies (SIGKILL, a crash): recorded, and the job requeues itself, until some attempts came to nothing;
- the attempt fails by itself: the job fails with the reason.

submitit's own handler is replaced while the attempt runs: it takes every signal of a job of ten minutes or less for a
time-out, gives up after three, and fails the job if the controller is away at that moment.
"""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from experiments.attempt import Options, Outcome, Runner, Stage, complete
from experiments.store import Store
from experiments.worker import Child, Task, mark_killed
from mpformer.errors import RunFailure

MAX_TIMEOUTS = 1_000_000
"""For submitit's ``max_num_timeout``: how often a run may be requeued is judged here, by its progress."""

END_SECONDS = 900.0
"""Wait after SIGTERM for Slurm to end the job, longer than any ``KillWait``; then nobody meant it."""

REQUEUE_SECONDS = 600.0
"""Time in which the controller has to answer when the job wants to be requeued."""

PACKAGES = ("analysis", "mpformer", "experiments", "reports")


@dataclass(frozen=True)
class SlurmJob:
    """One run's stage as a job; pickled by submitit. It holds no progress: that is in the store."""

    root: Path
    launch: str
    task: Task
    options: Options
    stage: Stage = "all"
    retry: tuple[str, ...] = ()
    runner: Runner | None = None
    code: Path | None = None
    """The snapshot of the code that must be what runs; None: whatever is imported."""

    def __call__(self) -> str:
        """Execute what is missing of the run's stage; returns how it ended.

        Raises RunFailure, with its class and reason, unless the stage's result is there: the job then exits non-zero.
        """
        check_code(self.code)
        with _signals() as received:
            return _Main(self, received).run()

    def checkpoint(self) -> Any:
        """Return what submitit is to execute after a requeue that came before the attempt began: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def check_code(code: Path | None) -> None:
    """Raise RunFailure("import") if a package of this project does not come from the snapshot."""
    for name in PACKAGES if code is not None else ():
        file = Path(importlib.import_module(name).__file__ or "").resolve()
        if not file.is_relative_to(Path(code or "").resolve()):
            raise RunFailure("import", f"{name} was imported from {file.parent}, not from the snapshot {code}")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Note SIGTERM and SIGUSR2 in the list instead of acting on them."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Main:
    """The task that claims the run and answers for it."""

    def __init__(self, job: SlurmJob, received: list[int]) -> None:
        self.job, self.received = job, received
        self.run_dir = Store(job.root).run(job.task.run_id)

    def run(self) -> str:
        """Execute the attempt, then return, raise, or requeue and exit."""
        if self._complete():
            return "nothing was left to do"
        self._refuse()
        self._wait_for_claim()
        outcome = self._attempt()
        if self._complete():
            return outcome.name
        if outcome.name == "failed":
            raise RunFailure(outcome.failure_class, outcome.detail)
        if outcome.name == "cancelled":
            raise RunFailure("killed", "cancelled by the user")
        self._refuse()
        self._requeue(outcome)

    def _complete(self) -> bool:
        return complete(self.run_dir, self.job.stage, self.job.task.config)

    def _refuse(self) -> None:
        """Raise RunFailure if the run is not to be tried (again): cancelled, failed, or a crash loop."""
        if self.run_dir.cancel_file.exists():
            raise RunFailure("killed", "cancelled by the user")

    def _wait_for_claim(self) -> None:
        pass

    def _attempt(self) -> Outcome:
        child = Child(self.job, self.job.task)
        while child.alive(1.0):
            for number in set(self.received):
                child.send(number)  # again and again: it may not have been listening yet
        outcome = child.outcome()
        if outcome is None:
            name = signal.Signals(child.killed_by).name if child.killed_by else f"exit code {child.process.exitcode}"
            mark_killed(self.run_dir, f"killed by {name}")
            return Outcome("lost", "killed", f"killed by {name}")
        return outcome

    def _requeue(self, outcome: Outcome) -> NoReturn:
        requeue()
        time.sleep(60)
        sys.exit(1)


def requeue() -> None:
    """Ask Slurm to queue this job again; tries for a while, since the controller may be away."""
    end = time.monotonic() + REQUEUE_SECONDS
    while True:
        done = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True)
        if done.returncode == 0:
            return
        if time.monotonic() > end:
            raise RunFailure("killed", f"the job could not be requeued: {done.stderr.strip()}")
        time.sleep(5)
