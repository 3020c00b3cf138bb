"""What a Slurm job executes: one attempt of one run, in a process that this one watches.

submitit calls the pickled :class:`SlurmJob` in each task. The main task starts the attempt in a child and watches
it:

- SIGUSR2 (before the time limit, on preemption, by ``scancel --signal=USR2``): the child checkpoints after the
  iteration it is in, the job ends with the exit code on which its batch shell queues it again
  (:mod:`experiments.slurm.batch_shell`), and its next start goes on at the next iteration;
- SIGTERM alone (``scancel``, an external ``scontrol requeue``, preemption on a site that does not send SIGUSR2): the
  child checkpoints, and the job waits for what Slurm has in mind, since only Slurm knows;
- the child dies (SIGKILL, a crash), or loses contact with the other tasks: recorded, and the job ends to be queued
  again, until several attempts in a row came to nothing;
- the attempt fails by itself: the job fails with the reason.

The other tasks of a run on several GPUs or nodes execute :func:`experiments.execution.attempt.follow` in a child each,
say in the attempt's directory if it fails, and end with the main one.

submitit's own handler is replaced while the attempt runs: it takes every signal of a job of ten minutes or less for a
time-out, gives up after three, and fails the job if the controller is away at that moment.
"""

import contextlib
import importlib
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from experiments.execution import provenance
from experiments.execution.attempt import complete, gpu_failure, own_attempt
from experiments.execution.signals import Noted
from experiments.execution.worker import Child, Task, Work
from experiments.slurm.batch_shell import AGAIN, BROKEN, FAILED
from experiments.slurm.inside_job import deaths, last_words, oom_kills, said_by_slurm, seconds, time_left
from experiments.status import failures
from experiments.store import claims
from experiments.store.attempt_dir import AttemptRecord, Ending, FailureClass, Outcome, RankFailure
from experiments.store.files import modified
from experiments.store.launches import launch_dir
from experiments.store.run_dir import RunDir, Store
from mpformer.runtime.code import PACKAGES
from mpformer.runtime.errors import RunFailure, UserError
from mpformer.runtime.rank import current_rank

MAX_TIMEOUTS = 1_000_000
"""For submitit's ``max_num_timeout``: how often a run may be requeued is judged here, by its progress."""

MAX_DEATHS = 5
"""Attempts in a row that may die without completing anything, not even a checkpoint, before the run has failed."""

MAX_STOPS = 20
"""The same for attempts that were asked to stop."""

END_SECONDS = 900.0
"""Wait after SIGTERM for Slurm to end the job, longer than any ``KillWait``; then nobody meant it."""

CLAIM_SECONDS = 120.0
"""Wait for another job that is at work on the run: it may be one that Slurm is just ending."""

LIMIT_SECONDS = 10.0
"""Time before the limit at which an attempt that has not ended by itself is left behind, and the job requeued; a fifth
of what was left at the warning, if that is less."""

FOLLOW_SECONDS = 120.0
"""Time that the tasks of a run give each other to end by themselves."""


@dataclass(frozen=True, kw_only=True)
class SlurmJob(Work):
    """One run's stage as a job; pickled by submitit. It holds no progress: that is in the store."""

    task: Task
    code: Path | None = None
    """The snapshot of the code that must be what runs; None: whatever is imported."""

    def __call__(self) -> str:
        """Execute what is missing of the run's stage; returns how it ended.

        Raises RunFailure, with its class and reason, unless the stage's result is there: the job then exits non-zero.
        """
        check_code(self.code)
        noted = Noted()  # instead of acting on them
        with noted.signals():
            return (_Main if current_rank().main else _Other)(self, noted.received).run()


