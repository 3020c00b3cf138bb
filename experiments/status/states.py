"""The state of a run, derived from its files first; what Slurm says of its job comes second.

Files are the truth about what was done: a job that Slurm calls COMPLETED without a result is no success, and a run with
a result is done whatever Slurm says. Slurm is the truth about what is to come, and about how a job ended that could
not say so itself. Where neither knows, the state is UNKNOWN.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from experiments.status import failures, scheduler
from experiments.status.scheduler import NEVER, NOWHERE, Job, Placement
from experiments.store import claims
from experiments.store.attempt_dir import AttemptDir, AttemptRecord, FailureClass, Outcome, Progress
from experiments.store.files import modified
from experiments.store.records import RecordError
from experiments.store.run_dir import RunDir


class State(StrEnum):
    """Where a run stands, in the order in which states are listed."""

    DONE = "DONE"
    TRAINED = "TRAINED"
    RUNNING = "RUNNING"
    REQUEUED = "REQUEUED"
    QUEUED = "QUEUED"
    PLANNED = "PLANNED"
    FAILED = "FAILED"
    TIMEOUT = "TIMEOUT"
    LOST = "LOST"
    CANCELLED = "CANCELLED"
    VOID = "VOID"
    UNKNOWN = "UNKNOWN"

    @property
    def failed(self) -> bool:
        """Whether an attempt ended against everybody's will."""
        return self in (State.FAILED, State.LOST, State.TIMEOUT)


ENDED: Mapping[Outcome, State] = {
    Outcome.FAILED: State.FAILED,
    Outcome.CANCELLED: State.CANCELLED,
    Outcome.INTERRUPTED: State.CANCELLED,
    Outcome.TIMEOUT: State.TIMEOUT,
    Outcome.REQUEUED: State.REQUEUED,
    Outcome.LOST: State.LOST,
}
"""State that an attempt's outcome leaves a run in, unless its files say that more is complete."""

SUBMISSION_SECONDS = 60.0
"""Time in which sbatch has answered, or never will."""


@dataclass(frozen=True)
class RunState:
    """The state of one run for one evaluation setting, with what is known of its progress."""

    run_id: str
    state: State
    detail: str = ""
    failure_class: FailureClass = FailureClass.NONE
    attempt: int = 0
    progress: Progress = field(default_factory=Progress)
    metrics: Mapping[str, float] = field(default_factory=dict)
    job: str = ""
    """The Slurm job that has, or had, the run in hand; empty if there is none."""
    lines: tuple[str, ...] = ()
    """What the logs tell of a failure that did not name itself."""
    live: bool = False
    """Whether Slurm will do something with the run, or may, for all that is known."""
    stuck: bool = False
    """Whether its job waits for somebody to act."""

    @property
    def label(self) -> str:
        """The state as it is shown, such as ``FAILED(nan)``."""
        shown = self.failure_class and self.state is not State.TIMEOUT
        return f"{self.state}({self.failure_class})" if shown else str(self.state)

    @property
    def active(self) -> bool:
        """Whether something works on the run or is about to."""
        return self.state in (State.RUNNING, State.QUEUED) or self.live


def derive(
    run: RunDir,
    eval_id: str,
    queued: frozenset[str] = frozenset(),
    placements: Mapping[str, Placement] = NOWHERE,
) -> RunState:
    """Return the run's state.

    ``queued`` are the runs that a live launch of this machine is going to start, ``placements`` says where Slurm has
    runs (:func:`experiments.status.scheduler.placements`).
    """
    return finished(run, eval_id) or unfinished(run, queued, placements)


def _unreadable(run: RunDir, error: RecordError) -> RunState:
    return RunState(run.run_id, State.UNKNOWN, " ".join(str(error).split()))


def finished(run: RunDir, eval_id: str) -> RunState | None:
    """Return the state of a run that is done or void, None for any other: what no scheduler has a say in."""
    try:
        return _finished(run, eval_id)
    except RecordError as error:
        return _unreadable(run, error)


