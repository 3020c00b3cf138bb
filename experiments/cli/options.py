"""The options that several commands share, each written once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpformer.config.datasets import DATASETS
from mpformer.data.own import registration
from mpformer.runtime.errors import UserError

if TYPE_CHECKING:
    from experiments.suites.planning import Request

Command = Callable[..., Any]


def _recall_datasets(_: click.Context, __: click.Parameter, root: Path) -> Path:
    """Know the sets of the user's own that suites in a store were launched on."""
    if any(root.glob("suites/*+*.json")):
        from experiments.store.run_dir import Store
        from experiments.suites import datasets

        datasets.recall(Store(root))
    return root


def _know_datasets(_: click.Context, __: click.Parameter, data_root: Path) -> Path:
    """Know the sets of the user's own that are registered under a data root."""
    registration.know_all(data_root)
    return data_root


root_option = click.option(
    "--root", envvar="MPFORMER_ROOT", default="store", show_default=True, type=click.Path(path_type=Path),
    callback=_recall_datasets, help="Run store.  [env: MPFORMER_ROOT]",
)  # fmt: skip
data_root_option = click.option(
    "--data-root", envvar="DETECTRON2_DATASETS", default="datasets", show_default=True,
    type=click.Path(path_type=Path), callback=_know_datasets, help="Datasets.  [env: DETECTRON2_DATASETS]",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def _add_suites(_: click.Context, __: click.Parameter, files: tuple[Path, ...]) -> None:
    if files:
        from experiments.suites import catalogue

        for file in files:
            catalogue.add_file(file)


suites_option = click.option(
    "--suites", "suites_files", multiple=True, metavar="FILE", type=click.Path(path_type=Path), expose_value=False,
    is_eager=True, callback=_add_suites,
    help="A Python file with suites of your own; repeatable.  [env: MPFORMER_SUITES]",
)  # fmt: skip


def root_options(command: Command) -> Command:
    """``--root`` and ``--data-root``."""
    return root_option(data_root_option(command))


def scale_options(command: Command) -> Command:
    """``--scale`` and ``--dataset``, and ``--suites``: what says which suite is meant."""
    scale = click.option("--scale", default="mini", show_default=True, help="mini or paper.")
    minis = ", ".join(name for name, entry in DATASETS.items() if entry.mini)
    dataset = click.option(
        "--dataset", default=None, help=f"Dataset, where there are several (mini: {minis}, and yours)."
    )
    return scale(dataset(suites_option(command)))


def plan_options(command: Command) -> Command:
    """What :func:`plan_request` takes besides the suite: scale, dataset, rows, seeds, overrides."""
    for option in (
        click.option("--seed", "one_seed", type=click.IntRange(0), default=None, help="One seed."),
        click.option("--seeds", default=None, help="Seeds, such as 0,1,2 or 0-4; default: the suite's."),
        click.option("--row", "rows", multiple=True, help="Only this row; may be given several times."),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE",
            help="Change a configuration key of every row, such as schedule.max_iter=300 (milestones move along). "
            "This changes the runs' identity.",
        ),
        click.option(
            "--base", default=None, metavar="SETTING",
            help="At scale paper: the setting that the rows change, such as coco/instance/r50-12ep.",
        ),
    ):  # fmt: skip
        command = option(command)
    return scale_options(weights_options(command))


def weights_options(command: Command) -> Command:
    """``--weights`` and ``--reinit-class-head``; :func:`weights_changes` are the keys that they set."""
    weights = click.option(
        "--weights", default=None, metavar="FILE",
        help="Initial weights, a file or an address (timm://MODEL.TAG …): model.init_weights.",
    )  # fmt: skip
    reinit = click.option(
        "--reinit-class-head", is_flag=True,
        help="Fine-tune on other classes; rows of equal names are taken: model.reinit_class_head.",
    )  # fmt: skip
    return weights(reinit(command))


def weights_changes(weights: str | None, reinit_class_head: bool) -> dict[str, Any]:
    """The configuration keys that :func:`weights_options` set; a file's path is made absolute."""
    changes: dict[str, Any] = {}
    if weights is not None:
        changes["model.init_weights"] = weights if "://" in weights else str(Path(weights).absolute())
    return changes | ({"model.reinit_class_head": True} if reinit_class_head else {})


LOCAL_OPTIONS = ("workers", "threads", "detach")
SLURM_OPTIONS = ("parallelism", "max_array", "max_submit")
"""Which of :func:`execution_options` are for which kind of profile."""


def execution_options(command: Command) -> Command:
    """Where runs are executed, and how many at a time."""
    count = click.IntRange(1)
    for option in (
        click.option("--max-submit", type=count, default=None, help="Most jobs in the queue."),
        click.option("--max-array", type=count, default=None, help="Most jobs an array."),
        click.option("--parallelism", type=count, default=None, help="Most jobs of the suite at a time."),
        click.option(
            "--detach", is_flag=True,
            help="Return at once; the workers go on. (Jobs in a queue always do; else they end with the command.)",
        ),
        click.option("--threads", type=count, default=None, help="Threads a worker."),
        click.option("--workers", type=count, default=None, help="Worker processes; default: by cores and memory."),
        click.option(
            "--on", default="local", show_default=True, metavar="PROFILE",
            help="Where: a profile of slurm/profiles, or the path of a YAML file.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def plan_request(
    suite: str,
    scale: str,
    dataset: str | None,
    rows: Sequence[str],
    seeds: str | None,
    one_seed: int | None,
    overrides: Sequence[str],
    base: str | None = None,
    weights: str | None = None,
    reinit_class_head: bool = False,
) -> "Request":
    """What the words of a command ask for; raises UserError for seeds and overrides that cannot be read."""
    from experiments.suites import planning

    if seeds is not None and one_seed is not None:
        raise UserError("give --seed or --seeds, not both")
    written = str(one_seed) if one_seed is not None else seeds
    chosen = planning.parse_seeds(written) if written is not None else ()
    changed = tuple(planning.parse_override(text) for text in overrides)
    for key, _ in changed:
        if key == "seed":
            raise UserError("the seed is not an override; use --seed or --seeds")
    changed += tuple(weights_changes(weights, reinit_class_head).items())
    return planning.Request(suite, "paper" if base else scale, dataset, tuple(rows), chosen, changed, base)
