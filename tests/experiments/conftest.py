"""A tiny stand-in for the trainer, at the seam where the real one is put in: it counts instead of learning."""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import hypothesis
import pytest

from experiments.execution.attempt import Options
from experiments.store.files import read_json, write_json
from experiments.store.identity import eval_id, run_id
from experiments.store.run_dir import RunDir, Store
from experiments.suites import planning
from mpformer.config.schema import Config
from mpformer.runtime.callbacks import Interrupted, TrainCallbacks
from mpformer.runtime.disk import sha256
from mpformer.runtime.errors import RunFailure


@dataclass(frozen=True)
class Counter:
    """Trains by hashing: iteration i's weights are the digest of iteration i - 1's; checkpoints every fifth."""

    seconds: float = 0.0
    fail: dict[str, str] = field(default_factory=dict)
    """Failure to raise at half of the training, by a part of the run id."""
    kill_once: Path | None = None
    """SIGKILL oneself at half of the training, unless this file exists; it is then made."""
    metrics: dict[str, float] = field(default_factory=lambda: {"AP": 12.5})

    def train(self, config: Config, directory: Path, data_root: Path, callbacks: TrainCallbacks) -> dict[str, Any]:
        state = read_json(directory / "checkpoints" / "state.json") or {"iteration": 0, "weights": str(config.seed)}
        iterations = config.schedule.max_iter
        for iteration in range(state["iteration"] + 1, iterations + 1):
            digest = hashlib.sha256(f"{state['weights']}{run_id(config)}".encode()).hexdigest()
            state = {"iteration": iteration, "weights": digest}
            time.sleep(self.seconds)
            callbacks.log({"kind": "train", "iteration": iteration, "loss": 1 / iteration, "time": time.time()})
            callbacks.progress(
                {"iteration": iteration, "max_iter": iterations, "loss": 1 / iteration, "eta_seconds": 1.0}
            )
            reason = callbacks.stop()
            if iteration % 5 == 0 or reason:
                callbacks.confirm()
                write_json(directory / "checkpoints" / "state.json", state)
            if reason:
                raise Interrupted(reason, iteration)
            self._misbehave(config, iteration)
        final = directory / "checkpoints" / "final.pth"
        final.write_text(state["weights"])
        about = {"weights": "checkpoints/final.pth", "weights_sha256": sha256(final), "peak_memory_bytes": 1}
        return {"iterations": iterations, "seconds": self.seconds * iterations + 0.1, **about}

    def _misbehave(self, config: Config, iteration: int) -> None:
        if iteration != config.schedule.max_iter // 2:
            return
        if self.kill_once is not None and not self.kill_once.exists():
            self.kill_once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        for part, kind in self.fail.items():
            if part in run_id(config):
                raise _FAILURES.get(kind, RunFailure(kind, f"it was asked to fail as {kind}"))

    def evaluate(
        self, config: Config, weights: Path, out: Path, data_root: Path, progress: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        progress({"done": 1, "total": 1})
        (out / "layers.parquet").write_text(weights.read_text())
        return {"iteration": config.schedule.max_iter, "complete": True, "images": 1, "metrics": dict(self.metrics)}


_FAILURES: dict[str, BaseException] = {
    "enospc": OSError(28, "No space left on device"),
    "memory": MemoryError(),
    "missing-module": ImportError("No module named 'nothing'"),
    "bug": ValueError("something else"),
}

cloudpickle.register_pickle_by_value(sys.modules[__name__])

# a busy machine is no reason to fail
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture
def counter() -> type[Counter]:
    return Counter


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """A data root in which the shapes dataset of twelve iterations' runs seems to be prepared."""
    root = tmp_path / "datasets"
    fingerprint = planning.make(planning.Request("headline"), root).data.fingerprint
    write_json(root / "shapes" / fingerprint[:12] / "manifest.json", {"name": "shapes", "fingerprint": fingerprint})
    return root


@pytest.fixture
def plan(data_root: Path) -> planning.Plan:
    """The headline suite, two seeds, twelve iterations."""
    request = planning.Request("headline", seeds=(0, 1), overrides=(("schedule.max_iter", 12),))
    return planning.make(request, data_root)


@pytest.fixture
def one(plan: planning.Plan, store: Store) -> RunDir:
    """One planned run in the store."""
    chosen = plan.runs[0]
    run = store.run(chosen.run_id)
    run.create(chosen.config, chosen.row.name)
    return run


@pytest.fixture
def options(data_root: Path) -> Options:
    return Options(data_root, launch="test")


@pytest.fixture
def setting() -> Callable[[RunDir], str]:
    """The evaluation id of a run."""
    return lambda run: eval_id(run.config())