@dataclass(frozen=True)
class Coded:
    """What a job calls, under the exit codes that the batch shell knows; pickled by submitit."""

    function: Callable[[], Any]

    def __call__(self) -> Any:
        """Call it; SystemExit(FAILED) if it raises what would be the same again."""
        try:
            return self.function()
        except (RunFailure, UserError) as error:
            traceback.print_exc()
            sys.stdout.flush()
            raise SystemExit(FAILED) from error

    def checkpoint(self) -> Any:
        """Return what submitit is to execute after a requeue that came before the attempt began: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def check_code(code: Path | None) -> None:
    """Raise RunFailure("import") if a package of this project does not come from the snapshot."""
    for name in PACKAGES if code is not None else ():
        file = Path(importlib.import_module(name).__file__ or "").resolve()
        if not file.is_relative_to(Path(code or "").resolve()):
            raise RunFailure(
                FailureClass.IMPORT, f"{name} was imported from {file.parent}, not from the snapshot {code}"
            )


class _Main:
    """The task that claims the run and answers for it."""

    def __init__(self, job: SlurmJob, received: list[int]) -> None:
        self.job, self.received = job, received
        self.run_dir = Store(job.root).run(job.task.run_id)
        self.recorded: set[int] = set()
        self.early_deaths = 0
        self.deadline = float("inf")

    def run(self) -> str:
        """Execute the attempt, then return, raise, or requeue and exit; the other tasks then end too."""
        try:
            return self._run()
        finally:
            if current_rank().world_size > 1:
                self.run_dir.end_task(_task())

    def _run(self) -> str:
        ending = Ending(Outcome.SKIPPED)
        self._explain()
        while not self._complete():
            self._refuse()
            ending = self._attempt() if self._free() else ending
            if ending.outcome is Outcome.SKIPPED and not self.received:
                continue  # another process was faster
            if ending.outcome in (Outcome.FAILED, Outcome.CANCELLED):
                raise RunFailure(ending.failure_class or FailureClass.KILLED, ending.detail)
            if not self._complete():
                self._again(ending)
        return str(ending.outcome)

    def _complete(self) -> bool:
        return complete(self.run_dir, self.job.stage, self.job.task.config)

    def _explain(self) -> None:
        """Record of an earlier start of this job that did not say how it ended what Slurm wrote into the job's log."""
        last = self.run_dir.last_attempt()
        record = last.sound_record() if last is not None else None
        now = provenance.execution()
        if last is None or record is None or not record.silent or record.execution.job_id != now.job_id:
            return
        free = claims.holder(self.run_dir.claims, job=now) is None
        cause = said_by_slurm(last_words()) if free else None
        if cause is not None and (record.outcome is None or cause.failure_class is FailureClass.OOM):
            conclude(self.run_dir, replace(cause, attempt=last.number))

    def _refuse(self) -> None:
        """Raise RunFailure if the run is not to be tried (again): cancelled, failed, or a crash loop."""
        if self.run_dir.cancel_file.exists():
            raise RunFailure(FailureClass.KILLED, "cancelled by the user")
        last = self.run_dir.last_attempt()
        record = (last.sound_record() if last is not None else None) or AttemptRecord()
        kind = record.failure_class
        if last is not None and record.outcome is Outcome.FAILED and kind is not FailureClass.CLAIM_LOST:
            ours = record.launch == self.job.options.launch
            if ours or (kind.repeats and kind not in self.job.retry):
                raise RunFailure(kind, f"{record.detail} (attempt {last.number}; {self._retry(kind)} tries again)")
        give_up(self.run_dir, self.job.options.launch)

    def _retry(self, kind: FailureClass) -> str:
        """Return the command that tries runs of this class again, such that it works in any folder."""
        about = launch_dir(Store(self.job.root), self.job.launch).record()
        suite = ["SUITE"] if about is None else [about.suite, "--scale", about.scale, "--dataset", about.dataset]
        where = ["--root", str(self.job.root), "--data-root", str(self.job.options.data_root)]
        return shlex.join(["mpformer", "retry", *suite, "--class", kind, *where])

    def _free(self) -> bool:
        """Wait until nobody holds the run; False if a signal came first.

        Raises RunFailure if another job is at work on it; one that died elsewhere shows by its silence.
        """
        directory = self.run_dir.claims
        first, began = None, time.monotonic()
        while (number := claims.holder(directory, job=provenance.execution())) is not None:
            beat = (number, modified(directory / str(number)))
            first = first or beat
            claim = claims.read(directory, number)
            alive = beat != first and claim.job_id != provenance.execution().job_id
            if alive and time.monotonic() - began > CLAIM_SECONDS:
                who = f"job {claim.job_id or '?'} on {claim.host or '?'}"
                raise RunFailure(FailureClass.CLAIMED, f"{who} is at work on this run")
            if self.received:
                return False
            time.sleep(1)
        return True

    def _attempt(self) -> Ending:
        """Run the attempt in a child and return how it ended; deaths are recorded."""
        kills = oom_kills()
        child = Child(self.job, self.job.task)
        since = None
        while child.alive(1.0):
            self._pass_on(child)
            since = since or (time.monotonic() if self._failed_peer() else None)
            in_vain = since is not None and time.monotonic() - since > 10  # it waits for one that will never come
            if in_vain or time.monotonic() > self.deadline:
                child.send(signal.SIGKILL)
        return self._with_peers(child.ending() or self._death(child, oom_kills() > kills))

    def _pass_on(self, child: Child) -> None:
        """Hand signals to the child, again and again: it may not have been listening yet."""
        for number in sorted(set(self.received)):
            child.send(number)
            attempt = own_attempt(self.run_dir)
            if number not in self.recorded and attempt is not None:
                self.recorded.add(number)
                left = time_left()
                self.run_dir.attempt(attempt).add_event(
                    "SIGNAL", f"{signal.Signals(number).name}, {left or 'unknown time'} left"
                )
                if number == signal.SIGUSR2:
                    self.deadline = time.monotonic() + seconds(left) - min(LIMIT_SECONDS, seconds(left) / 5)

    def _death(self, child: Child, oom: bool) -> Ending:
        code = child.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        ending = Ending(Outcome.LOST, FailureClass.KILLED, how)
        if oom:
            detail = "out of memory: the kernel killed it at the job's limit"
            ending = Ending(Outcome.FAILED, FailureClass.OOM, detail)
        elif time.monotonic() > self.deadline:
            detail = "did not end in time after SIGUSR2; raise the profile's signal_delay"
            ending = Ending(Outcome.LOST, FailureClass.TIMEOUT, detail)
        attempt = own_attempt(self.run_dir)
        if attempt is None:  # before it had begun: no file can count such deaths, so they are counted here
            self.early_deaths += 1
            early = self.early_deaths < MAX_DEATHS
            return Ending(Outcome.SKIPPED) if early else replace(ending, outcome=Outcome.FAILED)
        said = failures.read([self.run_dir.attempt(attempt).log])
        broken = ending.outcome is Outcome.LOST and said.kind is FailureClass.GPU
        ending = gpu_failure(said.lines[-1], attempt) if broken else replace(ending, attempt=attempt)
        conclude(self.run_dir, ending)
        return ending

    def _peers(self) -> list[RankFailure]:
        """What other tasks said of their failures in the attempt that is under way or has just ended."""
        last = self.run_dir.last_attempt()
        return last.rank_failures() if last is not None else []

    def _failed_peer(self) -> bool:
        return current_rank().world_size > 1 and bool(self._peers())

    def _with_peers(self, ending: Ending) -> Ending:
        """Say the cause of a failure that began in another task."""
        if current_rank().world_size == 1 or ending.outcome not in (Outcome.FAILED, Outcome.LOST) or self._complete():
            return ending
        end = time.monotonic() + 10
        while ending.failure_class is FailureClass.NODE and not self._peers() and time.monotonic() < end:
            time.sleep(0.5)
        causes = [peer for peer in self._peers() if peer.failure_class is not FailureClass.NODE]
        if causes and (ending.failure_class is FailureClass.NODE or ending.outcome is Outcome.LOST):
            first = causes[0]
            outcome = Outcome.LOST if first.failure_class is FailureClass.KILLED else Outcome.FAILED
            ending = Ending(outcome, first.failure_class, f"rank {first.rank}: {first.detail}", ending.attempt)
        elif ending.failure_class is FailureClass.NODE:
            ending = replace(ending, outcome=Outcome.LOST)
        conclude(self.run_dir, ending)
        return ending

    def _again(self, ending: Ending) -> NoReturn:
        """Have the job queued again, unless Slurm has something else in mind, or too much of this came to nothing."""
        if signal.SIGUSR2 not in self.received and signal.SIGTERM in self.received:
            self._wait_for_the_end()
        give_up(self.run_dir, self.job.options.launch)
        left = time_left() or "unknown time"
        if ending.attempt:
            lost = ending.outcome is Outcome.LOST
            conclude(self.run_dir, ending if lost else replace(ending, outcome=Outcome.REQUEUED))
            self.run_dir.attempt(ending.attempt).add_event(
                "REQUEUED", f"the job is to be queued again, with {left} left"
            )
        sys.exit(BROKEN if ending.failure_class is FailureClass.GPU else AGAIN)

    def _wait_for_the_end(self) -> None:
        end = time.monotonic() + END_SECONDS
        while signal.SIGUSR2 not in self.received and time.monotonic() < end:
            time.sleep(1)


