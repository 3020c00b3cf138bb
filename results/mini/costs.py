"""Claims C5 and C6, measured beside the runs: what piloting costs in training, and that inference is untouched.

    python results/mini/costs.py --runs results/mini/runs --data-root datasets [--dataset shapes …]

C5: two long-lived trainers of one thread, with and without mask piloting, take turns step by step on the same batches
of the set, so that a load of the machine hits both; ratios are of each pair of steps, of seconds and of
the processor's. C6: the trained weights of
MP-Former's first kept seed predict every validation image with the piloted part configured and without it. Results go
into ``costs.json``, set by set; what is there of other sets stays.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.statistics import mean_interval
from experiments.store.run_dir import RunDir, Store
from mpformer.config.schema import Config, validate
from mpformer.runtime.errors import UserError

HERE = Path(__file__).resolve().parent
SUITE, BASELINE, PILOTED = "study-headline", "mask2former", "mp-former"
WARM_UP = 5
"""Steps before the first that counts."""


def configured(store: Store, dataset: str, row: str) -> tuple[RunDir, Config]:
    """The first kept run of a row of the headline, and its configuration; raises UserError without one."""
    record = next((one for one in store.suite_records() if (one.suite, one.dataset) == (SUITE, dataset)), None)
    runs = [run for which, run in (record.runs() if record else ()) if which.name == row]
    if not runs:
        raise UserError(f"no run of {SUITE} on {dataset} is in {store.root}; make study trains them")
    run = store.run(min(runs, key=lambda one: one.seed).run_id)
    return run, run.config().replace({"runtime.threads": 1})


# ------------------------------------------------------------------ C5: one process a method


def worker(tree: str, data_root: Path) -> None:
    """Answer each line on the standard input: ``step`` with its seconds and the processor's, or ``memory``."""
    import torch

    from mpformer.data.own import registration
    from mpformer.runtime.callbacks import TrainCallbacks
    from mpformer.runtime.process import peak_memory, prepare_process
    from mpformer.runtime.rank import Rank
    from mpformer.training.trainer import Trainer

    registration.know_all(data_root)
    device = prepare_process("cpu", 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            validate(json.loads(tree)), Path(folder), data_root, TrainCallbacks(), torch.device("cpu"), Rank()
        )
        trainer.iter = trainer.resume()
        for line in sys.stdin:
            print(json.dumps(peak_memory(device) if line.strip() == "memory" else _step(trainer)), flush=True)


def _step(trainer: Any) -> tuple[float, float]:
    began, worked = time.perf_counter(), time.process_time()
    trainer.run_step()
    trainer.meter.line()  # the losses are read, too
    trainer.iter += 1
    return time.perf_counter() - began, time.process_time() - worked


