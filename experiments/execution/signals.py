"""Signals that ask for a checkpoint and an end: SIGTERM, and SIGUSR2, by which Slurm warns of a requeue."""

import contextlib
import signal
from collections.abc import Iterator, Mapping

from mpformer.runtime.signals import handled

_SIGNALS: Mapping[int, str] = {signal.SIGTERM: "interrupted", signal.SIGUSR2: "requeued"}


class Noted:
    """The signals of this process so far."""

    def __init__(self) -> None:
        self._seen: list[str] = []

    def reason(self) -> str | None:
        """The reason to stop; that one is going to be requeued says more than that one is interrupted."""
        return max(self._seen, default=None)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Look out for them, in the main thread; Ctrl-C in the foreground is the trainer's to see to."""

        def note(number: int, _: object) -> None:
            self._seen.append(f"{_SIGNALS[number]}: {signal.Signals(number).name}")

        with handled(dict.fromkeys(_SIGNALS, note)):
            yield
