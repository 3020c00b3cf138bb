"""The claims of the study as protocol.md fixes them: metrics, directions, smallest effects that matter, families.

Frozen together with protocol.md and suites.py before the study's first run; study.py reads this and decides nothing
itself. Scores, shares and rates are in points (0 to 100), cosines in hundredths.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

SETS = ("shapes", "nuclei", "facades")
BASELINE, PILOTED, HALF = "mask2former", "mp-former", "mp-former-half"


@dataclass(frozen=True)
class Metric:
    """A number of a run's result: a key of its ``metrics``, or the mean of a layer list over some layers."""

    name: str
    key: str
    layers: slice | None = None
    """None: ``metrics[key]``; otherwise the mean of ``layers[key]`` over these."""
    better: Literal["higher", "lower"] = "higher"
    per_class: str = ""
    """The score of this class alone: ``classes[key]`` of the result."""


AP = Metric("AP", "AP")
PQ = Metric("PQ", "PQ")
MIOU = Metric("mIoU", "mIoU")
WINDOWS = Metric("AP of windows", "AP", per_class="window")
UTIL = Metric("Util", "Util")
CONSISTENCY = Metric("mIoU-L from layer 1 on", "mIoU-L", slice(2, None))
JUMPS = Metric("jump rate after layer 1", "jump-rate-late", better="lower")
GRADIENT = Metric("gradient cosine, layers 1 to L", "gradient_cosine", slice(1, None))
STABILITY = Metric("queries that keep their object, steps from layer 1 on", "Util-consecutive", slice(1, -1))


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two rows of a suite that gets a verdict."""

    suite: str
    row: str
    against: str
    metric: Metric
    smallest: float
    """Smallest effect that matters, in the metric's points."""
    non_inferiority: bool = False
    """The claim is "not worse by more than ``smallest``"."""


@dataclass(frozen=True)
class Family:
    """Comparisons on one set that Holm's correction takes together."""

    claim: str
    set: str
    comparisons: tuple[Comparison, ...]


SMALLEST: Mapping[str, Mapping[str, float]] = {
    "shapes": {AP.name: 1.5, PQ.name: 2.4, MIOU.name: 2.6},
    "nuclei": {AP.name: 3.4},
    "facades": {WINDOWS.name: 0.4, PQ.name: 1.3, MIOU.name: 2.1},
}
"""Smallest effect that matters of a score: a tenth of Mask2Former's in the calibration."""

SMALLEST_ANYWHERE: Mapping[str, float] = {
    CONSISTENCY.name: 2.0,
    JUMPS.name: 3.0,
    UTIL.name: 2.0,
    GRADIENT.name: 2.0,
    STABILITY.name: 2.0,
}
"""Of shares and cosines, in points or hundredths, on every set."""

PRIMARY: Mapping[str, Metric] = {"shapes": AP, "nuclei": AP, "facades": PQ}
"""What C4 and C7 are judged by."""

SCORES: Mapping[str, tuple[Metric, ...]] = {
    "shapes": (AP, PQ, MIOU),
    "nuclei": (AP,),
    "facades": (PQ, MIOU, WINDOWS),
}
"""C3 by set; of facades, AP of windows: other things have an AP below 1 at this length."""

CLAIMS: Mapping[str, str] = {
    "C1": "Masks are more consistent from layer to layer, at no cost in quality",
    "C2": "Queries are better utilized",
    "C3": "AP, PQ and mIoU rise",
    "C4": "Half the iterations reach Mask2Former's full result",
    "C5": "Training costs barely more",
    "C6": "Inference is untouched",
    "C7": "Each toggle helps",
    "C8": "Gradients are more accurate, matching is more stable",
}


def smallest(metric: Metric, of_set: str) -> float:
    """The smallest effect that matters, in the metric's points."""
    return SMALLEST_ANYWHERE.get(metric.name) or SMALLEST[of_set][metric.name]


def _headline(of_set: str, *metrics: Metric, suite: str = "study-headline") -> tuple[Comparison, ...]:
    return tuple(Comparison(suite, PILOTED, BASELINE, metric, smallest(metric, of_set)) for metric in metrics)


def _toggles(of_set: str, suite: str, *pairs: tuple[str, str]) -> Family:
    """The claim is that the first of each pair is better than the second."""
    metric = PRIMARY[of_set]
    found = tuple(Comparison(suite, row, against, metric, smallest(metric, of_set)) for row, against in pairs)
    return Family("C7", of_set, found)


def _components(of_set: str) -> Family:
    steps = ["mask2former", "mp-first", "mp-every", "mp-point", *(["mp-flip"] if of_set != "nuclei" else [])]
    return _toggles(of_set, "study-components", *((new, old) for old, new in itertools.pairwise(steps)))


def _others(of_set: str) -> Iterator[Family]:
    """The paper's setting against each other one; positions on against off; piloting where both have none."""
    for suite, rows in (
        ("study-guided-layers", ("guided-first", "guided-first-4")),
        ("study-point-noise", ("point-noise-0", "point-noise-0.4", "point-noise-0.8")),
        ("study-flip-noise", ("flip-noise-0", "flip-noise-0.4")),
        ("study-noise-type", ("shift-noise", "scale-noise")),
        ("study-groups", ("2-groups",)),
        ("study-class-query", ("one-learnt-vector",)),
    ):
        yield _toggles(of_set, suite, *((PILOTED, row) for row in rows))
    pairs = ((BASELINE, f"{BASELINE}-off"), (PILOTED, f"{PILOTED}-off"), (f"{PILOTED}-off", f"{BASELINE}-off"))
    yield _toggles(of_set, "study-query-position", *pairs)


def _half(of_set: str) -> Comparison:
    metric = PRIMARY[of_set]
    return Comparison("study-convergence", HALF, BASELINE, metric, smallest(metric, of_set), non_inferiority=True)


@dataclass(frozen=True)
class Tests:
    """Every comparison that gets a verdict, in the families that Holm's correction takes together."""

    headline: tuple[Family, ...] = tuple(
        Family("C1 C2 C3", of_set, _headline(of_set, CONSISTENCY, JUMPS, UTIL, *SCORES[of_set])) for of_set in SETS
    )
    """C1 (its verdict is that of the first; the jump rate stands beside it), C2, C3: a family a set."""
    backbone: Family = Family(
        "C1 C2 C3", "shapes", _headline("shapes", CONSISTENCY, JUMPS, UTIL, *SCORES["shapes"], suite="study-backbone")
    )
    """The same with the second backbone."""
    mechanism: tuple[Family, ...] = tuple(Family("C8", s, _headline(s, GRADIENT, STABILITY)) for s in SETS)
    half: tuple[Family, ...] = tuple(Family("C4", of_set, (_half(of_set),)) for of_set in SETS)
    """One comparison a set; the three are a family."""
    components: tuple[Family, ...] = tuple(_components(of_set) for of_set in SETS)
    toggles: tuple[Family, ...] = tuple(family for of_set in ("shapes", "facades") for family in _others(of_set))
