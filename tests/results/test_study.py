"""The study's page: verdicts from made-up runs of known effects, half-done studies, one commit, no photograph."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import answers
import claims
import numpy as np
import pytest
from answers import Kept
from claims import AP, JUMPS, UTIL, Comparison, Family
from page import BEGIN, END, _cell, lead, page, sentence

from analysis.statistics import PairedTest
from experiments.launch import begin
from experiments.runs import archiving
from experiments.store import records
from experiments.store.archive import Keeping
from experiments.store.attempt_dir import AttemptRecord, Ending, FailureClass, Git, Outcome, Provenance
from experiments.store.run_dir import Result, RunDir, Store, Trained
from experiments.suites.planning import Plan, PlannedRun
from experiments.suites.rows import SUITES
from mpformer.runtime.errors import UserError
from tests.support import counting_jobs

SHA = "a" * 40
Score = Callable[[str, int], dict[str, float]]


def steady(row: str, seed: int) -> dict[str, float]:
    """MP-Former has 3 more AP, 20 fewer jumps, and the same utilization but for noise far below what matters."""
    piloted, noise = row == "mp-former", float(np.random.default_rng([seed, len(row)]).normal(0, 0.2))
    return {"AP": 20 + seed + 3 * piloted + noise, "jump-rate-late": 50 - 20 * piloted + noise, "Util": 60 + noise / 10}


def wild(row: str, seed: int) -> dict[str, float]:
    """Differences of either sign, far above what matters."""
    return dict.fromkeys(("AP", "jump-rate-late", "Util"), 30 + 25.0 * (-1) ** (seed + (row == "mp-former")))


LAYERS = {"mask2former": {"IoU-gt": [0.0, 50.0, 60.0]}, "mp-former": {"IoU-gt": [0.0, 45.0, 55.0]}}
"""More consistent masks, and worse ones."""


def finish(run: RunDir, planned: PlannedRun, scores: dict[str, float], sha: str = SHA) -> None:
    """What a run leaves that is done."""
    attempt = run.attempt(1)
    attempt.begin(AttemptRecord("all", 1.0))
    attempt.write_provenance(Provenance(git=Git(sha=sha), processor="a processor", threads=1))
    attempt.conclude(Ending(Outcome.DONE))
    layers = LAYERS[planned.row.name]
    records.save(run.trained_file, Trained("0" * 64, "checkpoints/final.pth", 12, 1.0))
    run.write_result(Result(run.run_id, planned.eval_id, 1, True, 12, 4, 1.0, metrics=scores, layers=layers))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Two rows of eight seeds."""
    return counting_jobs.plan(counting_jobs.data_root(tmp_path_factory.mktemp("data")), tuple(range(8)))


