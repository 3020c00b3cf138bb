"""The options that several commands share, each written once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpformer.runtime.errors import UserError

if TYPE_CHECKING:
    from experiments.suites.planning import Request


Command = Callable[..., Any]


def root_options(command: Command) -> Command:
    store = click.option(
        "--root", envvar="MPFORMER_ROOT", default="store", show_default=True, type=click.Path(path_type=Path),
        help="Run store.  [env: MPFORMER_ROOT]",
    )  # fmt: skip
    data = click.option(
        "--data-root", envvar="DETECTRON2_DATASETS", default="datasets", show_default=True,
        type=click.Path(path_type=Path), help="Datasets.  [env: DETECTRON2_DATASETS]",
    )  # fmt: skip
    return store(data(command))


def scale_options(command: Command) -> Command:
    scale = click.option("--scale", default="mini", show_default=True, help="mini or paper.")
    dataset = click.option("--dataset", default=None, help="Dataset, where a scale has several (mini: shapes, nuclei).")
    return scale(dataset(command))


def plan_options(command: Command) -> Command:
    for option in (
        click.option("--seed", "one_seed", type=int, default=None, help="One seed."),
        click.option("--seeds", default=None, help="Seeds, such as 0,1,2 or 0-4; default: the suite's."),
        click.option("--row", "rows", multiple=True, help="Only this row; may be given several times."),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE",
            help="Change a configuration key of every row, such as schedule.max_iter=300 (milestones move along). "
            "This changes the runs' identity.",
        ),
    ):  # fmt: skip
        command = option(command)
    return scale_options(command)


def place_options(command: Command) -> Command:
    for option in (
        click.option("--max-submit", type=click.IntRange(1), default=None, help="Most jobs in the queue."),
        click.option("--max-array", type=click.IntRange(1), default=None, help="Most jobs an array."),
        click.option("--parallelism", type=click.IntRange(1), default=None, help="Most jobs of the suite at a time."),
        click.option("--detach", is_flag=True, help="Return at once; the workers go on. (Jobs in a queue always do.)"),
        click.option("--threads", type=click.IntRange(1), default=None, help="Threads a worker."),
        click.option(
            "--workers", type=click.IntRange(1), default=None, help="Worker processes; default: by cores and memory."
        ),
        click.option(
            "--on", default="local", show_default=True, metavar="PROFILE",
            help="Where: a profile of slurm/profiles, or the path of a YAML file.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


def plan_request(
    suite: str,
    scale: str,
    dataset: str | None,
    rows: Sequence[str],
    seeds: str | None,
    one_seed: int | None,
    overrides: Sequence[str],
) -> "Request":
    from experiments.suites import planning

    if seeds is not None and one_seed is not None:
        raise UserError("give --seed or --seeds, not both")
    chosen = (one_seed,) if one_seed is not None else planning.parse_seeds(seeds) if seeds is not None else ()
    changed = tuple(planning.parse_override(text) for text in overrides)
    for key, _ in changed:
        if key == "seed":
            raise UserError("the seed is not an override; use --seed or --seeds")
    return planning.Request(suite, scale, dataset, tuple(rows), chosen, changed)
