"""The statistics of a table, by :mod:`analysis.statistics`: this module only fits them to cells."""

from collections.abc import Mapping, Sequence

from analysis import statistics
from reports.model import Delta, SeedValue


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof 1); no deviation where n < 3."""
    summary = statistics.summarise(values)
    return summary.mean, summary.std


def mean_interval(values: Sequence[float], bounds: statistics.Bounds | None) -> tuple[float | None, float | None]:
    """The 95 % interval of a mean, inside ``bounds`` if there are any; no ends where n < 3."""
    found = statistics.bounded_interval(values, *bounds) if bounds else statistics.mean_interval(values)
    return found or (None, None)


def paired_delta(
    ours: Sequence[SeedValue], baseline: Sequence[SeedValue], bounds: statistics.Bounds | None = None
) -> Delta | None:
    """The mean difference over the seeds that both have, with interval and p where n allows; None without a pair.

    ``bounds`` are what a difference can be.
    """
    mine, theirs = by_seed(ours), by_seed(baseline)
    if not mine.keys() & theirs.keys():
        return None
    test = statistics.paired_t(theirs, mine, bounds)
    return Delta(test.effect, test.n, test.low, test.high, test.p)


def by_seed(values: Sequence[SeedValue]) -> dict[int, float]:
    """The values by seed."""
    return {value.seed: value.value for value in values}


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm over a table's rows; rows without a p keep None."""
    return statistics.holm(p_values)
