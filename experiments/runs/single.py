"""One model by hand: a Mask2Former-style YAML, or a setting's name, with ``KEY VALUE`` overrides.

Such a configuration is a typed one with an identity, like any row of a suite: what `train` trains is a run of the
store, with claims, checkpoints and attempts, and is taken up again where it stopped.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.execution.attempt import Options, Runner, run_attempt
from experiments.store.attempt_dir import Ending
from experiments.store.files import write_json
from experiments.store.identity import eval_id, run_id
from experiments.store.run_dir import RunDir, Store
from experiments.suites import datasets
from mpformer.config.schema import Config, validate
from mpformer.runtime.errors import UserError

ROW = "single"
"""Stands for the row in the run's record."""


def read_config(name: str, overrides: Sequence[str]) -> Config:
    """Return the configuration of a YAML file or of a published setting, with ``KEY VALUE`` pairs.

    A YAML file takes Mask2Former's keys, in the file and as overrides. So does a setting's name. Raises UserError
    for a file that is not there, keys and values that are not known, and an odd number of overrides.
    """
    from mpformer.config.mask2former_yaml import from_yaml, with_overrides
    from mpformer.config.paper_settings import setting

    if Path(name).suffix in (".yaml", ".yml"):
        return from_yaml(Path(name), overrides)
    return with_overrides(setting(name), overrides)


def train(
    config: Config,
    store: Store,
    data_root: Path,
    *,
    runtime: dict[str, Any] | None = None,
    runner: Runner | None = None,
) -> tuple[RunDir, Ending]:
    """Train and evaluate a configuration in this process, or what is left of it; returns its run and how it ended.

    Raises UserError if data or initial weights are not in place.
    """
    config, data = datasets.resolve(config, data_root)
    datasets.check_val_images(config, data_root)
    config, weights = datasets.resolve_weights(config, data_root)
    missing = [line for line in (data.missing, weights) if line]
    if missing:
        raise UserError("; ".join(missing))
    config = config.replace(runtime or {})
    run = store.run(run_id(config))
    try:
        run.create(config, ROW)
        run.cancel_file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {store.root}: {error.strerror or error}; choose another --root") from None
    options = Options(data_root.resolve(), "single", capture=False)
    return run, run_attempt(store.root.resolve(), run.run_id, "all", options, runner, config)


def metrics(run: RunDir, config: Config) -> dict[str, float]:
    """Return the scores of a run for an evaluation setting; {} if there are none."""
    result = run.result(eval_id(config))
    return dict(result.metrics) if result is not None else {}


def evaluate(config: Config, weights: Path, out: Path, data_root: Path) -> dict[str, Any]:
    """Score a weights file, write the evaluation's files and ``result.json`` into ``out``, return its content.

    Which piloting and position parameters the weights have is told from the file. Raises UserError for data and
    weights that are missing or do not fit.
    """
    from mpformer.evaluation.evaluate import evaluate as score
    from mpformer.modeling.weights import detect_toggles

    config, data = datasets.resolve(config, data_root)
    if data.missing:
        raise UserError(data.missing)
    datasets.check_val_images(config, data_root)
    config = config.replace(detect_toggles(weights))
    result = score(config, weights, out, data_root)
    write_json(out / "result.json", {**result, "run_id": str(weights), "eval_id": eval_id(config)})
    return result


def config_beside(weights: Path) -> Config:
    """Return the configuration of the run that a weights file lies in; raises UserError if it lies in none."""
    for folder in weights.resolve().parents[:2]:
        record = RunDir(folder).sound_record()
        if record is not None:
            return validate(dict(record.config))
    raise UserError(f"{weights} is not in a run's directory: say what model it is with --config (a YAML or a setting)")


def score_lines(scores: dict[str, float]) -> Iterable[str]:
    """Yield one line a score."""
    return [f"{name:<18} {value:6.2f}" for name, value in scores.items()]