@pytest.fixture(scope="module")
def done(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """All of them done, as :func:`steady` says."""
    return kept(plan, tmp_path_factory.mktemp("done"))


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> None:
    """The questions of these tests, of this project's own suite."""

    def one(metric: claims.Metric, smallest: float, non_inferiority: bool = False) -> Comparison:
        return Comparison("headline", "mp-former", "mask2former", metric, smallest, non_inferiority)

    asked = (
        Family("C1", "shapes", (one(JUMPS, 5.0),)),
        Family("C2", "shapes", (one(UTIL, 1.0),)),
        Family("C3", "shapes", (one(AP, 1.0),)),
        Family("C4", "shapes", (one(AP, 1.0, non_inferiority=True),)),
    )
    monkeypatch.setattr(answers, "families", lambda: [(family,) for family in asked])
    monkeypatch.setattr(Kept, "headline", "headline")
    monkeypatch.setitem(SUITES, "headline", replace(SUITES["headline"], seeds=SEEDS))


SEEDS = {"mini": tuple(range(8)), "paper": (0,)}


def kept(plan: Plan, folder: Path, scores: Score = steady, seeds: int = 8) -> Kept:
    """A store of the plan's runs, the first seeds done."""
    store = Store(folder / "store")
    begin.record(plan, store, "")
    for run in plan.unique:
        if run.seed < seeds:
            finish(store.run(run.run_id), run, scores(run.row.name, run.seed))
    return Kept(store.root)


def test_verdicts_are_those_of_the_effects(done: Kept) -> None:
    jumps, util, ap, half = answers.answers(done)
    assert [a.said for a in (jumps, util, ap, half)] == ["seen", "not seen", "seen", "seen"]
    assert ap.n == 8
    assert ap.test is not None
    assert jumps.test is not None
    assert ap.test.effect == pytest.approx(3, abs=0.3)
    assert jumps.test.effect == pytest.approx(20, abs=0.3), "positive in the direction of the claim: the rate falls"
    assert jumps.p == pytest.approx(jumps.test.p), "one comparison in its family"


def test_holm_is_taken_in_the_family(done: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (family.comparisons[0] for (family,) in answers.families()[1:3])
    monkeypatch.setattr(answers, "families", lambda: [(Family("C3", "shapes", (one, two)),)])
    util, ap = answers.answers(done)
    assert ap.test is not None
    assert ap.test.p is not None
    assert util.p is not None
    assert ap.p == pytest.approx(2 * ap.test.p)


def test_what_cannot_be_told_is_underpowered_and_a_loss_is_the_opposite(plan: Plan, tmp_path: Path) -> None:
    assert {a.said for a in answers.answers(kept(plan, tmp_path, wild))} == {"underpowered"}
    turned = kept(
        plan, tmp_path / "turned", lambda row, seed: steady({"mp-former": "", "mask2former": "mp-former"}[row], seed)
    )
    jumps, _, ap, half = answers.answers(turned)
    assert [jumps.said, ap.said, half.said] == ["opposite"] * 3


def test_a_half_done_study_says_so_in_every_cell(plan: Plan, tmp_path: Path) -> None:
    text = page(kept(plan, tmp_path, seeds=3), tmp_path)
    assert "**The study is under way**: 0 of 4 comparisons" in text
    assert "AP: **so far seen**, +" in text
    assert "n = 3 of 8" in text
    assert "6 runs, all of commit `aaaa" in text
    nothing = page(Kept(tmp_path / "nothing"), tmp_path)
    assert "AP: **not run yet**" in nothing
    assert "0 runs, all of commit `none yet`" in nothing


def test_the_page_says_what_was_found_and_what_was_written_by_hand(done: Kept, tmp_path: Path) -> None:
    (tmp_path / "deviations.md").write_text("# Deviations\n\nA processor was changed.\n")
    text = page(done, tmp_path)
    assert "under way" not in text
    assert "- **C3** AP, PQ and mIoU rise. It is seen on shapes." in text
    assert "- **C2** Queries are better utilized. No effect that matters shows on shapes." in text
    assert "(IoU with the truth): worse on shapes, −5.0 (−5.0 … −5.0), n = 8." in text
    assert "A processor was changed." in text
    assert "| 8 | 1 | " in text
    assert "Runs that have no result" not in text


def test_the_readme_leads_with_the_claims_and_keeps_its_own_text(done: Kept, tmp_path: Path) -> None:
    readme = f"# Name\n\n{BEGIN}\nold\n{END}\n\nMore.\n"
    text = lead(done, tmp_path, readme)
    assert text.startswith(f"# Name\n\n{BEGIN}\n\n| claim | shapes |")
    assert text.endswith(f"{END}\n\nMore.\n")
    assert "old" not in text
    assert "AP: **seen**, +" in text
    assert lead(done, tmp_path, text) == text
    with pytest.raises(UserError, match="has no lines"):
        lead(done, tmp_path, "# Name\n")


@pytest.mark.usefixtures("study_suites")
def test_components_are_told_one_by_one_and_other_toggles_are_counted() -> None:
    test = PairedTest(4.3, 5, 1.9, 6.6, 0.01)
    found = [
        answers.Answer("C7", "nuclei", Comparison(suite, row, "another", AP, 3.4), 5, verdict, test=test)
        for suite, row, verdict in (
            ("study-components", "mp-first", "seen"),
            ("study-components", "mp-every", "underpowered"),
            ("study-groups", "mp-former", "not seen"),
            ("study-point-noise", "mp-former", "not seen"),
        )
    ]
    assert _cell("C7", "nuclei", found, {}).split("<br>") == [
        "+ MP queries, guided in the first layer, AP: **seen**, +4.3 (+1.9 … +6.6), n = 5",
        "+ guidance in every layer, AP: **underpowered**, +4.3 (+1.9 … +6.6), n = 5",
        "other toggles: not seen 2 of 2",
    ]


def test_what_a_hypothesis_gave_stands_below_it(done: Kept, tmp_path: Path) -> None:
    (tmp_path / "hypotheses.md").write_text("# Hypotheses\n\n1. Masks.\n")
    (tmp_path / "attention_masks.md").write_text("| a table |\n")
    text = page(done, tmp_path)
    assert text.index("1. Masks.") < text.index("Hypothesis 1, measured") < text.index("| a table |")


def test_sentences_are_read_once() -> None:
    told = [("AP", "a", "seen"), ("AP", "b", "so far seen"), ("AP", "c", "opposite"), ("PQ", "a", "underpowered")]
    assert sentence(told) == (
        "By AP, it is seen on a and b (so far); the opposite is seen on c. By PQ, it stays undecided on a."
    )
    assert sentence([("AP", "a", "not run yet"), ("PQ", "a", "not run yet")]) == "It is not run yet on a."


def test_runs_of_several_commits_are_refused(plan: Plan, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    begin.record(plan, store, "")
    for run, sha in zip(plan.unique[:2], (SHA, "b" * 40), strict=True):
        finish(store.run(run.run_id), run, {"AP": 1.0}, sha)
    with pytest.raises(UserError, match="several states of the code: aaaaaaaa, bbbbbbbb"):
        Kept(store.root).commit()


def test_photographs_are_refused(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = kept(plan, tmp_path, seeds=1)
    runs.check_no_photographs()
    picture = runs.views[0].directory.evaluation(plan.unique[0].eval_id) / "layer_masks" / "1.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"")
    runs.check_no_photographs()  # shapes are drawn
    monkeypatch.setattr(answers, "DRAWN", "another set")
    with pytest.raises(UserError, match=r"keeps 1.png, an image of shapes: archive it with --no-images"):
        runs.check_no_photographs()


def test_failed_runs_are_listed_with_their_reason(plan: Plan, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    begin.record(plan, store, "")
    attempt = store.run(plan.unique[0].run_id).attempt(1)
    attempt.begin(AttemptRecord("all", 1.0))
    attempt.conclude(Ending(Outcome.FAILED, FailureClass.NAN, "the loss is no number"))
    other = Store(tmp_path / "kept")
    archiving.archive_into(other, store, store.suite_records(), keeping=Keeping.LIGHT)
    text = page(Kept(other.root), tmp_path)
    assert f"- `{plan.unique[0].run_id}`: failed (non-finite loss)" in text
    assert "the loss is no number" in text


@pytest.mark.parametrize(
    ("high", "memory", "verdict"), [(1.08, 1.02, "seen"), (1.2, 1.02, "underpowered"), (1.08, 1.3, "opposite")]
)
def test_barely_more_is_a_tenth(high: float, memory: float, verdict: str) -> None:
    seconds = {"median": 1.05, "middle_half": [1.03, high]}
    part = {"pairs": 30, "seconds": seconds, "processor_seconds": seconds, "memory_ratio": memory}
    found = answers.cost_cell("C5", {"training": part})
    assert found[0] == verdict


def test_inference_is_untouched_only_if_every_bit_is() -> None:
    part = {"images": 4, "identical": True, "gflops_with": 1.0, "gflops_without": 1.0}
    assert answers.cost_cell("C6", {"inference": part})[0] == "seen"
    assert answers.cost_cell("C6", {"inference": part | {"identical": False}})[0] == "opposite"
    assert answers.cost_cell("C6", {"inference": part | {"gflops_with": 1.1}})[0] == "opposite"
    assert answers.cost_cell("C6", {})[0] == "not run yet"
