"""Scoring trained runs anew without training: with other settings, or with the same ones by newer code."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.execution.attempt import Options, Runner, run_attempt
from experiments.store import claims
from experiments.store.attempt_dir import Ending
from experiments.store.identity import eval_id, run_id
from experiments.store.run_dir import RunDir, Store
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


def set_aside(one: Evaluation) -> Path | None:
    """Move the evaluation's files aside, if it was made before; they are kept. Raises UserError for a run in use."""
    claim = claims.acquire(one.run.path / "claims")
    if claim is None:
        raise UserError(f"{one.run.run_id} is being worked on; wait for it, or cancel it")
    try:
        place = one.run.evaluation(eval_id(one.config))
        if not place.exists():
            return None
        number = 1 + sum(1 for _ in (one.run.path / "superseded").glob("*"))
        aside = one.run.path / "superseded" / str(number) / place.name
        aside.parent.mkdir(parents=True)
        place.rename(aside)
        return aside
    finally:
        claim.release()


def evaluate(one: Evaluation, store: Store, data_root: Path, runner: Runner | None = None) -> Ending:
    """Score the run's weights in this process; never trains."""
    options = Options(data_root.resolve(), "reevaluate", capture=False)
    return run_attempt(store.root.resolve(), one.run.run_id, "evaluate", options, runner, one.config)
