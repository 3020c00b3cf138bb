"""The real model, small, and a trainer that pauses: what tests of running, killing and resuming have in common."""

import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle

from experiments.execution.attempt import Model
from experiments.store.files import append_json
from experiments.store.records import encode
from experiments.store.run_dir import RunDir
from experiments.suites.planning import PlannedRun
from mpformer.config.schema import Config
from mpformer.runtime.callbacks import TrainCallbacks

TINY: dict[str, Any] = {
    "dataset.shapes.side": 64,
    "dataset.shapes.train_images": 16,
    "dataset.shapes.val_images": 6,
    "model.hidden_dim": 16,
    "model.conv_dim": 16,
    "model.mask_dim": 16,
    "model.heads": 2,
    "model.encoder_layers": 1,
    "model.encoder_ffn": 16,
    "model.decoder_ffn": 16,
    "model.decoder_layers": 3,
    "model.queries": 8,
    "model.train_points": 64,
    "model.backbone.stem_channels": 8,
    "model.backbone.res2_channels": 8,
    "schedule.max_iter": 24,
    "runtime.eval_period": 12,
    "runtime.log_period": 1,
    "runtime.probe_images": 2,
}


@dataclass(frozen=True)
class Paced:
    """The real model, with a pause after each line of metrics, so that there is time to disturb it.

    Each line leaves its process and time in ``witness.jsonl``, which nothing of the project reads: who trained when.
    """

    seconds: float
    later: float | None = None
    """The pause in all attempts after the first, if another one."""

    def train(self, config: Config, directory: Path, data_root: Path, callbacks: TrainCallbacks) -> dict[str, Any]:
        first = len(list((directory / "attempts").iterdir())) == 1
        process = uuid.uuid4().hex
        pause = self.seconds if first or self.later is None else self.later

        def log(line: dict[str, Any]) -> None:
            callbacks.log(line)
            trace = {"process": process, "pid": os.getpid(), "time": time.time()}
            append_json(directory / "witness.jsonl", trace)
            time.sleep(pause)

        return Model().train(config, directory, data_root, replace(callbacks, log=log))

    def evaluate(
        self, config: Config, weights: Path, out: Path, data_root: Path, progress: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        return Model().evaluate(config, weights, out, data_root, progress)


cloudpickle.register_pickle_by_value(sys.modules[__name__])


def numbers(directory: RunDir, run: PlannedRun) -> dict[str, Any]:
    """Weights, scores and curves, without times and memory."""
    trained, result = directory.trained(), directory.result(run.eval_id)
    assert trained is not None
    assert result is not None
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    clocks = ("time", "seconds", "peak_memory_bytes", "costs", "attempt")
    return {
        "weights": trained.weights_sha256,
        "result": {key: value for key, value in encode(result).items() if key not in clocks},
        "metrics": [{key: value for key, value in line.items() if key not in clocks} for line in lines],
        "layers": (directory.evaluation(run.eval_id) / "layers.parquet").read_bytes(),
        "probes": (directory.path / "probes.parquet").read_bytes(),
    }
