"""Signals that ask for a checkpoint and an end: SIGTERM, and SIGUSR2, by which Slurm warns of a requeue."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping

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
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _: object) -> None:
            self._seen.append(f"{_SIGNALS[number]}: {signal.Signals(number).name}")

        before = {number: signal.signal(number, note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
