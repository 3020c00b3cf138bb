"""``mpformer data add``, ``data prepare``, ``data check`` and ``mlflow sync``."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from experiments.cli.console import new_console, print_json, progress_bar
from experiments.cli.group import cli
from experiments.cli.options import data_root_option, json_option, root_option
from mpformer.data.own.registration import PANOPTIC_ORDER, VOID


@cli.group()
def data() -> None:
    """Add a dataset of your own, prepare and check datasets."""


def _names(_: click.Context, __: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """Class names, separated by commas."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


_existing = click.Path(path_type=Path)
_pixels = click.IntRange(32, 1024)


@data.command("add")
@click.argument("name")
@click.option("--train", required=True, type=_existing, help="COCO instances or panoptic JSON, or a folder of PNGs.")
@click.option("--val", required=True, type=_existing, help="The same of the validation images.")
@click.option("--images", required=True, type=_existing, help="Folder that the file names in --train begin in.")
@click.option("--val-images", type=_existing, default=None, help="The same for --val; default: --images.")
@click.option("--things", callback=_names, metavar="NAME,NAME", help="Classes whose objects are told apart.")
@click.option("--stuff", callback=_names, metavar="NAME,NAME", help="The other classes, instead of --things.")
@click.option("--classes", callback=_names, default="", metavar="NAME,NAME", help="Of semantic PNGs: by value, from 0.")
@click.option(
    "--panoptic-from-instances",
    "panoptic",
    type=click.Choice([PANOPTIC_ORDER]),
    default=None,
    help="Paint instances into a panoptic map, large before small.",
)
@click.option(
    "--uncovered", default=VOID, show_default=True, help="What is covered by nothing: void, or a class's name."
)
@click.option("--crop", type=_pixels, default=128, show_default=True, help="Side of the tiles of scale mini.")
@click.option("--resize", type=click.IntRange(0), default=None, help="Shorter side before tiles are cut; 0: as it is.")
@click.option("--queries", type=click.IntRange(1), default=None, help="Queries of scale mini's model.")
@click.option(
    "--train-points", type=click.IntRange(1), default=None, help="Points a mask that its losses are taken at."
)
@click.option("--min-pixels", type=click.IntRange(1), default=10, show_default=True, help="Smaller pieces become void.")
@click.option("--max-objects", type=click.IntRange(0), default=0, help="Leave tiles with more objects out; 0: none.")
@click.option(
    "--mini-images", type=click.IntRange(4), default=2000, show_default=True, help="Images for tiles, at most."
)
@data_root_option
def data_add(
    name: str,
    train: Path,
    val: Path,
    images: Path,
    val_images: Path | None,
    panoptic: str | None,
    data_root: Path,
    **asked: Any,
) -> None:
    """Register a dataset of your own as NAME: COCO instances (polygons, RLE), COCO panoptic, or semantic PNGs.

    What is not given of --resize, --queries, --train-points and --stuff is reckoned from the set. Images stay where
    they are."""
    from mpformer.data.own.adding import Asked, add

    wanted = Asked(name, train, val, images, val_images, panoptic=panoptic or "", **asked)
    with progress_bar(new_console(), f"adding {name}") as progress:
        added = add(wanted, data_root, progress)
    for line in added.lines():
        click.echo(line)


@data.command("prepare")
@click.argument("name")
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option(
    "--crop",
    type=click.IntRange(32),
    default=128,
    show_default=True,
    help="Side of the crops, of a set that is cut into crops.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="dataset.shapes.… for shapes.")
@data_root_option
def data_prepare(name: str, source: Path | None, crop: int, overrides: Sequence[str], data_root: Path) -> None:
    """Write dataset NAME (shapes; nuclei from SOURCE) under the data root, or convert a release that lies there
    (coco, ade20k, cityscapes); what is done is left alone, what was interrupted goes on."""
    from experiments.suites import planning, scales
    from mpformer.config.classes import tasks_of
    from mpformer.config.schema import Config, DatasetConfig
    from mpformer.data.prepare import prepare

    task = tasks_of(name)[-1]  # raises for an unknown name
    mini = name in scales.datasets("mini")
    config = scales.base("mini", name) if mini else Config(dataset=DatasetConfig(name=name, task=task))
    cropped = {} if config.dataset.crop is None else {"dataset.crop": crop}
    dataset = config.replace(cropped | dict(planning.parse_override(text) for text in overrides)).dataset
    with progress_bar(new_console(), f"preparing {name}") as progress:
        path = prepare(dataset, data_root, source, progress)
    click.echo(path)


@data.command("check")
@click.argument("name")
@data_root_option
@click.option("--full", is_flag=True, help="Compare every file with its checksum, not the annotation files alone.")
@json_option
def data_check(name: str, data_root: Path, full: bool, as_json: bool) -> int:
    """Say what of dataset NAME is under the data root, what is missing and where to get it; open a sample."""
    from mpformer.data.check import check

    found = check(name, data_root, full)
    if as_json:
        print_json([{**asdict(report), "ok": report.ok} for report in found])
    else:
        for line in (line for report in found for line in report.lines()):
            click.echo(line)
    return 0 if all(report.ok for report in found) else 2


@cli.group()
def mlflow() -> None:
    """Mirror runs to MLflow."""


@mlflow.command("sync")
@root_option
@click.option("--uri", default=None, help="Tracking server; default: a SQLite file in the run store.")
def mlflow_sync(root: Path, uri: str | None) -> None:
    """Bring MLflow up to the run store; can be repeated, and never disturbs training."""
    from experiments.store.run_dir import Store
    from experiments.tracking import sync

    click.echo(sync.sync(Store(root), uri))
