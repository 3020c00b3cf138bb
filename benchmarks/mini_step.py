"""A mini training step of this code against that of an older checkout.

    git worktree add ../older ce6f541
    python -m benchmarks.mini_step --older ../older --write

Two long-lived processes of one thread, one for each code, take turns step by step on the same batch of four images: a
load of the machine hits both. Each prepares its process as its own ``train`` does, and each step is the trainer's own,
optimiser included. Operators are those that PyTorch's
profiler sees in one step, views included. The file also is the process: it runs in the older checkout, whose modules
may be elsewhere.
"""

import importlib
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METHODS = {"Mask2Former": "mask2former", "MP-Former": "mp-former/paper"}
HERE = Path(__file__).parents[1]
RESULT = HERE / "benchmarks" / "results" / "mini_step.json"
_HOMES = {
    "PRESETS": ("mpformer.config.presets", "mpformer.presets"),
    "base": ("experiments.suites.scales", "experiments.scales"),
    "Trainer": ("mpformer.training.trainer", "mpformer.training"),
    "TrainHooks": ("mpformer.hooks",),
    "TrainCallbacks": ("mpformer.runtime.callbacks",),
    "Place": ("mpformer.place",),
    "Rank": ("mpformer.runtime.rank",),
    "prepare_process": ("mpformer.process", "mpformer.runtime.process"),
}


def _find(*names: str) -> Any:
    """The first of the names that this checkout has.

    Old ones are asked for first: what a checkout lacks may be found in the installed packages.
    """
    for name in names:
        for home in _HOMES[name]:
            try:
                return getattr(importlib.import_module(home), name)
            except (ImportError, AttributeError):
                continue
    raise ImportError(f"this checkout has none of {', '.join(names)}")


def worker(preset: str) -> None:
    """Answer each line on the standard input: ``step`` with its seconds, ``count`` with a step's operators."""
    made, batch = _trainer(preset), _batch()
    accumulation = sys.modules[type(made).__module__].accumulation
    for iteration, line in enumerate(sys.stdin):
        made.iter, made.batches = iteration, iter([batch])
        if hasattr(accumulation, "micro_batches"):
            made.parts = accumulation.micro_batches(made.batches, made.config)
        print(json.dumps(_count(made) if line.strip() == "count" else _seconds(made)), flush=True)


def _trainer(preset: str) -> Any:
    import torch

    config = _find("base")("mini").replace({"toggles": _find("PRESETS")[preset].model_dump()})
    prepare = _find("prepare_process")
    prepare(config) if "config" in inspect.signature(prepare).parameters else prepare("cpu", 1)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    callbacks, rank = _find("TrainHooks", "TrainCallbacks")(), _find("Place", "Rank")()
    return _find("Trainer")(config, folder, folder, callbacks, torch.device("cpu"), rank)


def _batch() -> list[dict[str, Any]]:
    """Four noisy images of 96² with three to eight ellipses each."""
    import numpy as np
    import torch
    from detectron2.structures import Instances

    random, side, batch = np.random.default_rng(0), 96, []
    y, x = np.mgrid[:side, :side]
    for _ in range(4):
        masks = np.zeros((int(random.integers(3, 9)), side, side), dtype=bool)
        for mask in masks:
            centre, radius = random.random(2) * side, random.uniform(0.05, 0.3, 2) * side
            mask |= ((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 < 1
        instances = Instances((side, side))
        instances.gt_classes = torch.from_numpy(random.integers(0, 12, len(masks)))
        instances.gt_masks = torch.from_numpy(masks)
        image = torch.from_numpy(random.integers(0, 255, (3, side, side)).astype(np.uint8))
        batch.append({"image": image, "instances": instances})
    return batch


def _seconds(made: Any) -> float:
    began = time.perf_counter()
    made.run_step()
    made.meter.line()  # the losses are read, too
    return time.perf_counter() - began


def _count(made: Any) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        made.run_step()
    return sum(event.name.startswith("aten::") for event in found.events())


class _Process:
    """A worker that runs the code of a checkout."""

    def __init__(self, checkout: Path, preset: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-P", __file__, "worker", preset]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=environment, cwd=checkout, text=True, **pipes)

    def ask(self, what: str) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(older: Path, preset: str, steps: int) -> dict[str, Any]:
    """Seconds of each step, in turns, and operators of one."""
    processes = {"ours": _Process(HERE, preset), "older": _Process(older, preset)}
    for process in processes.values():
        for _ in range(3):
            process.ask("step")
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for turn in range(steps):
        for name in sorted(processes, reverse=bool(turn % 2)):
            seconds[name].append(processes[name].ask("step"))
    operators = {name: int(process.ask("count")) for name, process in processes.items()}
    for process in processes.values():
        process.end()
    ratios = sorted(a / b for a, b in zip(seconds["ours"], seconds["older"], strict=True))
    quarter = len(ratios) // 4
    return {
        "steps": steps,
        "ratio": statistics.median(ratios),
        "middle half": [ratios[quarter], ratios[-1 - quarter]],
        "ratio of the fastest": min(seconds["ours"]) / min(seconds["older"]),
        "median milliseconds": {name: round(1e3 * statistics.median(found), 1) for name, found in seconds.items()},
        "fastest milliseconds": {name: round(1e3 * min(found), 1) for name, found in seconds.items()},
        "operators": operators,
        "load": round(os.getloadavg()[0], 1),
    }


def main(arguments: Sequence[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m benchmarks.mini_step", description=__doc__)
    parser.add_argument("--older", type=Path, required=True, help="folder of the older checkout")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args(arguments)
    found = {name: compare(options.older.resolve(), preset, options.steps) for name, preset in METHODS.items()}
    print(json.dumps(found, indent=1))
    if options.write:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    worker(sys.argv[2]) if sys.argv[1:2] == ["worker"] else main(sys.argv[1:])
