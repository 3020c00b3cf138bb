"""``mpformer data prepare``, ``data check`` and ``mlflow sync``."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from experiments.cli.console import new_console, print_json, progress_bar
from experiments.cli.group import cli
from experiments.cli.options import data_root_option, json_option, root_option


@cli.group()
def data() -> None:
    """Prepare and check datasets."""


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
