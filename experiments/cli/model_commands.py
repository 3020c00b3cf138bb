"""``mpformer train``, ``eval`` and ``predict``: a single model, for those who come from Mask2Former's train_net.py."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import click

from experiments.cli.console import print_json, print_outcome, progress_bar, warn
from experiments.cli.group import cli
from experiments.cli.options import data_root_option, json_option, root_options
from mpformer.runtime.errors import UserError

_weights = click.option(
    "--weights", required=True, type=click.Path(path_type=Path), help="A .pth or .pkl file, released or trained here."
)
_dataset = click.option("--dataset", default=None, help="Instead of CONFIG's: such as one that `data add` registered.")
_CONFIG = "CONFIG is a Mask2Former-style YAML file, or a setting such as coco/instance/r50-12ep."


@cli.command(epilog=_CONFIG)
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY VALUE]...")
@click.option("--seed", type=click.IntRange(0), default=None, help="Default: SEED of the configuration.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@_dataset
@root_options
def train(
    config: str,
    overrides: Sequence[str],
    seed: int | None,
    threads: int,
    dataset: str | None,
    root: Path,
    data_root: Path,
) -> int:
    """Train and evaluate one model in this process; the same command again goes on where it stopped."""
    import logging

    from experiments.runs import single
    from experiments.store.run_dir import Store

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    chosen = single.read_config(config, overrides, dataset)
    chosen = chosen if seed is None else chosen.replace({"seed": seed})
    run, ending = single.train(chosen, Store(root), data_root, runtime={"runtime.threads": threads})
    code = print_outcome(run.path, ending)
    for line in single.score_lines(single.metrics(run, chosen)):
        click.echo(line)
    return code


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
    from experiments.store.run_dir import RESULT

    result = single.evaluate(single.read_config(config, overrides, dataset), weights, out, data_root)
    if as_json:
        return print_json(result)
    for line in single.score_lines(result["metrics"]):
        click.echo(line)
    return click.echo(f"{result['images']} images; all numbers: {out / RESULT}")


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
