"""Short real runs before a suite: one a row, in a store of their own under the launch, for what they break and cost."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.store.identity import eval_id, run_id
from experiments.store.run_dir import Store
from experiments.suites.planning import PlannedRun

ITERATIONS = 30
IMAGES = 8

FOLDER = "smoke"
"""Name of the smoke runs' store, under a launch's directory."""


def runs(missing: Sequence[PlannedRun]) -> tuple[PlannedRun, ...]:
    """Return the smoke run of every distinct row: its first run, of 30 iterations and 8 validation images."""
    firsts: dict[str, PlannedRun] = {}
    for run in missing:
        firsts.setdefault(run.row.name, run)
    found = [_short(run) for run in firsts.values()]
    return tuple({run.run_id: run for run in found}.values())


def _short(run: PlannedRun) -> PlannedRun:
    before = run.config.schedule.max_iter
    kept = min(IMAGES, run.config.evaluation.layer_mask_images)
    changes = {"evaluation.val_images": IMAGES, "evaluation.layer_mask_images": kept, "runtime.eval_period": 0}
    config = run.config.replace(changes)
    if before > ITERATIONS and not config.schedule.evaluation_only:
        steps = tuple(dict.fromkeys(max(1, round(step * ITERATIONS / before)) for step in config.schedule.steps))
        config = config.replace({"schedule.max_iter": ITERATIONS, "schedule.steps": steps})
    return replace(run, config=config, run_id=run_id(config), eval_id=eval_id(config))


def create(directory: Path, chosen: Sequence[PlannedRun]) -> Store:
    """Write the smoke runs into their store under a launch's directory."""
    store = Store(directory / FOLDER)
    for run in chosen:
        store.run(run.run_id).create(run.config, run.row.name)
    return store


def stores(store: Store) -> list[Store]:
    """Return the stores of all launches' smoke runs."""
    return [Store(path) for path in sorted(store.launches.glob(f"*/{FOLDER}"))]
