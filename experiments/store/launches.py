"""What is going on of a store's launches on this machine, and of others that share it: live workers, waiting runs."""

import time
from pathlib import Path
from typing import Any

from experiments.store import claims
from experiments.store.files import read_json
from experiments.store.run_dir import Store

START_SECONDS = 60.0
"""Time in which a launch's first worker is expected to appear; its runs are QUEUED meanwhile."""


def live_workers(directory: Path) -> list[int]:
    """Return the pids of a launch's workers that are alive on this machine, or were heard of lately on another."""
    alive = []
    for path in (directory / "workers").glob("*.json"):
        content = read_json(path)
        if isinstance(content, dict) and not content.get("ended") and claims.lives(content, directory / "launch.json"):
            alive.append(int(content["pid"]))
    return alive


def queued_runs(store: Store) -> frozenset[str]:
    """Return the runs that live launches are going to start."""
    names: set[str] = set()
    for path in store.launches.glob("*/launch.json"):
        content = read_json(path)
        if isinstance(content, dict) and _open(path.parent, content):
            names.update(content.get("runs", ()))
    return frozenset(names)


def _open(directory: Path, content: dict[str, Any]) -> bool:
    """Whether a launch is going to start more runs."""
    if content.get("ended") or (directory / "stop.json").exists():
        return False
    return bool(live_workers(directory)) or _starting(directory, content)


def _starting(directory: Path, content: dict[str, Any]) -> bool:
    """A launch just written none of whose workers has registered yet; of jobs in Slurm, Slurm tells."""
    if content.get("executor") == "slurm":
        return False
    registered = next((directory / "workers").glob("*.json"), None)
    return registered is None and time.time() - content.get("created", 0) < START_SECONDS
