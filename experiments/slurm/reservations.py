"""Which launch may hand a run to Slurm: numbered files made with O_EXCL, like claims, but good while jobs wait.

``runs/<run_id>/reservations/<n>`` names the launch that holds reservation n; the highest number counts. It holds while
that launch is still submitting, and then while Slurm has a live job of it for the run. Taking a dead reservation n over
means to create n + 1, which O_EXCL grants to one process alone. Nothing is locked, renamed or deleted.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from experiments.store import claims
from experiments.store.files import read_json, write_json
from experiments.store.run_dir import RunDir, Store

HEARTBEAT_TIMEOUT = 180.0
"""Seconds after its last sign of life at which a launcher on another host is taken for dead."""

WRITING_SECONDS = 60.0
"""Age at which a reservation that names no launch was made by a process that died before it could write."""


def reserve(run: RunDir, launch: str, held: Callable[[str], bool]) -> bool:
    """Reserve a run for a launch; False if another launch holds it or was faster.

    Args:
        run: the run.
        launch: the id of the launch that wants it.
        held: whether an earlier launch, by its id, still holds the run.
    """
    directory = run.path / "reservations"
    directory.mkdir(parents=True, exist_ok=True)
    number = claims.highest(directory)
    if number and _holds(directory / str(number), held):
        return False
    return claims.create(directory / str(number + 1), json.dumps({"launch": launch, "time": time.time()}))


def _holds(path: Path, held: Callable[[str], bool]) -> bool:
    content = read_json(path)
    if isinstance(content, dict) and content.get("launch"):
        return held(str(content["launch"]))
    try:
        return claims.file_system_now(path.parent) - path.stat().st_mtime < WRITING_SECONDS
    except OSError:
        return False


def launching(store: Store, launch: str) -> bool:
    """Whether the launcher of a launch may still be submitting: it has not said that it is over, and is not dead."""
    path = store.launches / launch / "launching.json"
    content = read_json(path)
    if not isinstance(content, dict) or content.get("over"):
        return False
    return claims.lives(content, path)


class Launching:
    """Shows, while a block runs, that this process is submitting; ``beat`` is a sign of life."""

    def __init__(self, store: Store, launch: str) -> None:
        self._path = store.launches / launch / "launching.json"
        owner = claims.Owner()
        self._about = {"host": owner.host, "machine": owner.machine, "pid": owner.pid, "born": owner.born}

    def __enter__(self) -> "Launching":
        write_json(self._path, {**self._about, "over": None})
        return self

    def beat(self) -> None:
        """Say to other hosts that this process lives."""
        os.utime(self._path)

    def __exit__(self, *_: object) -> None:
        write_json(self._path, {**self._about, "over": time.time()})
