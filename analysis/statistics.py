"""Means over seeds, paired comparisons, Holm, and verdicts against published numbers. No torch; scipy where it is used.

Rows of a table are compared over *seeds* (:func:`paired_t`): that is a statement about the method. A bootstrap over
*images* (:func:`paired_bootstrap`) is a statement about two checkpoints only and enters no verdict on a method.
Every p comes with the effect and its 95 % interval.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isfinite, sqrt
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from analysis.scores import PerImage

#: Below this many seeds there is no ±, no interval and no verdict.
MIN_SEEDS = 3
LEVEL = 0.95
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (ddof = 1; None below three values) and n of a cell's values."""

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 1) -> str:
        """Such as ``43.2 ± 0.3 (n = 5)`` or, without a standard deviation, ``43.2 (n = 2)``."""
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread} (n = {self.n})"


@dataclass(frozen=True)
class PairedTest:
    """Paired t test over seeds. ``effect`` is the mean of ``second − first``, in the metric's points.

    ``low`` and ``high`` bound its 95 % interval, ``standardised`` is the effect in standard deviations of the
    differences (Cohen's d_z). With fewer than three pairs all but ``effect`` and ``n`` are None; ``reason`` says
    so.
    """

    effect: float
    n: int
    low: float | None = None
    high: float | None = None
    p: float | None = None
    standardised: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class BootstrapTest:
    """Paired bootstrap over images of *two checkpoints*: says nothing of the methods that made them.

    ``effect`` is ``second − first`` on all images; ``low`` and ``high`` are percentiles of the resampled
    differences; ``p`` is two-sided, twice the smaller share of resampled differences on either side of 0.
    """

    metric: str
    effect: float
    low: float
    high: float
    p: float
    images: int
    resamples: int
    about: str = "two checkpoints, not two methods"


VerdictKind = Literal["within", "outside", "underpowered", "not comparable"]
ClaimVerdict = Literal["seen", "not seen", "opposite", "underpowered"]


@dataclass(frozen=True)
class Verdict:
    """Ours against a published number (or our difference against a published difference)."""

    kind: VerdictKind
    reason: str
    published: float | None = None
    tolerance: float | None = None
    low: float | None = None
    high: float | None = None


def summarise(values: Sequence[float]) -> Summary:
    """Summary of a cell; raises ValueError without a value or with one that is not finite."""
    array = _finite(values)
    if array.size == 0:
        raise ValueError("no value to summarise")
    std = float(array.std(ddof=1)) if array.size >= MIN_SEEDS else None
    return Summary(float(array.mean()), std, array.size)


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """t interval of the mean, None below three values."""
    array = _finite(values)
    if array.size < MIN_SEEDS:
        return None
    half = _t_quantile((1 + level) / 2, array.size - 1) * float(array.std(ddof=1)) / sqrt(array.size)
    return float(array.mean()) - half, float(array.mean()) + half


@cache
def _t_quantile(share: float, degrees: int) -> float:
    from scipy.special import stdtrit  # what scipy.stats calls, which takes a second to import

    return float(stdtrit(degrees, share))


def bounded_interval(
    values: Sequence[float], low: float = 0.0, high: float = 100.0, level: float = LEVEL
) -> tuple[float, float] | None:
    """Interval of the mean of values that lie between ``low`` and ``high`` (shares, IoUs, cosines), None below three.

    The t interval of arcsin √share, transformed back: it stays in the range, also where a value is at its end. Raises
    ValueError for a value outside the range.
    """
    found = mean_interval(_arcsine(values, low, high).tolist(), level)
    if found is None:
        return None
    ends = np.sin(np.clip(found, 0, np.pi / 2)) ** 2
    return low + (high - low) * float(ends[0]), low + (high - low) * float(ends[1])


def _arcsine(values: Sequence[float], low: float, high: float) -> np.ndarray:
    """arcsin √share of values between ``low`` and ``high``; raises ValueError for one outside."""
    shares = (_finite(values) - low) / (high - low)
    if ((shares < -_ROUNDING) | (shares > 1 + _ROUNDING)).any():
        raise ValueError(f"a value lies outside {low:g} … {high:g}")
    return np.arcsin(np.sqrt(np.clip(shares, 0, 1)))


