"""Signals that ask for a checkpoint and an end: SIGTERM, and SIGUSR2, by which Slurm warns of a requeue."""

import contextlib
import signal
from collections.abc import Iterator, Mapping

from experiments.store.attempt_dir import Stop, StopReason
from mpformer.runtime.signals import handled

_SIGNALS: Mapping[int, Stop] = {signal.SIGTERM: Stop.INTERRUPTED, signal.SIGUSR2: Stop.REQUEUED}


class Noted:
    """The signals of this process so far, by number."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def reason(self) -> StopReason | None:
        """The strongest reason to stop, None if there is none."""
        reasons = (StopReason(_SIGNALS[number], signal.Signals(number).name) for number in self.received)
        return max(reasons, key=lambda reason: reason.strength, default=None)

    def text(self) -> str | None:
        """The same in words."""
        reason = self.reason()
        return None if reason is None else str(reason)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Look out for them, in the main thread; Ctrl-C in the foreground is the trainer's to see to."""
        with handled(dict.fromkeys(_SIGNALS, lambda number, _: self.received.append(number))):
            yield
