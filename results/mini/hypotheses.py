"""The hypotheses of hypotheses.md that have a suite in further.py, judged from its runs by the rules stated there."""

from collections.abc import Mapping
from dataclasses import dataclass

from answers import Kept, effect, p_text, values
from claims import AP, CONSISTENCY, GRADIENT, Metric, smallest

from analysis.statistics import PairedTest, claim_verdict, holm, paired_t, summarise

SET = "shapes"


@dataclass(frozen=True)
class Hypothesis:
    """Contrasts of a suite's rows that are predicted to be positive, or to be nothing that matters."""

    number: int
    suite: str
    metric: Metric
    predicted: Mapping[str, Mapping[str, int]]
    """What is said of a contrast, and the factor of each of its rows."""
    nothing: bool = False
    """The intervals are predicted to lie inside ± the smallest effect that matters."""

    def contrast(self, kept: Kept, factors: Mapping[str, int]) -> dict[int, float]:
        """By seed, where all its rows have it."""
        rows = {name: values(kept.row(self.suite, SET, name), self.metric) for name in factors}
        seeds = set.intersection(*(set(by_seed) for by_seed in rows.values()))
        return {seed: sum(factor * rows[name][seed] for name, factor in factors.items()) for seed in seeds}

    def tests(self, kept: Kept) -> dict[str, PairedTest]:
        """The contrasts whose runs are there, each tested against 0 over seeds."""
        found = {said: self.contrast(kept, factors) for said, factors in self.predicted.items()}
        return {said: paired_t(dict.fromkeys(by_seed, 0.0), by_seed) for said, by_seed in found.items() if by_seed}

    def outcome(self, found: Mapping[str, PairedTest]) -> str:
        """*supported*, *refuted* or *undecided*."""
        corrected, least = holm({said: test.p for said, test in found.items()}), smallest(self.metric, SET)
        if self.nothing:
            intervals = [(test.low, test.high) for test in found.values()]
            inside = [low is not None and high is not None and -least < low and high < least for low, high in intervals]
            told = any(p is not None and p < 0.05 for p in corrected.values())
            return "supported" if inside == [True] * len(self.predicted) else "refuted" if told else "undecided"
        verdicts = [claim_verdict(test, corrected[said], least) for said, test in found.items()]
        if "opposite" in verdicts:
            return "refuted"
        return "supported" if verdicts == ["seen"] * len(self.predicted) else "undecided"

    def section(self, kept: Kept) -> list[str]:
        """What came out, as Markdown; nothing before the suite was launched."""
        report = kept.report(self.suite, SET)
        if report is None:
            return []
        means = {row.label: list(values(row, self.metric).values()) for row in report.rows}
        found = self.tests(kept)
        said = [f"{name}: {effect(test)}, n = {test.n}, p = {p_text(test.p)}" for name, test in found.items()]
        return [
            f"Hypothesis {self.number}, measured (`{self.suite}`):",
            "",
            f"| row | {self.metric.name} |",
            "|---|---|",
            *(f"| {label} | {summarise(known).text(1)} |" for label, known in means.items() if known),
            "",
            f"{'; '.join(said) or 'No test yet'} (p uncorrected). By the rule: **{self.outcome(found)}**.",
            "",
        ]


def _gains(more: str, less: str) -> dict[str, int]:
    """What piloting gains in the rows that end so, less what it gains in those that end otherwise."""
    return {f"mp-former{more}": 1, f"mask2former{more}": -1, f"mp-former{less}": -1, f"mask2former{less}": 1}


ALL = (
    Hypothesis(
        2,
        "further-guidance",
        GRADIENT,
        {
            "one guided layer less all of them": {"guided-first": 1, "mp-former": -1},
            "point noise 0.8 less none": {"point-noise-0.8": 1, "point-noise-0": -1},
        },
    ),
    Hypothesis(
        3,
        "further-length",
        AP,
        {
            "MP-Former less Mask2Former, both with 700 steps": {"mp-former-half": 1, "mask2former-half": -1},
            "what 1,400 steps lack of 2,800 less than what 700 lack of 1,400": {
                **{"mp-former": 1, "mask2former-double": -1},
                **{"mp-former-half": -1, "mask2former": 1},
            },
        },
    ),
    Hypothesis(
        5,
        "further-strides",
        CONSISTENCY,
        {"the gain with strides 32, 16, 8 less that with 16, 8, 4": _gains("-coarse", "")},
    ),
    Hypothesis(6, "further-length", CONSISTENCY, {"the gain with 700 steps less that with 1,400": _gains("-half", "")}),
    Hypothesis(
        7,
        "further-bare",
        AP,
        {"MP-Former less piloting without noise and labels": {"mp-former": 1, "without-noise-and-labels": -1}},
        nothing=True,
    ),
)


def sections(kept: Kept) -> list[str]:
    """What came out of every hypothesis whose suite was launched."""
    return [line for one in ALL for line in one.section(kept)]
