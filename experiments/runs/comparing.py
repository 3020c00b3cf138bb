"""``mpformer compare``: the scores of two checkpoints, by a paired bootstrap over the validation images."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mpformer.runtime.errors import UserError, choices

if TYPE_CHECKING:
    from analysis.scores import PerImage
    from analysis.statistics import BootstrapTest
    from experiments.runs.visualizing import Evaluated


@click.command()
@click.argument("run")
@click.argument("run2")
@click.option("--metric", default="AP", show_default=True, help="AP, AP50, AP75, PQ, SQ, RQ or mIoU, as evaluated.")
@click.option("--resamples", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
@click.option(
    "--root", envvar="MPFORMER_ROOT", default="store", show_default=True, type=click.Path(path_type=Path),
    help="Run store.  [env: MPFORMER_ROOT]",
)  # fmt: skip
def compare(run: str, run2: str, metric: str, resamples: int, as_json: bool, root: Path) -> None:
    """Compare a score of two runs' checkpoints by resampling the images; says nothing of the methods."""
    from experiments.runs import visualizing
    from experiments.store.run_dir import Store

    found = [visualizing.newest_evaluation(Store(root).find(name)) for name in (run, run2)]
    visualizing.check_comparable(found)
    test = bootstrap(found[0], found[1], metric, resamples)
    if as_json:
        return click.echo(json.dumps(asdict(test), indent=1))
    names = visualizing.labels(found)
    click.echo(
        f"{test.metric}: {names[1]} - {names[0]} = {test.effect:+.2f}, 95 % interval {test.low:+.2f} to "
        f"{test.high:+.2f}, p = {test.p:.3g}"
    )
    return click.echo(
        f"paired bootstrap over {test.images} images, {test.resamples} resamples: {test.about} (compare rows over "
        "seeds for that: mpformer report)"
    )


def bootstrap(first: "Evaluated", second: "Evaluated", metric: str, resamples: int) -> "BootstrapTest":
    """Compare two evaluations; raises UserError for files that are missing, other images, or an unknown metric."""
    from analysis.statistics import compare_checkpoints

    one, two = (_per_image(of) for of in (first, second))
    known = one.scores().keys() & two.scores().keys()
    if metric not in known:
        raise choices("metric", metric, sorted(known))
    try:
        return compare_checkpoints(one, two, metric, resamples=resamples)
    except ValueError as error:
        raise UserError(f"{first.run.run_id} and {second.run.run_id} cannot be compared: {error}") from None


def _per_image(evaluated: "Evaluated") -> "PerImage":
    from analysis import scores

    path = evaluated.folder / "per_image.parquet"
    if not path.exists():
        raise UserError(f"{evaluated.run.run_id} has no {path.name}: launch its suite again to evaluate it")
    return scores.read(path)
