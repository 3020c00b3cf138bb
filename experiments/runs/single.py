"""One model by hand: a Mask2Former-style YAML, or a setting's name, with ``KEY VALUE`` overrides.

Such a configuration is a typed one with an identity, like any row of a suite: what `train` trains is a run of the
store, with claims, checkpoints and attempts, and is taken up again where it stopped.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.execution.attempt import Options, Runner, run_attempt
from experiments.launch import inputs, machine
from experiments.store.attempt_dir import Ending
from experiments.store.identity import eval_id, run_id
from experiments.store.records import decode, save
from experiments.store.run_dir import RESULT, Result, RunDir, Store
from experiments.suites import datasets, scales
from mpformer.config.schema import Config, validate
from mpformer.runtime.errors import UserError

ROW = "single"
"""Stands for the row in the run's record."""


def read_config(name: str, overrides: Sequence[str], dataset: str | None = None) -> Config:
    """Return the configuration of a YAML file or of a published setting, with ``KEY VALUE`` pairs, on ``dataset`` if
    one is given.

    A YAML file takes Mask2Former's keys, in the file and as overrides. So does a setting's name. Raises UserError
    for a file that is not there, keys and values that are not known, and an odd number of overrides.
    """
    config = _read_config(name, overrides)
    return scales.moved_to(config, dataset, name) if dataset else config


def _read_config(name: str, overrides: Sequence[str]) -> Config:
    from mpformer.config.paper_settings import setting

    if not overrides and Path(name).suffix not in (".yaml", ".yml"):
        return setting(name)
    from mpformer.config.mask2former_yaml import from_yaml, with_overrides  # detectron2's, with torch: seconds

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

    Raises UserError as :func:`ready` does, OSError for a store that cannot be written.
    """
    config = ready(config, data_root, runtime=runtime, runner=runner)
    run = store.run(run_id(config))
    run.create(config, ROW)
    run.cancel_file.unlink(missing_ok=True)
    options = Options(data_root.resolve(), "single", capture=False)
    return run, run_attempt(store.root.resolve(), run.run_id, "all", options, runner, config)


def ready(
    config: Config, data_root: Path, *, runtime: dict[str, Any] | None = None, runner: Runner | None = None
) -> Config:
    """Return the configuration with data and initial weights found; weights that have an address are fetched.

    Raises UserError, before anything is written in a store, if data, device or weights are not there or do not fit.
    """
    config, data = datasets.resolve(config, data_root)
    datasets.check_val_images(config, data_root)
    if not data.missing:
        datasets.fetch_weights([config.model.init_weights], data_root)
    config, weights = datasets.resolve_weights(config, data_root)
    missing = [line for line in (data.missing, weights) if line]
    if missing:
        raise UserError("; ".join(missing))
    config = config.replace(runtime or {})
    if runner is None:
        _check_start(config)
    return config


def _check_start(config: Config) -> None:
    """Raise UserError for a device or initial weights that cannot be: cheap checks first, torch only after them."""
    device = config.runtime.device
    if device.startswith("cuda"):
        count, number = machine.cuda_devices(), int(device.partition(":")[2] or 0)
        if not count:
            raise UserError(f"runtime.device is {device!r} but there is no CUDA here; valid: auto, cpu")
        if number >= count:
            raise UserError(f"runtime.device is {device!r} but there are {count} GPUs, cuda:0 to cuda:{count - 1}")
    inputs.check_models([config])
    if config.model.init_weights:
        _fits(config)
    if device.startswith("cuda"):
        from mpformer.runtime.process import device_of

        device_of(device)  # there is a driver, but is this torch made for it?


def _fits(config: Config) -> None:
    """Load the initial weights into a model without memory, as training will into the real one."""
    import torch

    from mpformer.modeling.meta_arch import build_model
    from mpformer.training.trainer import load_initial

    with torch.device("meta"):
        model = build_model(config)
    load_initial(model, config, Path(config.model.init_weights))


def metrics(run: RunDir, config: Config) -> dict[str, float]:
    """Return the scores of a run for an evaluation setting; {} if there are none."""
    result = run.result(eval_id(config))
    return dict(result.metrics) if result is not None else {}


def whole_model(config: Config, data_root: Path) -> Path:
    """Return the file of a configuration's weights, fetched if they have an address; raises UserError without one."""
    if not config.model.init_weights:
        raise UserError("--eval-only scores the weights of a whole model: give --weights FILE or MODEL.WEIGHTS FILE")
    datasets.fetch_weights([config.model.init_weights], data_root)
    resolved, missing = datasets.resolve_weights(config, data_root)
    if missing:
        raise UserError(missing)
    return Path(resolved.model.init_weights)


def evaluate(config: Config, weights: Path, out: Path, data_root: Path) -> dict[str, Any]:
    """Score a weights file, write the evaluation's files and ``result.json`` into ``out``, return its content.

    Which piloting and position parameters the weights have is read from the file. Raises UserError for data and
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
    whose = {"run_id": str(weights), "eval_id": eval_id(config)}
    save(out / RESULT, decode(Result, {**result, **whose}, "the evaluation's result"))
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
