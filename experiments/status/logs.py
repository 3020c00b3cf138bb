"""What ``mpformer logs`` prints: an attempt's log, followed through requeues, and what the run's Slurm job wrote."""

import time
from collections.abc import Iterator, Sequence

from experiments.status import scheduler, standing
from experiments.status.states import RunState, State
from experiments.store import claims
from experiments.store.identity import eval_id
from experiments.store.run_dir import RunDir, Store
from mpformer.runtime.errors import choices


def log(store: Store, run: RunDir, attempt: int | None, follow: bool, period: float = 0.5) -> Iterator[str]:
    """Yield the text of an attempt's log, the last one's by default.

    With ``follow``: until nothing works on the run any more; through requeues, into the attempts that come after.
    A run that waits in a queue says so. Raises UserError if the run has no such attempt.
    """
    numbers = run.attempts()
    if attempt is not None or (numbers and not follow):
        number = attempt if attempt is not None else max(numbers)
        if number not in numbers:
            raise choices(f"attempt of {run.run_id}", number, numbers or ["none yet"])
        yield from _attempt_log(run, number, follow, period)
        return
    state = _state_of(store, run)
    if not numbers and not state.active:
        yield from _no_attempt(store, run, state)
        return
    yield from _followed(store, run, numbers, follow, period)


def _followed(store: Store, run: RunDir, numbers: Sequence[int], follow: bool, period: float) -> Iterator[str]:
    first = shown = max(numbers, default=1) - 1
    said = ""
    while True:
        for number in [number for number in run.attempts() if number > shown]:
            yield f"--- attempt {number} ---\n" if shown > first else ""
            yield from _attempt_log(run, number, follow, period)
            shown = number
        state = _state_of(store, run)
        if not state.active:
            return
        if state.state is not State.RUNNING and state.detail != said:
            said = state.detail
            yield f"{state.label}: {said}{f' (job {state.job})' if state.job else ''}\n"
        if not follow:
            return
        time.sleep(period)


def _state_of(store: Store, run: RunDir) -> RunState:
    key = (run.run_id, eval_id(run.config()))
    return standing.look(store, [key], scheduler.ASK_PERIOD).states[key]


def _no_attempt(store: Store, run: RunDir, state: RunState) -> Iterator[str]:
    """What there is of a run without an attempt: its job's log, if the job got that far."""
    text = job_log(store, run)
    if not text:
        raise choices(f"attempt of {run.run_id}", "(last)", ["none yet"])
    yield f"{state.label}: {state.detail}; the log of job {state.job}:\n{text}"


def job_log(store: Store, run: RunDir) -> str:
    """Return what Slurm and submitit wrote of the run's last job; empty if there is nothing."""
    placement = scheduler.placements(store, [run.run_id], scheduler.ASK_PERIOD)[0].get(run.run_id)
    path = scheduler.log_of(store.root, placement) if placement is not None else None
    return path.read_text(errors="replace") if path is not None else ""


def _attempt_log(run: RunDir, number: int, follow: bool, period: float) -> Iterator[str]:
    path = run.attempt(number).log
    position = 0
    while True:
        live = follow and claims.holder(run.claims) == number
        if path.exists():
            with path.open(errors="replace") as file:
                file.seek(position)
                yield file.read()
                position = file.tell()
        if not live:
            return
        time.sleep(period)