class _Worker:
    """A trainer of a configuration in a process of its own."""

    def __init__(self, config: Config, data_root: Path) -> None:
        tree = json.dumps(config.model_dump(mode="json"))
        command = [sys.executable, __file__, "worker", tree, str(data_root)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate()


def training(plain: Config, piloted: Config, data_root: Path, pairs: int) -> dict[str, Any]:
    """Seconds of a step and peak memory, with piloting over without; each pair of steps is of the same batch."""
    workers = {name: _Worker(config, data_root) for name, config in ((BASELINE, plain), (PILOTED, piloted))}
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    for turn in range(WARM_UP + pairs):
        for name in sorted(workers, reverse=bool(turn % 2)):
            taken = workers[name].ask("step")
            steps[name] += [taken] if turn >= WARM_UP else []
    memory = {name: workers[name].ask("memory") for name in workers}
    for each in workers.values():
        each.end()
    both = list(zip(steps[PILOTED], steps[BASELINE], strict=True))
    return {
        "pairs": pairs,
        "seconds": ratio_of([mine[0] / theirs[0] for mine, theirs in both]),
        "processor_seconds": ratio_of([mine[1] / theirs[1] for mine, theirs in both]),
        "median_seconds": {name: sorted(found)[len(found) // 2][0] for name, found in steps.items()},
        "peak_bytes": memory,
        "memory_ratio": memory[PILOTED] / memory[BASELINE],
        "load": round(os.getloadavg()[0], 1),
    }


def ratio_of(ratios: Sequence[float]) -> dict[str, Any]:
    """Geometric mean with its 95 % t interval, median and middle half of ratios; at least three."""
    logarithms = [math.log(each) for each in ratios]
    interval = mean_interval(logarithms)
    assert interval is not None
    ranked, quarter = sorted(ratios), len(ratios) // 4
    return {
        "ratio": math.exp(sum(logarithms) / len(logarithms)),
        "interval": [math.exp(end) for end in interval],
        "median": ranked[len(ranked) // 2],
        "middle_half": [ranked[quarter], ranked[-1 - quarter]],
    }


# ------------------------------------------------------------------ C6


def inference(run: RunDir, config: Config, data_root: Path) -> dict[str, Any]:
    """Outputs of every layer on every validation image, and operations, with the piloted part and without."""
    import torch

    from mpformer.data.validation import validation_items
    from mpformer.evaluation.compute_cost import costs
    from mpformer.modeling.meta_arch import build_model
    from mpformer.modeling.weights import load_weights, read_weights, without_piloted_part
    from mpformer.runtime.process import prepare_process

    prepare_process("cpu", 1)
    plain = config.replace({"toggles.mp_queries": False})
    with run.whole() as whole:
        trained = whole.trained()
        if trained is None or not (whole.path / trained.weights).exists():
            raise UserError(f"{run.run_id} is kept without its weights: archive it whole, or --no-images")
        models = [build_model(config).eval(), build_model(plain).eval()]
        load_weights(models[0], whole.path / trained.weights)
        state = without_piloted_part(read_weights(whole.path / trained.weights))
        lacking, left = models[1].load_state_dict(state, strict=False)
        assert not left
        assert not set(lacking) & dict(models[1].named_parameters()).keys(), "all but what is computed is loaded"
    items = validation_items(config, data_root)
    with torch.no_grad():
        same = all(_equal(*(model.layer_outputs([item.inputs])[0] for model in models)) for item in items)
    gflops = [
        costs(model, each, items)["inference_gflops"] for model, each in zip(models, (config, plain), strict=True)
    ]
    return {"images": len(items), "identical": same, "gflops_with": gflops[0], "gflops_without": gflops[1]}


def _equal(first: Any, second: Any) -> bool:
    """Whether two predictions are the same in every bit: classes and masks of every layer."""
    names = ("logits", "mask_embed", "mask_features", "empty_attention")
    return all(bool((getattr(first, name) == getattr(second, name)).all()) for name in names)


def main(words: Sequence[str]) -> None:
    """The command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="store with the headline's runs")
    parser.add_argument("--data-root", type=Path, default=Path("datasets"), help="where the sets are")
    parser.add_argument("--dataset", action="append", help="only this set; repeatable")
    parser.add_argument("--pairs", type=int, default=60, help="pairs of steps")
    parser.add_argument("--out", type=Path, default=HERE / "costs.json")
    options = parser.parse_args(words)
    from answers import opened  # not in the workers, whose memory is measured

    store = opened(options.runs, options.data_root)
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.dataset or ("shapes", "nuclei", "facades"):
        (_, plain), (run, piloted) = (configured(store, name, row) for row in (BASELINE, PILOTED))
        known[name] = {
            "training": training(plain, piloted, options.data_root, options.pairs),
            "inference": inference(run, piloted, options.data_root),
        }
        options.out.write_text(json.dumps(known, indent=1) + "\n")
        print(name, json.dumps(known[name]))


if __name__ == "__main__":
    try:
        worker(sys.argv[2], Path(sys.argv[3])) if sys.argv[1:2] == ["worker"] else main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"study: {error}")
