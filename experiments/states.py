"""The state of a run, derived from its files: what a scheduler says of a job comes second."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from experiments import claims
from experiments.store import RunDir, read_json


class State(StrEnum):
    """Where a run stands."""

    PLANNED = "PLANNED"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    REQUEUED = "REQUEUED"
    TRAINED = "TRAINED"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMEOUT = "TIMEOUT"
    LOST = "LOST"
    VOID = "VOID"
    UNKNOWN = "UNKNOWN"


ENDED: Mapping[str, State] = {
    "failed": State.FAILED,
    "cancelled": State.CANCELLED,
    "interrupted": State.CANCELLED,
    "timeout": State.TIMEOUT,
    "requeued": State.REQUEUED,
    "lost": State.LOST,
}
"""State that an attempt's outcome leaves a run in, unless its files say that more is complete."""

NOT_RETRIED = ("nan", "config")
"""Failure classes that the same configuration runs into again: `launch` leaves them to `retry`."""


@dataclass(frozen=True)
class RunState:
    """The state of one run for one evaluation setting, with what is known of its progress."""

    run_id: str
    state: State
    detail: str = ""
    failure_class: str = ""
    attempt: int = 0
    progress: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The state as it is shown, such as ``FAILED(nan)``."""
        return f"{self.state}({self.failure_class})" if self.failure_class else str(self.state)

    @property
    def active(self) -> bool:
        """Whether something works on the run or is about to."""
        return self.state in (State.RUNNING, State.QUEUED)


def derive(run: RunDir, eval_id: str, queued: frozenset[str] = frozenset()) -> RunState:
    """Return the run's state; ``queued`` are the runs that a live launch is going to start."""
    if run.void_file.exists():
        reason = (read_json(run.void_file) or {}).get("reason", "")
        return RunState(run.run_id, State.VOID, detail=reason)
    number = max(run.attempts(), default=0)
    result = run.result(eval_id)
    if result is not None:
        return RunState(run.run_id, State.DONE, attempt=number, metrics=result["metrics"])
    if claims.holder(run.path / "claims") is not None:
        return _running(run, number)
    if run.cancel_file.exists():
        return RunState(run.run_id, State.CANCELLED, "by the user", attempt=number, progress=progress_of(run, number))
    if run.run_id in queued:
        return RunState(run.run_id, State.QUEUED, attempt=number, progress=progress_of(run, number))
    return _resting(run, number)


def _running(run: RunDir, number: int) -> RunState:
    progress = progress_of(run, number)
    stage = str(progress.get("stage", ""))
    return RunState(run.run_id, State.RUNNING, detail=stage, attempt=number, progress=progress)


def _resting(run: RunDir, number: int) -> RunState:
    """The state of a run that nothing works on: by its last attempt, then by what is complete."""
    if not number:
        return _untouched(run)
    stage = read_json(run.attempt(number) / "stage.json")
    progress = progress_of(run, number)
    if not isinstance(stage, dict):
        return RunState(run.run_id, State.LOST, "the attempt died before it began", "killed", number, progress)
    outcome = stage.get("outcome")
    detail, failure = str(stage.get("detail") or ""), str(stage.get("failure_class") or "")
    if outcome is None:
        return RunState(run.run_id, State.LOST, "the process is gone without a word", "killed", number, progress)
    if outcome in ENDED:
        return RunState(run.run_id, ENDED[outcome], detail, failure, number, progress)
    if run.trained() is not None:
        return RunState(run.run_id, State.TRAINED, "", "", number, progress)
    return RunState(run.run_id, State.UNKNOWN, f"attempt {number} ended as {outcome!r} but left no result", "", number)


def _untouched(run: RunDir) -> RunState:
    if not run.exists() and run.path.exists() and any(run.path.iterdir()):
        return RunState(run.run_id, State.UNKNOWN, "the directory has no run.json")
    if run.exists() and read_json(run.path / "run.json") is None:
        return RunState(run.run_id, State.UNKNOWN, "run.json is damaged")
    if run.trained() is not None:
        return RunState(run.run_id, State.TRAINED)
    return RunState(run.run_id, State.PLANNED)


def progress_of(run: RunDir, number: int) -> dict[str, Any]:
    """Return the last heartbeat of an attempt: stage, iteration, max_iter, loss, eta_seconds, time."""
    content = read_json(run.attempt(number) / "progress.json") if number else None
    return content if isinstance(content, dict) else {}


def last_evaluation(metrics: Path, tail: int = 262144) -> dict[str, Any]:
    """Return the last evaluation line of a ``metrics.jsonl``, looking at its last ``tail`` bytes only."""
    try:
        with metrics.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - tail))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        if b'"evaluation"' in line:
            return _parsed(line)
    return {}


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def should_start(state: RunState, retry: tuple[str, ...] = ()) -> bool:
    """Whether a launch works on a run in this state.

    Runs that are done or being worked on are left alone, and so are failures that would repeat, unless their class is
    in ``retry``.
    """
    if state.state is State.FAILED and state.failure_class in NOT_RETRIED:
        return state.failure_class in retry
    return state.state not in (State.DONE, State.RUNNING, State.QUEUED)
