"""What the kept runs say of the claims: every comparison of claims.py with its test and its verdict.

Runs are read with the readers of the reports. Nothing is decided here: metrics, directions, families and smallest
effects are those of claims.py, suites and seeds those of suites.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import claims
from claims import Comparison, Metric

from analysis.statistics import PairedTest, Summary, claim_verdict, detectable, holm, paired_t, summarise
from experiments.store.run_dir import Store
from experiments.store.suite_record import SuiteRecord
from experiments.suites import catalogue, datasets
from mpformer.data.own import registration
from mpformer.runtime.errors import UserError
from reports.collect import RowRuns, SuiteReport, collect, number
from reports.runs import Reader, RunView

SCALE = "mini"
NOT_RUN, NOT_APPLICABLE, SO_FAR = "not run yet", "not applicable", "so far "
DRAWN = "shapes"
"""The one set whose images may be kept: this project draws them."""


# ------------------------------------------------------------------ the kept runs


def opened(root: Path, data_root: Path) -> Store:
    """A store of the study's runs, for what trains or predicts: its suites and the sets of the data root are known."""
    catalogue.add_file(Path(__file__).resolve().with_name("suites.py"))
    store = Store(root)
    datasets.recall(store)
    registration.know_all(data_root)
    return store


class Kept:
    """The store of kept runs, each read once."""

    headline = "study-headline"

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        datasets.recall(self.store)
        self._reader = Reader(self.store)
        self._reports: dict[tuple[str, str], SuiteReport | None] = {}

    @cached_property
    def records(self) -> dict[tuple[str, str], SuiteRecord]:
        """The suites' records by suite and set."""
        return {(record.suite, record.dataset): record for record in self.store.suite_records()}

    def report(self, suite: str, dataset: str) -> SuiteReport | None:
        """The suite's table with its runs; None if it was not launched."""
        key = (suite, dataset)
        if key not in self._reports:
            record = self.records.get(key)
            self._reports[key] = None if record is None else collect(record, self._reader)
        return self._reports[key]

    def row(self, suite: str, dataset: str, name: str) -> RowRuns | None:
        """A row of it; None if it was not launched."""
        report = self.report(suite, dataset)
        return None if report is None else next((row for row in report.rows if row.name == name), None)

    @cached_property
    def views(self) -> list[RunView]:
        """Every run of every suite once."""
        reports = [self.report(*key) for key in self.records]
        return list({view.run_id: view for report in reports if report for view in report.views}.values())

    def commit(self) -> str:
        """The one commit of all runs; empty without a run. Raises UserError if there are several, or changes."""
        found = {commit for view in self.views for commit in view.commits}
        if len(found) > 1 or any(commit.dirty for commit in found):
            raise UserError(f"the runs are of several states of the code: {', '.join(sorted(c.label for c in found))}")
        return next((commit.sha for commit in found), "")

    def check_no_photographs(self) -> None:
        """Raise UserError if an image of a set that is not drawn is kept."""
        for view in self.views:
            of = str((view.config.get("dataset") or {}).get("name", ""))
            pictures = [p for p in view.directory.path.rglob("*") if p.suffix in (".png", ".jpg", ".jpeg")]
            if of != DRAWN and pictures:
                raise UserError(
                    f"{view.run_id} keeps {pictures[0].name}, an image of {of}: archive it with --no-images"
                )


def value(view: RunView, metric: Metric) -> float | None:
    """A run's number in points; None if it does not have it."""
    result: Mapping[str, Any] = view.result or {}
    factor = 100.0 if metric.key.endswith("cosine") else 1.0
    if metric.per_class:
        found = result.get("classes", {}).get(metric.key, {}).get(metric.per_class)
    elif metric.layers is not None:
        known = [x for x in (result.get("layers", {}).get(metric.key) or ())[metric.layers] if x is not None]
        found = sum(known) / len(known) if known else None
    else:
        found = number(view, metric.key, result)
    return None if found is None else factor * float(found)


def values(row: RowRuns | None, metric: Metric) -> dict[int, float]:
    """By seed, of the runs that count."""
    found = {view.seed: value(view, metric) for view in (row.done if row else ())}
    return {seed: number for seed, number in found.items() if number is not None}


# ------------------------------------------------------------------ answers


@dataclass(frozen=True)
class Answer:
    """What the kept runs say of one comparison. ``test``'s effect is positive in the direction of the claim: row less
    ``against``, of a rate that should fall ``against`` less row, in the metric's points.
    """

    claim: str
    set: str
    of: Comparison
    planned: int
    verdict: str = NOT_RUN
    reason: str = ""
    test: PairedTest | None = None
    p: float | None = None
    row: Summary | None = None
    against: Summary | None = None
    detectable: float | None = None
    """Effect that so many pairs of this spread show with a power of 0.8, uncorrected."""

    @property
    def n(self) -> int:
        """Paired seeds."""
        return self.test.n if self.test else 0

    @property
    def open(self) -> bool:
        """Whether planned seeds are still missing."""
        return self.verdict == NOT_RUN or 0 < self.n < self.planned

    @property
    def said(self) -> str:
        """The verdict; of a comparison that lacks seeds, what it would be so far."""
        return f"{SO_FAR}{self.verdict}" if self.test and self.open else self.verdict

    @property
    def effect(self) -> str:
        """The effect with its interval."""
        return effect(self.test)


def effect(test: PairedTest | None) -> str:
    """Such as ``+3.2 (+1.0 … +5.4)``."""
    if test is None:
        return "–"
    interval = "" if test.low is None else f" ({signed(test.low)} … {signed(test.high)})"
    return f"{signed(test.effect)}{interval}"


