"""What a suite's table says in a terminal: aligned numbers, one sentence (issue 12, 5.6)."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from experiments.cli.main import cli
from reports import answer
from reports.collect import SuiteReport

Gather = Callable[..., SuiteReport]


def test_the_table_is_aligned_and_says_what_does_not_fit(gather: Gather) -> None:
    table = gather("headline").table
    head, base, row = answer.lines(table, 120)
    assert head.split() == ["AP", "Δ", "PQ", "mIoU", "mIoU-L", "Util", "n"]
    assert base.split()[:4] == ["Mask2Former", "13.3", "±", "1.2"]
    assert row.split()[1:5] == ["15.7", "±", "0.9", "+2.3*"]
    assert len(head) == len(base) == len(row)
    *narrow, note = answer.lines(table, 50)
    assert max(map(len, narrow)) <= 50
    assert narrow[0].split() == ["AP", "Δ", "PQ", "n"]
    assert note == "too wide for this terminal: mIoU, mIoU-L, Util"


def test_a_number_that_is_no_mean_over_all_seeds_says_so(gather: Gather) -> None:
    table = gather("components").table
    lines = answer.lines(table, 500)
    assert next(line for line in lines if "first layer" in line).endswith("2 of 3")
    assert "(stale)" in next(line for line in lines if "point noise" in line)
    assert "\x1b" not in "\n".join([*lines, answer.sentence(table)])


def test_a_name_stays_on_its_line(gather: Gather, store: Path) -> None:
    path = store / "suites" / "headline@mini.json"
    record = json.loads(path.read_text())
    record["rows"][1]["label"] = "MP\tFormer\nagain"
    path.write_text(json.dumps(record))
    table = gather("headline").table
    assert answer.lines(table, 120)[2].startswith("MP Former again ")
    assert "\t" not in answer.sentence(table)


def test_a_clear_difference_is_told_with_its_interval(gather: Gather) -> None:
    found = answer.sentence(gather("headline").table)
    assert found.startswith(
        "Clear after Holm: MP-Former, +2.3 AP to its baseline (95 % interval +1.6 … +3.1, p = 0.0055"
    )
    assert found.endswith("n = 3).")


def test_one_seed_is_no_verdict(gather: Gather, store: Path) -> None:
    path = store / "suites" / "headline@mini.json"
    record = json.loads(path.read_text())
    for row in record["rows"]:
        row["runs"] = row["runs"][:1]
    path.write_text(json.dumps(record))
    found = answer.sentence(gather("headline").table)
    assert found == "MP-Former, +2.7 AP to its baseline: no verdict from one seed, which takes three (--seeds 0-2)."


def test_without_a_number_there_is_no_verdict(gather: Gather, store: Path) -> None:
    for path in store.glob("runs/*/evals/*/result.json"):
        path.unlink()
    table = gather("headline").table
    assert answer.sentence(table) == "No verdict yet: no row has AP beside its baseline's (0 of 6 runs are done)."
    assert "No verdict: the table leaves out AP" in answer.sentence(gather("headline", columns=("PQ",)).table)


def report(*words: str) -> Result:
    return CliRunner().invoke(cli, ["report", *words], catch_exceptions=False)


@pytest.mark.usefixtures("blank_figures")
def test_the_command_ends_with_the_answer_and_one_link(store: Path) -> None:
    """The table and one sentence, then one link; 57 paths and no number before."""
    lines = report("headline", "--root", str(store)).output.splitlines()
    assert len(lines) < 9
    assert any(line.startswith("MP-Former    15.7 ± 0.9  +2.3*") for line in lines)
    assert lines[-2].startswith("Clear after Holm: MP-Former")
    page = store / "reports" / "headline@mini" / "index.html"
    assert lines[-1].endswith(f"files; open {page.resolve().as_uri()}")
    overview = report("--all", "--root", str(store)).output.splitlines()
    assert len(overview) == 1
    assert overview[0].endswith((store / "reports" / "index.html").resolve().as_uri())
    table = report("headline", "--root", str(store), "--format", "md").output.splitlines()[-1]
    assert table.endswith("headline@mini/table.md")