def _finished(run: RunDir, eval_id: str) -> RunState | None:
    void = run.void()
    if void is not None:
        return RunState(run.run_id, State.VOID, detail=void.reason)
    result = run.result(eval_id)
    if result is None:
        return None
    number = result.attempt or max(run.attempts(), default=0)
    at = Progress(iteration=result.iteration)
    return RunState(run.run_id, State.DONE, attempt=number, progress=at, metrics=result.metrics)


def unfinished(
    run: RunDir, queued: frozenset[str] = frozenset(), placements: Mapping[str, Placement] = NOWHERE
) -> RunState:
    """Return the state of a run that is neither done nor void; see :func:`derive`."""
    try:
        return _unfinished(run, queued, placements.get(run.run_id))
    except RecordError as error:
        return _unreadable(run, error)


def _unfinished(run: RunDir, queued: frozenset[str], placement: Placement | None) -> RunState:
    attempt = run.last_attempt()
    if _holder(run, placement) is not None:
        return _running(run, attempt, placement)
    last = _Last(run, attempt, attempt.record() if attempt is not None else None)
    if run.cancel_file.exists():
        return _cancelled(last, placement)
    found = None if placement is None or last.newer_than(placement) else _placed(last, placement)
    if found is not None:
        return found
    if run.run_id in queued:
        return last.state(State.QUEUED)
    return _resting(last)


def _holder(run: RunDir, placement: Placement | None) -> int | None:
    """The live claim on the run; Slurm's word that its job does not run outweighs a claim that has not yet expired."""
    directory = run.claims
    number = claims.holder(directory)
    job = placement.job if placement is not None else None
    if number is None or placement is None or job is None or not (job.waiting or job.over):
        return number
    claim = claims.read(directory, number)
    if claim.job_id not in (job.id, job.raw_id) or claim.dead() is not None:
        return number
    beat = modified(directory / str(number))
    return number if not beat or beat > placement.time - 2 * claims.HEARTBEAT_PERIOD else None


def _running(run: RunDir, attempt: AttemptDir | None, placement: Placement | None) -> RunState:
    progress = attempt.progress() if attempt is not None else Progress()
    number = attempt.number if attempt is not None else 0
    job = placement.element if placement is not None else ""
    return RunState(run.run_id, State.RUNNING, progress.stage, attempt=number, progress=progress, job=job)


@dataclass(frozen=True)
class _Last:
    """A run's last attempt, if there was one; without a record if it died before it could say what it does."""

    run: RunDir
    attempt: AttemptDir | None
    known: AttemptRecord | None

    @property
    def record(self) -> AttemptRecord:
        """Its record, an empty one if there is none."""
        return self.known or AttemptRecord()

    @property
    def number(self) -> int:
        """Its number; 0 if there was none."""
        return self.attempt.number if self.attempt is not None else 0

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None if it has not said."""
        return None if self.record.silent else self.record.outcome

    @property
    def began(self) -> float:
        return self.record.started or 0.0

    @property
    def ended(self) -> float:
        return self.record.ended or self.began

    def of(self, placement: Placement) -> bool:
        """Whether it is an attempt of the launch that gave the run to Slurm."""
        return self.known is not None and self.known.launch == placement.submission.launch

    def newer_than(self, placement: Placement) -> bool:
        """Whether it has moved on since Slurm was asked, or belongs to somebody who came later."""
        job = placement.job
        over = job is None or job.over
        return self.ended > placement.time or (
            over and not self.of(placement) and self.began > placement.submission.time
        )

    def state(
        self, state: State, detail: str = "", failure_class: FailureClass = FailureClass.NONE, **more: Any
    ) -> RunState:
        """The run's state, with what this attempt knows of its progress."""
        progress = self.attempt.progress() if self.attempt is not None else Progress()
        return RunState(self.run.run_id, state, detail, failure_class, self.number, progress, **more)

    def failure(self, placement: Placement | None) -> failures.Failure:
        """What the logs tell of its end: its own, unless it said itself how it ended, and its job's."""
        ours = self.attempt is not None and (placement is None or (self.of(placement) and self.record.silent))
        log = self.attempt.log if self.attempt is not None and ours else None
        store = self.run.root
        return failures.read((log, scheduler.log_of(store, placement) if placement is not None else None))


