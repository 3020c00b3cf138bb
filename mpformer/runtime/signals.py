"""Signal handlers for the length of a block."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | signal.Handlers


@contextmanager
def handled(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """Handle these signals while the block runs, then as before.

    Python hands signals to the main thread alone: in any other this changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            # None: a handler that C code installed, which Python can only replace
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
