"""Runs that do nothing but leave a run's files, and plans of them, for tests of what a launch submits."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from experiments.launch.profiles import SlurmProfile, parse
from experiments.store.files import write_json
from experiments.store.run_dir import Store
from experiments.suites import planning
from experiments.suites.planning import Plan, Request
from mpformer.config.schema import Config
from mpformer.runtime.callbacks import TrainCallbacks
from mpformer.runtime.disk import sha256
from mpformer.runtime.errors import RunFailure


@dataclass(frozen=True)
class Counting:
    """Counts the trainings of a run in its directory."""

    seconds: float = 0.0
    fail: str = ""
    """Runs with this in their id fail."""
    only: str = ""
    """Where this is given, only under directories with this in their path."""

    def train(self, config: Config, directory: Path, data_root: Path, callbacks: TrainCallbacks) -> dict[str, Any]:
        weights = directory / "checkpoints" / "final.pth"
        weights.parent.mkdir(exist_ok=True)
        with (directory / "trainings.txt").open("a") as file:
            file.write(f"{data_root}\n")
        time.sleep(self.seconds)
        if self.fail and self.fail in directory.name and self.only in str(directory):
            raise RunFailure("nan", "it was asked to fail")
        weights.write_text(directory.name)
        about = {"weights": "checkpoints/final.pth", "weights_sha256": sha256(weights), "peak_memory_bytes": 3 * 2**30}
        return {"iterations": config.schedule.max_iter, "seconds": 2.0 * config.schedule.max_iter, **about}

    def evaluate(
        self, config: Config, weights: Path, out: Path, data_root: Path, progress: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        return {"iteration": config.schedule.max_iter, "complete": True, "images": 1, "metrics": {"AP": 12.5}}


cloudpickle.register_pickle_by_value(sys.modules[__name__])


def data_root(base: Path) -> Path:
    """A data root in which the dataset of the headline suite seems to be prepared."""
    root = base / "datasets"
    fingerprint = planning.make(Request("headline"), root).data.fingerprint
    write_json(root / "shapes" / fingerprint[:12] / "manifest.json", {"name": "shapes", "fingerprint": fingerprint})
    return root


def plan(data: Path, seeds: tuple[int, ...] = (0, 1), suite: str = "headline", **over: Any) -> Plan:
    """The headline suite: two rows, these seeds, twelve iterations."""
    overrides = {"schedule.max_iter": 12} | {key.replace("__", "."): value for key, value in over.items()}
    return planning.make(Request(suite, seeds=seeds, overrides=tuple(overrides.items())), data)


def profile(**keys: Any) -> SlurmProfile:
    """A profile of the private cluster."""
    usual = {"executor": "slurm", "partition": "main", "time": 10, "memory": "1GB", "parallelism": 4, "report": False}
    made = parse({**usual, **keys}, "test")
    assert isinstance(made, SlurmProfile)
    return made


def silence(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Put clients first on the PATH that find no controller."""
    folder.mkdir(exist_ok=True)
    for name in ("sbatch", "squeue", "sacct", "sacctmgr", "scontrol", "srun"):
        (folder / name).write_text(
            "#!/bin/sh\necho 'slurm_load error: Unable to contact slurm controller' >&2\nexit 1\n"
        )
        (folder / name).chmod(0o755)
    patch.setenv("PATH", str(folder), prepend=":")


def trainings(store: Store) -> dict[str, int]:
    """How often each run's training began."""
    return {
        run.run_id: len((run.path / "trainings.txt").read_text().splitlines())
        for run in store.runs()
        if (run.path / "trainings.txt").exists()
    }
