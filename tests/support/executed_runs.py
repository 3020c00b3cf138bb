"""Runs that a stand-in for the trainer has executed, and a scorer that must not train."""

from pathlib import Path
from typing import Any

from experiments.execution.attempt import Options, run_attempt
from experiments.launch import begin
from experiments.store.run_dir import RunDir, Store
from experiments.suites.planning import Plan


def execute(plan: Plan, store: Store, options: Options, runner: Any, count: int = 1) -> list[RunDir]:
    """Plan all, train and evaluate some."""
    begin.record(plan, store, "")
    chosen = [store.run(run.run_id) for run in plan.unique[:count]]
    for run in chosen:
        assert run_attempt(store.root, run.run_id, "all", options, runner).outcome == "done"
    return chosen


def eval_id_of(run: RunDir) -> str:
    """Return the setting at which a run was scored."""
    return next(path.parent.name for path in (run.path / "evals").glob("*/result.json"))


class Scorer:
    """Scores, and must not be asked to train."""

    def train(self, *_: Any) -> dict[str, Any]:
        raise AssertionError("reevaluate trained")

    def evaluate(self, config: Any, weights: Path, out: Path, data_root: Path, progress: Any) -> dict[str, Any]:
        return {"iteration": 12, "complete": True, "images": 1, "metrics": {"AP": 99.0}}
