"""The journal: every event survives a crash that follows it, and a line cut short costs that line alone."""

import os
from pathlib import Path

from experiments.store.journal import BatchRun, Submission, elements, of_launch, submissions
from experiments.store.run_dir import Store

RUNS = (BatchRun("a", "e1"), BatchRun("b", "e1"))


def batch(number: int, launch: str = "20260101-1") -> Submission:
    return Submission(number, "all", f"suite.{launch}.{number}", RUNS, 0.0, "a100", "lab")


def test_events_become_submissions_oldest_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert submissions(store) == []
    later, first = of_launch(store, "20260102-1"), of_launch(store, "20260101-1")
    later.submitting(batch(0, "20260102-1"))
    for number in range(3):
        first.submitting(batch(number))
    first.submitted(0, "1234")
    first.failed(1, "sbatch: error: no")
    found = submissions(store)
    assert [(one.launch, one.batch, one.job_id, one.error) for one in found] == [
        ("20260101-1", 0, "1234", None),
        ("20260101-1", 1, None, "sbatch: error: no"),
        ("20260101-1", 2, None, None),
        ("20260102-1", 0, None, None),
    ]
    assert [one.unrecorded for one in found] == [False, False, True, True]
    assert found[0].runs == RUNS
    assert (found[0].profile, found[0].cluster, found[0].stage) == ("a100", "lab", "all")
    assert found[0].time > 0
    assert [one.id for one in elements(store, ["a"]) if one.submission.launch == "20260101-1"] == [
        "1234_0",
        found[2].name,
    ]
    assert [one.launch for one in submissions(store, ["20260102-1"])] == ["20260102-1"]


def test_a_line_cut_short_costs_that_line_alone(tmp_path: Path) -> None:
    journal = of_launch(Store(tmp_path), "20260101-1")
    journal.submitting(batch(0))
    journal.submitted(0, "1234")
    size = journal.path.stat().st_size
    os.truncate(journal.path, size - 5)
    (found,) = journal.submissions()
    assert found.unrecorded
    journal.submitted(0, "1234")
    assert journal.submissions()[0].job_id == "1234"
