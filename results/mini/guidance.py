"""Hypothesis 2 of hypotheses.md: whether guidance makes the dependence on masks, by the runs of further.py's suite."""

from answers import Kept, effect, p_text, values
from claims import GRADIENT, smallest

from analysis.statistics import PairedTest, claim_verdict, holm, paired_t, summarise

SUITE, SET = "further-guidance", "shapes"
TESTS = (("guided-first", "mp-former"), ("point-noise-0.8", "point-noise-0"))
"""The first row of each pair is predicted to have the higher cosine."""


def tests(kept: Kept) -> dict[str, PairedTest]:
    """The paired tests whose runs are there, by the row that is predicted to be higher."""
    found = {name: values(kept.row(SUITE, SET, name), GRADIENT) for pair in TESTS for name in pair}
    return {
        higher: paired_t(found[lower], found[higher])
        for higher, lower in TESTS
        if found[higher].keys() & found[lower].keys()
    }


def outcome(found: dict[str, PairedTest]) -> str:
    """*supported*, *refuted* or *undecided*, by the rule that was written before the runs."""
    corrected = holm({name: test.p for name, test in found.items()})
    verdicts = [claim_verdict(test, corrected[name], smallest(GRADIENT, SET)) for name, test in found.items()]
    if "opposite" in verdicts:
        return "refuted"
    return "supported" if verdicts == ["seen"] * len(TESTS) else "undecided"


def section(kept: Kept) -> list[str]:
    """What came out, as Markdown; nothing before the suite was launched."""
    report = kept.report(SUITE, SET)
    if report is None:
        return []
    found = {row.label: summarise(list(values(row, GRADIENT).values())) for row in report.rows if values(row, GRADIENT)}
    lines = [
        "Hypothesis 2, measured (`guidance.py`), the cosine of C8 in hundredths:",
        "",
        "| row | cosine |",
        "|---|---|",
    ]
    lines += [f"| {label} | {summary.text(1)} |" for label, summary in found.items()]
    known = tests(kept)
    said = [
        f"{higher} less {lower}: {effect(known[higher])}, n = {known[higher].n}, p = {p_text(known[higher].p)}"
        for higher, lower in TESTS
        if higher in known
    ]
    return [*lines, "", f"{'; '.join(said) or 'No test yet'} (p uncorrected). By the rule: **{outcome(known)}**.", ""]
