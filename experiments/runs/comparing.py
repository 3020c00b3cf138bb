"""The scores of two checkpoints, compared by a paired bootstrap over the validation images."""

from typing import TYPE_CHECKING

from mpformer.runtime.errors import UserError, choices

if TYPE_CHECKING:
    from analysis.scores import PerImage
    from analysis.statistics import BootstrapTest
    from experiments.runs.visualizing import Evaluated


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
