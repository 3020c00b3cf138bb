"""What the trainer calls while it trains, and how a training that was asked to stop ends. No torch here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class TrainCallbacks:
    """Callbacks of one training; each defaults to doing nothing, so that a model can be trained without a run store.

    Attributes:
        log: takes one line of ``metrics.jsonl`` (``kind`` is ``train`` or ``evaluation``).
        confirm: called before each checkpoint's rename; raises if this process no longer owns the run.
        stop: polled every iteration; a reason makes the trainer checkpoint and raise :class:`Interrupted`.
        progress: cheap heartbeat with ``iteration``, ``max_iter``, ``loss`` and ``eta_seconds``.
    """

    log: Callable[[dict[str, Any]], None] = _nothing
    confirm: Callable[[], None] = _nothing
    stop: Callable[[], str | None] = _nothing
    progress: Callable[[dict[str, Any]], None] = _nothing


class Interrupted(Exception):
    """Training stopped on request, after writing a checkpoint; launching again continues it."""

    def __init__(self, reason: str, iteration: int) -> None:
        super().__init__(f"stopped at iteration {iteration}: {reason}")
        self.reason = reason
        self.iteration = iteration