Bounds = tuple[float, float]


def paired_t(first: Mapping[int, float], second: Mapping[int, float], bounds: Bounds | None = None) -> PairedTest:
    """Compare two rows over the seeds that both have: values by seed. Raises ValueError if they share none.

    ``bounds`` are what a difference can be, such as −100 and 100 of two percentages: interval and test are then those
    of the differences on the arcsine scale (:func:`bounded_interval`), so that the interval stays inside and agrees
    with p; the effect is the plain mean. Differences that do not vary at all have no t statistic: p is 1 if they are
    0, and 0 otherwise.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise ValueError("the rows share no seed")
    differences = _finite([second[seed] - first[seed] for seed in seeds])
    effect, n = float(differences.mean()), len(seeds)
    known = differences.tolist()
    interval = mean_interval(known) if bounds is None else bounded_interval(known, *bounds)
    if interval is None:
        return PairedTest(effect, n, reason=f"n = {n}, no significance: needs {MIN_SEEDS} shared seeds")
    spread = float(differences.std(ddof=1))
    if spread == 0:
        return PairedTest(effect, n, *interval, p=float(effect == 0), reason="the differences do not vary")
    shown = differences if bounds is None else _arcsine(known, *bounds) - _arcsine([0.0], *bounds)
    p = _t_p(float(shown.mean()), float(shown.std(ddof=1)), n)
    return PairedTest(effect, n, *interval, p=p, standardised=effect / spread)


def _t_p(effect: float, spread: float, n: int) -> float:
    from scipy.special import stdtr

    return float(2 * stdtr(n - 1, -abs(effect) / (spread / sqrt(n))))


Score = Callable[[np.ndarray | None], Mapping[str, float]]


def paired_bootstrap(
    first: Score,
    second: Score,
    images: int,
    metric: str,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> BootstrapTest:
    """Resample the same ``images`` for two checkpoints and compare a metric.

    ``first`` and ``second`` give the metrics for integer image weights (images,), for example
    :meth:`analysis.scores.PerImage.scores`, whose images must be the same, in the same order. Resamples in which
    the metric does not exist (NaN) are left out.
    """
    whole = second(None)[metric] - first(None)[metric]
    weights = bootstrap_weights(images, resamples, seed)
    differences = np.array([second(row)[metric] - first(row)[metric] for row in weights])
    differences = differences[np.isfinite(differences)]
    if not isfinite(whole) or differences.size == 0:
        raise ValueError(f"{metric} does not exist on these images")
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return BootstrapTest(metric, whole, float(low), float(high), _sign_p(differences), images, resamples)


def compare_checkpoints(
    first: "PerImage", second: "PerImage", metric: str, *, resamples: int = 1000, seed: int = 0
) -> BootstrapTest:
    """:func:`paired_bootstrap` of two checkpoints' ``per_image.parquet`` (:func:`analysis.scores.read`).

    Raises ValueError unless both hold the same images, and if the metric does not exist on them.
    """
    if not np.array_equal(first.image_ids, second.image_ids):
        raise ValueError("they were evaluated on different images")
    images = len(first.image_ids)
    return paired_bootstrap(_only(first, metric), _only(second, metric), images, metric, resamples=resamples, seed=seed)


def _only(of: "PerImage", metric: str) -> Score:
    """The scores of the one task that has the metric: nothing else is accumulated again."""
    alone = (
        replace(of, panoptic=None, semantic=None),
        replace(of, detections=None, semantic=None),
        replace(of, detections=None, panoptic=None),
    )
    for one in alone:
        if metric in one.scores():
            return one.scores
    raise ValueError(f"{metric} was not evaluated")


def bootstrap_weights(images: int, resamples: int, seed: int = 0) -> "WeightRows":
    """How often each image is drawn, one (images,) int64 vector per resample, reproducible by ``seed``."""
    return WeightRows(images, resamples, seed)


@dataclass(frozen=True)
class WeightRows:
    """Iterates over resamples without holding them; every iteration gives the same rows."""

    images: int
    resamples: int
    seed: int

    def __iter__(self) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(self.seed)
        for _ in range(self.resamples):
            yield np.bincount(rng.integers(0, self.images, self.images), minlength=self.images)


def _sign_p(differences: np.ndarray) -> float:
    """Two-sided p; never 0, since a finite number of resamples cannot show that."""
    n = differences.size
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (n + 1)))


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's step-down adjustment within a table: name → adjusted p. A p of None stays None and is no hypothesis."""
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    running = 0.0
    for rank, (p, name) in enumerate(known):
        running = max(running, min(1.0, (len(known) - rank) * p))
        adjusted[name] = running
    return adjusted


