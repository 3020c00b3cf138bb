"""Scoring trained runs anew without training: with other settings, or with the same ones by newer code."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.execution.attempt import Options, Runner, run_attempt
from experiments.store import claims
from experiments.store.attempt_dir import Ending
from experiments.store.identity import run_id
from experiments.store.run_dir import RunDir, Store
from experiments.suites import datasets
from mpformer.config.schema import Config
from mpformer.runtime.errors import UserError


@dataclass(frozen=True)
class Evaluation:
    """A trained run and the configuration to score it with."""

    run: RunDir
    config: Config


def chosen(runs: Sequence[RunDir], overrides: Sequence[tuple[str, Any]], base: dict[str, Config]) -> list[Evaluation]:
    """Return what is to be scored; raises UserError for overrides of anything but the evaluation, and untrained runs.

    ``base`` holds the configurations that a suite gives its runs now, by run id; other runs keep their own.
    """
    for key, _ in overrides:
        if not key.startswith(("evaluation.", "runtime.")):
            raise UserError(f"--set {key} would change what is trained; reevaluate takes evaluation.… and runtime.…")
    untrained = [run.run_id for run in runs if run.trained() is None]
    if untrained:
        raise UserError(f"nothing is trained of {', '.join(untrained[:4])}; launch its suite first")
    found = [Evaluation(run, (base.get(run.run_id) or run.config()).replace(dict(overrides))) for run in runs]
    for one in found:
        assert run_id(one.config) == one.run.run_id
    return found


def check(chosen: Sequence[Evaluation], data_root: Path) -> None:
    """Raise UserError unless every run can be scored here: its data, its weights, and nobody at work on it.

    Archived ones are unpacked.
    """
    for one in chosen:
        one.run.unpack()
        if one.run.void_file.exists():
            raise UserError(f"{one.run.run_id} is void: `mpformer launch` does it again")
        missing = datasets.resolve(one.config, data_root)[1].missing
        if missing:
            raise UserError(f"{missing}; or name the right --data-root")
        datasets.check_val_images(one.config, data_root)
        if one.run.weights() is None:
            raise UserError(
                f"the weights of {one.run.run_id} are missing or damaged: `mpformer launch` trains it again"
            )
        if claims.holder(one.run.claims) is not None:
            raise UserError(f"{one.run.run_id} is being worked on; wait for it, or cancel it")


def evaluate(one: Evaluation, store: Store, data_root: Path, runner: Runner | None = None) -> Ending:
    """Score the run's weights in this process; never trains.

    An earlier result of the setting stays in place until the new one is complete, and is then kept under
    ``superseded/<n>`` in the run's directory.
    """
    options = Options(data_root.resolve(), "reevaluate", capture=False, anew=True)
    return run_attempt(store.root.resolve(), one.run.run_id, "evaluate", options, runner, one.config)
