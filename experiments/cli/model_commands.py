"""``mpformer train``, ``eval``, ``predict`` and ``export``: one model, as Mask2Former's train_net.py has it."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from experiments.cli.console import print_json, print_outcome, progress_bar, warn
from experiments.cli.group import cli
from experiments.cli.options import (
    data_root_option,
    json_option,
    root_option,
    root_options,
    weights_changes,
    weights_options,
)
from mpformer.runtime.errors import UserError

_weights = click.option(
    "--weights", required=True, type=click.Path(path_type=Path), help="A .pth or .pkl file, released or trained here."
)
_dataset = click.option("--dataset", default=None, help="Instead of CONFIG's: such as one that `data add` registered.")
_CONFIG = "CONFIG is a Mask2Former-style YAML file, or a setting such as coco/instance/r50-12ep."


@cli.command(epilog=_CONFIG)
@click.argument("words", nargs=-1, metavar="[CONFIG] [KEY VALUE]...")
@click.option("--config-file", default=None, metavar="CONFIG", help="The same as CONFIG.")
@weights_options
@click.option("--seed", type=click.IntRange(0), default=None, help="Default: SEED of the configuration.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--num-gpus", type=click.IntRange(0), default=None, help="Processes, a GPU each; 0: the CPU.")
@click.option("--resume", is_flag=True, help="Nothing to ask for: a run always goes on where it stopped.")
@click.option("--eval-only", is_flag=True, help="Score MODEL.WEIGHTS into --out instead, as `eval` does.")
@click.option("--out", default="evaluation", show_default=True, type=click.Path(path_type=Path), help="Of --eval-only.")
@_dataset
@root_options
def train(
    words: Sequence[str],
    config_file: str | None,
    weights: str | None,
    reinit_class_head: bool,
    seed: int | None,
    threads: int,
    num_gpus: int | None,
    resume: bool,
    eval_only: bool,
    out: Path,
    dataset: str | None,
    root: Path,
    data_root: Path,
) -> int:
    """Train and evaluate one model here; the same command again goes on where it stopped.

    Takes what train_net.py of Mask2Former takes.
    """
    import logging

    from experiments.runs import processes, single
    from experiments.store.run_dir import Store

    del resume  # it always is
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    changes = weights_changes(weights, reinit_class_head) | ({} if seed is None else {"seed": seed})
    chosen = single.read_config(*_config_and_overrides(words, config_file), dataset).replace(changes)
    if eval_only:
        return _print_scores(single.evaluate(chosen, single.whole_model(chosen, data_root), out, data_root), out)
    chosen, runtime = processes.on_gpus(chosen, num_gpus), {"runtime.threads": threads}
    if processes.several(num_gpus):
        single.ready(chosen, data_root, runtime=runtime)  # what is wrong is said once
        return processes.start(num_gpus)
    run, ending = single.train(chosen, Store(root), data_root, runtime=runtime)
    code = print_outcome(run.path, ending)
    for line in single.score_lines(single.metrics(run, chosen)):
        click.echo(line)
    return code


def _config_and_overrides(words: Sequence[str], config_file: str | None) -> tuple[str, Sequence[str]]:
    """What to train, and what to change of it; raises UserError if nothing is named."""
    if config_file:
        return config_file, words
    if not words:
        raise UserError("train what? give a Mask2Former-style YAML file, or a setting such as coco/instance/r50-12ep")
    return words[0], words[1:]


@cli.command("eval", epilog=_CONFIG)
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY VALUE]...")
@_weights
@click.option("--out", default="evaluation", show_default=True, type=click.Path(path_type=Path), help="Directory.")
@_dataset
@json_option
@data_root_option
def evaluate(
    config: str,
    overrides: Sequence[str],
    weights: Path,
    out: Path,
    dataset: str | None,
    as_json: bool,
    data_root: Path,
) -> None:
    """Score WEIGHTS on the validation images, layer by layer, without training."""
    from experiments.runs import single

    result = single.evaluate(single.read_config(config, overrides, dataset), weights, out, data_root)
    if as_json:
        return print_json(result)
    _print_scores(result, out)
    return None


def _print_scores(result: Mapping[str, Any], out: Path) -> int:
    from experiments.runs import single
    from experiments.store.run_dir import RESULT

    for line in single.score_lines(result["metrics"]):
        click.echo(line)
    click.echo(f"{result['images']} images; all numbers: {out / RESULT}")
    return 0


@cli.command(epilog=_CONFIG.replace("CONFIG", "--config"))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@_weights
@click.option("--config", default=None, help="Default: the configuration of the run that WEIGHTS lies in.")
@click.option("--set", "overrides", nargs=2, multiple=True, metavar="KEY VALUE", help="Repeatable.")
@click.option("--out", default="predictions", show_default=True, type=click.Path(path_type=Path), help="Directory.")
@click.option("--masks", default=None, type=click.Path(path_type=Path), help="Also a PNG a mask into this directory.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=None,
    help="Least score of what is shown; default: 0.5, for panoptic models evaluation.object_mask_threshold.",
)
@json_option
def predict(
    images: Sequence[Path],
    weights: Path,
    config: str | None,
    overrides: Sequence[tuple[str, str]],
    out: Path,
    masks: Path | None,
    threshold: float | None,
    as_json: bool,
) -> None:
    """Write an overlay of the predicted masks over each of IMAGES."""
    from rich.console import Console

    from experiments.runs import single
    from mpformer.evaluation.predict import predict as seen_in

    if config is None and overrides:
        raise UserError("--set changes a configuration that --config names; give that too")
    pairs = [text for pair in overrides for text in pair]
    chosen = single.config_beside(weights) if config is None else single.read_config(config, pairs)
    several = progress_bar(Console(stderr=True), "images") if len(images) > 1 else nullcontext(lambda done, total: None)
    with several as progress:
        found = list(seen_in(images, weights, chosen, out, threshold=threshold, masks=masks, progress=progress))
    if as_json:
        print_json([seen.record() for seen in found])
    for seen in found:
        if not as_json:
            click.echo(seen.overlay)
        if not seen.regions:
            warn(f"{seen.image}: nothing was found; a lower --threshold shows what the model is less sure of")


@cli.command()
@click.argument("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--to", "form", required=True, type=click.Choice(["mask2former", "huggingface"]), help="Whose names.")
@root_option
def export(run: str, file: Path, form: Any, root: Path) -> None:
    """Write the final weights of RUN as plain Mask2Former into FILE (.pth, .pkl; huggingface: a directory)."""
    from experiments.runs import exporting
    from experiments.store.run_dir import Store

    exporting.export(Store(root).find(run), form, file)
    click.echo(file)