def claim_verdict(test: PairedTest, p: float | None, smallest: float) -> ClaimVerdict:
    """Return what paired seeds say of a claim that an effect is positive.

    ``p`` is the test's, corrected for its family (:func:`holm`); ``smallest`` the smallest effect that matters, in
    the metric's points. *seen* and *opposite* need p < 0.05 and the sign; *not seen* an interval inside
    ± ``smallest``; everything else is *underpowered*, fewer than three seeds too. A significant effect is seen
    although it is small: its size stands beside it. Raises ValueError unless ``smallest`` is positive.
    """
    if not smallest > 0:
        raise ValueError("the smallest effect that matters must be positive")
    if test.low is None or test.high is None or p is None:
        return "underpowered"
    if p < 1 - LEVEL:
        return "seen" if test.effect > 0 else "opposite"
    return "not seen" if -smallest < test.low and test.high < smallest else "underpowered"


def detectable(spread: float, n: int, power: float = 0.8, level: float = LEVEL) -> float:
    """Return the effect that ``n`` paired seeds show, in its direction, with this power: two-sided, uncorrected.

    ``spread`` is the standard deviation of the paired differences, in the metric's points, as the effect is. Raises
    ValueError below two seeds. (Noncentral t; Cohen 1988, section 2.)
    """
    from scipy import optimize, stats

    if n < 2:
        raise ValueError("a paired t test needs two seeds")
    critical = stats.t.ppf((1 + level) / 2, n - 1)

    def missing(shift: float) -> float:
        return power - float(stats.nct.sf(critical, n - 1, shift))

    return float(optimize.brentq(missing, 0.0, 3 * critical)) * spread / sqrt(n)


def verdict(
    values: Sequence[float],
    published: float | None,
    tolerance: float | None,
    *,
    not_comparable: str = "",
    bounds: Bounds | None = None,
) -> Verdict:
    """Ours against a published number, by the 95 % interval of our mean.

    *within* if the interval lies inside ``published ± tolerance``, *outside* if it is disjoint from it, else
    *underpowered* (always below three values). ``not_comparable`` is the reason why scale, dataset or schedule
    differ, empty if they do not. For differences pass the paired differences and the published difference. ``bounds``
    are what a value can be: the interval stays inside (:func:`bounded_interval`).
    """
    if not_comparable:
        return Verdict("not comparable", not_comparable, published, tolerance)
    if published is None or tolerance is None:
        return Verdict(
            "not comparable", "no published number" if published is None else "no tolerance given", published
        )
    if tolerance < 0:
        raise ValueError("tolerance must not be negative")
    interval = mean_interval(values) if bounds is None else bounded_interval(values, *bounds)
    if interval is None:
        return Verdict("underpowered", f"n = {len(values)}, needs {MIN_SEEDS}", published, tolerance)
    return _judge(interval, published, tolerance)


def _judge(interval: tuple[float, float], published: float, tolerance: float) -> Verdict:
    low, high = interval
    shown = f"95 % interval {low:.2f} … {high:.2f}, published {published:g} ± {tolerance:g}"
    if published - tolerance <= low and high <= published + tolerance:
        return Verdict("within", shown, published, tolerance, low, high)
    if high < published - tolerance or low > published + tolerance:
        return Verdict("outside", shown, published, tolerance, low, high)
    return Verdict("underpowered", shown, published, tolerance, low, high)


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("a value is not finite")
    return array