def _cancelled(last: _Last, placement: Placement | None) -> RunState:
    if placement is None or placement.job is None or not placement.live:
        return last.state(State.CANCELLED, "by the user")
    detail = f"by the user; Slurm still has job {placement.element} ({placement.job.state})"
    return last.state(State.CANCELLED, detail, job=placement.element)


def _placed(last: _Last, placement: Placement) -> RunState | None:
    """The state of a run that was given to Slurm and that nobody has claimed; None if Slurm has nothing to add."""
    job = placement.job
    if job is None:
        return _gone(last, placement) if placement.answered else _unanswered(last, placement)
    if job.waiting:
        return _waiting(last, placement, job)
    if job.running:
        return _begun(last, placement, job)
    if job.over:
        return _over(last, placement, job)
    detail = f"Slurm says {job.state}, which is not known here"
    return last.state(State.UNKNOWN, detail, job=placement.element, live=True)


def _unanswered(last: _Last, placement: Placement) -> RunState | None:
    """Nothing but what the attempt said of its own end is certain, unless it left its job to come back."""
    if last.of(placement) and last.outcome not in (None, Outcome.REQUEUED, Outcome.INTERRUPTED):
        return None
    seen = f"; Slurm said {placement.seen}" if placement.seen else ""
    detail = f"Slurm does not answer about job {placement.element}{seen}"
    return last.state(State.UNKNOWN, detail, job=placement.element, live=True)


def _gone(last: _Last, placement: Placement) -> RunState | None:
    """A job that is neither in the queue nor accounted for; a cancelled element that waited leaves no trace at all."""
    if last.of(placement):
        if last.outcome is not Outcome.REQUEUED:
            return None
        return last.state(
            State.LOST, f"requeued, but Slurm has no job {placement.element} any more", job=placement.element
        )
    if placement.submission.unrecorded:
        if placement.time - placement.submission.time < SUBMISSION_SECONDS:
            return last.state(State.QUEUED, "being submitted", job=placement.element, live=True)
        return None  # the launcher died before it reached Slurm
    if scheduler.log_of(last.run.root, placement) is None:
        detail = f"job {placement.element} left the queue before it began: it was cancelled while it waited"
        return last.state(State.CANCELLED, detail, job=placement.element)
    found = last.failure(placement)
    detail = found.lines[-1] if found.lines else f"job {placement.element} ended before the attempt began"
    return last.state(State.LOST, detail, found.kind or FailureClass.KILLED, job=placement.element)


def _waiting(last: _Last, placement: Placement, job: Job) -> RunState:
    if job.reason == NEVER:
        return last.state(State.LOST, f"job {job.id} never starts: what it depends on failed", job=job.id)
    again = last.of(placement) or job.state.startswith("REQUEUE") or "requeued" in job.reason
    detail = job.reason or job.state.lower()
    if job.held:
        elsewhere = f"--clusters={job.clusters} " if job.clusters else ""
        detail = f"held ({detail}): scontrol {elsewhere}release {job.id}"
    elif job.hopeless:
        detail = f"never starts as it is ({detail}): change the profile's {job.hopeless}, cancel, and launch again"
    stuck = job.held or bool(job.hopeless)
    return last.state(State.REQUEUED if again else State.QUEUED, detail, job=job.id, live=True, stuck=stuck)


