import os
import signal
import threading

import pytest

from mpformer.runtime.signals import handled


def test_handlers_hold_in_the_block_and_those_before_come_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    received: list[int] = []
    with handled({number: lambda number, _: received.append(number) for number in before}):
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(KeyError), handled({signal.SIGUSR2: signal.SIG_IGN}):
            raise KeyError(os.kill(os.getpid(), signal.SIGUSR2))  # type: ignore[func-returns-value]  # one statement
        os.kill(os.getpid(), signal.SIGUSR2)
    assert received == [signal.SIGUSR1, signal.SIGUSR2]
    assert {number: signal.getsignal(number) for number in before} == before


def test_another_thread_changes_no_handler() -> None:
    seen: list[object] = []

    def elsewhere() -> None:
        with handled({signal.SIGUSR1: signal.SIG_IGN}):
            seen.append(signal.getsignal(signal.SIGUSR1))

    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]