class _Other:
    """A task that helps the main one to train."""

    def __init__(self, job: SlurmJob, received: list[int]) -> None:
        self.job, self.received = job, received
        self.run_dir = Store(job.root).run(job.task.run_id)

    def run(self) -> str:
        """Follow the main task until its attempt is over; SystemExit(1) unless the stage's result is there."""
        if self._complete():
            return "nothing was left to do"
        child = Child(self.job, self.job.task)
        attempt = None
        while not self._over(attempt):
            attempt = attempt or own_attempt(self.run_dir)
            if child.alive(1.0):
                for number in sorted(set(self.received)):
                    child.send(number)
            elif attempt is not None:
                self._report(child, attempt)
                time.sleep(1)
        if child.alive(10.0):
            child.send(signal.SIGKILL)
        if not self._complete():
            self._leave()
        return "followed"

    def _complete(self) -> bool:
        return complete(self.run_dir, self.job.stage, self.job.task.config)

    def _over(self, attempt: int | None) -> bool:
        if self._complete() or self.run_dir.task_ended(_task()):
            return True
        record = self.run_dir.attempt(attempt).sound_record() if attempt is not None else None
        return record is not None and record.outcome is not None

    def _report(self, child: Child, attempt: int) -> None:
        """Tell the main task that this one's process failed, so that it need not wait for it."""
        ending = child.ending()
        if ending is None and child.killed_by:
            how = f"killed by {signal.Signals(child.killed_by).name}"
            ending = Ending(Outcome.FAILED, FailureClass.KILLED, how)
        if ending is not None and ending.outcome is Outcome.FAILED:
            failure = RankFailure(current_rank().number, ending.failure_class, ending.detail, time.time())
            self.run_dir.attempt(attempt).write_rank_failure(failure)

    def _leave(self) -> NoReturn:
        """Give Slurm time to end the job if it is being requeued: leaving first would look like a failure."""
        end = time.monotonic() + FOLLOW_SECONDS
        while not self.run_dir.task_ended(_task()) and time.monotonic() < end:
            time.sleep(1)
        sys.exit(1)