def signed(x: float | None, decimals: int = 1) -> str:
    """``+1.2``, ``−0.3``."""
    return "–" if x is None else f"{x:+.{decimals}f}".replace("-", "−")


def p_text(p: float | None) -> str:
    """``0.012``, ``< 0.001``, or a dash without a test."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def families() -> list[tuple[claims.Family, ...]]:
    """What Holm's correction takes together: each family of claims.py, and C4's of all sets."""
    asked = claims.Tests()
    alone = (*asked.headline, asked.backbone, *asked.mechanism, *asked.components, *asked.toggles)
    return [*((family,) for family in alone), asked.half]


def answers(kept: Kept) -> list[Answer]:
    """Every comparison of claims.py with its verdict."""
    return [answer for together in families() for answer in _corrected(together, kept)]


def _corrected(together: Sequence[claims.Family], kept: Kept) -> list[Answer]:
    asked = [Answer(_claim(family, of), family.set, of, 0) for family in together for of in family.comparisons]
    tested = [_answer(each, kept) for each in asked]
    corrected = holm({str(k): answer.test.p for k, answer in enumerate(tested) if answer.test})
    return [judged(answer, corrected.get(str(k))) for k, answer in enumerate(tested)]


_OF_METRIC = {claims.CONSISTENCY.name: "C1", claims.JUMPS.name: "C1", claims.UTIL.name: "C2"}


def _claim(family: claims.Family, of: Comparison) -> str:
    """The claim that a comparison is about; a family of several is told by the metric."""
    return family.claim if " " not in family.claim else _OF_METRIC.get(of.metric.name, "C3")


def _answer(asked: Answer, kept: Kept) -> Answer:
    """A comparison with its test, without its verdict."""
    of, name = asked.of, asked.set
    suite = catalogue.find(of.suite)
    (row,) = (row for row in suite.rows(SCALE, name) if row.name == of.row)
    launched = kept.row(of.suite, name, of.row)
    planned = max(len(row.seeds or suite.seeds[SCALE]), len(launched.views) if launched else 0)
    asked = replace(asked, planned=planned)
    if row.not_applicable:
        return replace(asked, verdict=NOT_APPLICABLE, reason=row.not_applicable)
    mine, theirs = (values(kept.row(of.suite, name, which), of.metric) for which in (of.row, of.against))
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return asked
    spread = summarise([mine[seed] - theirs[seed] for seed in seeds]).std
    return replace(
        asked,
        test=paired_t(theirs, mine) if of.metric.better == "higher" else paired_t(mine, theirs),
        row=summarise([mine[seed] for seed in seeds]),
        against=summarise([theirs[seed] for seed in seeds]),
        detectable=None if spread is None else detectable(spread, len(seeds)),
    )


def judged(answer: Answer, p: float | None) -> Answer:
    """The answer with its verdict and its corrected p; one of non-inferiority goes by the interval alone."""
    if answer.test is None:
        return answer
    if answer.of.non_inferiority:
        return replace(answer, verdict=_not_worse(answer.test, answer.of.smallest))
    return replace(answer, verdict=claim_verdict(answer.test, p, answer.of.smallest), p=p)


def _not_worse(test: PairedTest, smallest: float) -> str:
    """Non-inferiority: the interval against ``−smallest``."""
    if test.low is None or test.high is None:
        return "underpowered"
    return "seen" if test.low > -smallest else "opposite" if test.high < -smallest else "underpowered"


QUALITY = Metric("IoU with the truth, layers 1 to L", "IoU-gt", slice(1, None))
"""What stands beside C1: consistency that comes with worse masks is said to."""


def quality(kept: Kept, name: str) -> PairedTest | None:
    """The headline's difference in the quality of the masks whose consistency C1 is about; None without runs."""
    theirs, mine = (values(kept.row(kept.headline, name, row), QUALITY) for row in (claims.BASELINE, claims.PILOTED))
    return paired_t(theirs, mine) if theirs.keys() & mine.keys() else None


# ------------------------------------------------------------------ costs (claims C5 and C6)

COSTS = ("C5", "C6")
BARELY = 1.10
"""C5: at most this times the seconds and the memory is "barely more"."""


def costs(folder: Path) -> dict[str, Any]:
    """``costs.json``, empty if the costs were not measured."""
    path = folder / "costs.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def cost_cell(claim: str, found: Mapping[str, Any]) -> tuple[str, str]:
    """(verdict, numbers) of C5 or C6 on one set from its part of ``costs.json``."""
    part = found.get("training" if claim == "C5" else "inference")
    if part is None:
        return NOT_RUN, ""
    if claim == "C6":
        same = part["identical"] and part["gflops_with"] == part["gflops_without"]
        return ("seen" if same else "opposite"), (
            f"{part['images']} images, outputs {'bit for bit equal' if part['identical'] else 'not equal'}, "
            f"{part['gflops_with']:.3f} against {part['gflops_without']:.3f} GFLOPs"
        )
    low, high = part["seconds"]["middle_half"]
    seconds, memory = part["seconds"]["median"], part["memory_ratio"]
    verdict = "seen" if max(high, memory) <= BARELY else "opposite" if max(low, memory) > BARELY else "underpowered"
    worked, pairs = part["processor_seconds"]["median"], part["pairs"]
    shown = f"seconds × {seconds:.2f} (middle half {low:.2f} … {high:.2f}), n = {pairs} pairs of steps"
    return verdict, f"{shown}; processor seconds × {worked:.2f}; memory × {memory:.2f}"