def _begun(last: _Last, placement: Placement, job: Job) -> RunState | None:
    """A job with processes, but no live claim on the run: it is about to begin, or about to end."""
    fresh = not last.of(placement) or (job.started is not None and job.started > last.ended)
    if last.outcome is Outcome.REQUEUED and not fresh:
        return last.state(State.REQUEUED, "the job is being queued again", job=job.id, live=True)
    if last.outcome is Outcome.INTERRUPTED and not fresh:
        detail = f"the attempt was {last.record.detail.partition(';')[0]}; Slurm has not ended the job yet"
        return last.state(State.RUNNING, detail, job=job.id, live=True)
    if last.outcome and not fresh:
        return None
    detail = "the job has begun, the attempt not yet" if fresh else "the job runs, its attempt is gone"
    if job.state in ("SUSPENDED", "STOPPED"):
        detail = f"Slurm has {job.state.lower()} the job"
    return last.state(State.RUNNING, detail, job=job.id, live=True)


_SCHEDULERS = (FailureClass.OOM, FailureClass.TIMEOUT, FailureClass.NODE)
"""What Slurm writes into the log of a job that it ends, whatever it then says of the job."""


def _over(last: _Last, placement: Placement, job: Job) -> RunState | None:
    """A job that ended; what its attempt said of its own end comes first, unless the job was to come back."""
    back = (None, Outcome.REQUEUED, *([Outcome.INTERRUPTED] if job.state == "PREEMPTED" else []))
    if last.of(placement) and last.outcome not in back:
        return None
    ending = scheduler.ENDED[job.state]
    state, kind, detail = ENDED[ending.outcome], ending.failure_class, ending.detail
    if state is State.CANCELLED or kind in (FailureClass.NONE, FailureClass.KILLED):
        found = last.failure(placement)
        if found.kind in _SCHEDULERS or (state in (State.FAILED, State.LOST) and found.kind):
            state = State.TIMEOUT if found.kind is FailureClass.TIMEOUT else State.FAILED
            kind, detail = found.kind, found.lines[-1]
    where = f" on {job.nodes}" if job.nodes else ""
    code = f", exit code {job.exit_code}" if job.exit_code not in ("", "0:0") else ""
    return last.state(state, f"{detail} (job {job.id}{where}: {job.state}{code})", kind, job=job.id)


def _resting(last: _Last) -> RunState:
    """The state of a run that nothing works on: by its last attempt, then by what is complete."""
    if last.attempt is None:
        return _untouched(last.run)
    if last.known is None:
        return last.state(State.LOST, "the attempt died before it began", FailureClass.KILLED)
    outcome, detail, kind = last.known.outcome, last.known.detail, last.known.failure_class
    if outcome is None:
        detail, kind = "the process is gone and did not say how it ended", FailureClass.KILLED
    lines: tuple[str, ...] = ()
    if last.known.silent or (outcome is Outcome.FAILED and kind in _UNEXPLAINED):
        found = last.failure(None)
        kind, lines = found.kind or kind, found.lines
    if outcome is None or outcome in ENDED:
        return last.state(ENDED[outcome or Outcome.LOST], detail, kind, lines=lines)
    if last.run.trained() is not None:
        return last.state(State.TRAINED)
    return last.state(State.UNKNOWN, f"attempt {last.number} ended as {outcome} but left no result")


_UNEXPLAINED = (FailureClass.NONE, FailureClass.ERROR, FailureClass.KILLED)
"""Failure classes of which the logs may know more."""


def _untouched(run: RunDir) -> RunState:
    if not run.exists() and run.path.exists() and any(run.path.iterdir()):
        return RunState(run.run_id, State.UNKNOWN, "the directory has no run.json")
    if run.exists():
        run.record()
    if run.trained() is not None:
        return RunState(run.run_id, State.TRAINED)
    return RunState(run.run_id, State.PLANNED)


def should_start(state: RunState, retry: tuple[str, ...] = ()) -> bool:
    """Whether a launch works on a run in this state.

    Runs that are done or being worked on are left alone, those that Slurm may still have, and failures that would
    repeat, unless their class is in ``retry``.
    """
    if state.live:
        return False
    if state.state is State.FAILED and state.failure_class.repeats:
        return state.failure_class in retry
    return state.state not in (State.DONE, State.RUNNING, State.QUEUED)
