"""Reading ahead: other processes touch what is about to be looked at, so that it is in the kernel's cache by then.

A store of thousands of runs lies scattered over its disk, or behind a file server where each file costs a round trip;
one reader waits for them one after the other. Threads do not help (they wait for each other's Python), processes do. A
hint alone: nothing is handed over, and the states come from the files themselves.
"""

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

FEW = 300
"""Runs up to which it is not worth a process."""

READERS = 4
"""Processes at most: what one core, or a file server, has to spare."""

_FILES = {"evals": ("/result.json",), "attempts": ("/stage.json", "/progress.json"), "claims": ("",)}
"""Small files in what a run's folders hold."""

_FIRST_BYTES = 4096


@contextlib.contextmanager
def ahead(runs: Sequence[Path]) -> Iterator[None]:
    """Let other processes read the small files of these run directories while the block runs, the last ones first."""
    readers = _start(runs) if len(runs) > FEW else []
    try:
        yield
    finally:
        for pid in readers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _start(runs: Sequence[Path]) -> list[int]:
    count = min(READERS, (os.cpu_count() or 1) - 1)
    return [_reader([str(run) for run in runs[::-1][start::count]]) for start in range(count)]


def _reader(runs: Sequence[str]) -> int:
    """Fork a process that reads, and does nothing else whatever happens; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for run in runs:
            touch(run)
    finally:
        os._exit(0)


def touch(run: str) -> None:
    """Read the directories and the small files of a run."""
    for folder, files in _FILES.items():
        for name in _names(f"{run}/{folder}"):
            for file in files:
                _read(f"{run}/{folder}/{name}{file}")


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _read(path: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.read(descriptor, _FIRST_BYTES)
        finally:
            os.close(descriptor)
