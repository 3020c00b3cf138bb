"""The study's protocol, its claims and its suites say the same."""

from pathlib import Path

import answers
import claims
import pytest
import run
from claims import SETS, Comparison, Family

from experiments.suites import catalogue
from experiments.suites.rows import SUITES as KNOWN

MINI = Path(run.__file__).parent
PROTOCOL = MINI / "protocol.md"


pytestmark = pytest.mark.usefixtures("study_suites")


def comparisons() -> list[tuple[Family, Comparison]]:
    return [(family, of) for together in answers.families() for family in together for of in family.comparisons]


def test_every_comparison_is_of_rows_that_the_suites_have_and_that_apply() -> None:
    for family, of in comparisons():
        suite = catalogue.find(of.suite)
        assert not suite.why_not(family.set)
        rows = {row.name for row in suite.rows("mini", family.set) if not row.not_applicable}
        assert {of.row, of.against} <= rows
        assert of.smallest > 0


def test_every_other_row_of_every_suite_is_judged() -> None:
    judged = {(family.set, of.suite, name) for family, of in comparisons() for name in (of.row, of.against)}
    for suite, name in run.ORDER:
        rows = [row.name for row in catalogue.find(suite).rows("mini", name) if not row.not_applicable]
        assert {(name, suite, row) for row in rows} <= judged


def test_the_runs_are_of_the_suites_and_sets_that_get_a_verdict() -> None:
    assert {(of.suite, family.set) for family, of in comparisons()} == set(run.ORDER)
    assert {suite for suite, _ in run.ORDER} == {name for name in KNOWN if name.startswith("study-")}


def test_there_are_enough_seeds() -> None:
    for family, of in comparisons():
        seeds = catalogue.find(of.suite).seeds["mini"]
        assert seeds == tuple(range(5 if family.claim == "C7" else 8))


def test_the_protocol_names_what_is_judged() -> None:
    text = PROTOCOL.read_text()
    assert all(claim in text for claim in claims.CLAIMS)
    for name in SETS:
        for metric, smallest in claims.SMALLEST[name].items():
            assert metric in text
            assert any(f" {smallest:g} " in line for line in text.splitlines() if line.startswith(f"| {name} |"))


@pytest.mark.skipif(not (MINI / "README.md").exists(), reason="there is no page yet")
def test_the_page_is_what_the_kept_runs_give() -> None:
    from page import page

    assert (MINI / "README.md").read_text() == page(answers.Kept(MINI / "runs"), MINI)


@pytest.mark.skipif(not (MINI / "README.md").exists(), reason="there is no page yet")
def test_the_projects_readme_leads_with_what_the_kept_runs_give() -> None:
    from page import lead

    readme = (MINI.parents[1] / "README.md").read_text()
    assert lead(answers.Kept(MINI / "runs"), MINI, readme) == readme