def _task() -> str:
    """The name of this start of the job's step, by which its main task says to the others that it has ended."""
    execution = provenance.execution()
    return f"{execution.job_id}-{execution.step}-{execution.restarts}"


def conclude(run: RunDir, ending: Ending) -> None:
    """Write how an attempt really ended, where this process knows more than the attempt itself."""
    if ending.attempt:
        with contextlib.suppress(OSError):
            run.attempt(ending.attempt).conclude(ending)


def give_up(run: RunDir, launch: str) -> None:
    """Record a crash loop as the run's failure and raise it: too many attempts of this launch in a row came to nothing.

    Something came of an attempt if a checkpoint, the trained weights or a result was completed in it; one whose start
    of the job the infrastructure ended does not count.
    """
    mark, excused = run.progress_mark(), {(death.job_id, death.start) for death in deaths()}
    vain: list[AttemptRecord] = []
    for number in reversed(run.attempts()):
        record = run.attempt(number).sound_record()
        if record is None or record.launch != launch or record.found != mark:
            break
        if (record.execution.job_id, record.execution.restarts) not in excused:
            vain.append(record)
    if sum(record.silent for record in vain) < MAX_DEATHS and len(vain) < MAX_STOPS:
        return
    kind = vain[0].failure_class or FailureClass.KILLED
    last = vain[0].detail or "it did not say how it ended"
    detail = f"{len(vain)} attempts in a row completed nothing, the last: {last}"
    conclude(run, Ending(Outcome.FAILED, kind, detail, max(run.attempts())))
    raise RunFailure(kind, detail)
