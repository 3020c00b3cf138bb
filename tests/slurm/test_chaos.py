"""The short form of the chaos test; `chaos.py` beside it is the long one, by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import chaos, truth

pytestmark = pytest.mark.slurm


def test_a_suite_comes_through_chaos(devcluster: Callable[..., Any], tmp_path: Path) -> None:
    """A good minute of disturbances over four runs; then they end with the numbers of an undisturbed launch."""
    cluster = devcluster("--nodes", "3")
    found = chaos.unleash(
        cluster, tmp_path, seconds=75, every=5, seeds=(0, 1), iterations=36, pace=0.5, seed=3, parallelism=4
    )
    print(json.dumps(found, indent=1))
    assert found["ok"], found
    assert sum(count for what, count in found["what happened"].items() if "launch" not in what and "runs" not in what)


def test_overlapping_trainings_would_be_seen(tmp_path: Path) -> None:
    witness = tmp_path / "witness.jsonl"
    lines = [{"process": "a", "time": 1.0}, {"process": "a", "time": 5.0}, {"process": "b", "time": 6.0}]
    witness.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not chaos.overlapping(witness)
    with witness.open("a") as file:
        file.write(json.dumps({"process": "a", "time": 7.0}) + "\n")
    assert chaos.overlapping(witness)


@pytest.mark.parametrize(
    ("state", "jobs", "process", "kind"),
    [
        ("CANCELLED", {"7_0": "RUNNING"}, None, "Slurm has a job, status says CANCELLED"),
        ("LOST", {"7_0": "PENDING"}, None, "Slurm has a job, status says LOST"),
        ("QUEUED", {"7_0": "RUNNING"}, 12, "a process works, status says QUEUED"),
        ("RUNNING", {}, None, "nothing works or waits, status says RUNNING"),
        ("RUNNING", {"7_0": "PENDING"}, None, "the job waits, status says RUNNING"),
        ("RUNNING", {"7_0": "RUNNING"}, None, ""),
        ("REQUEUED", {"7_0": "PENDING"}, None, ""),
        ("FAILED", {"7_0": "COMPLETING"}, None, ""),
        ("LOST", {}, None, ""),
    ],
)
def test_contradictions_would_be_seen(state: str, jobs: dict[str, str], process: int | None, kind: str) -> None:
    processes = {} if process is None else {"r": process}
    now = truth.Facts(True, {"r": jobs} if jobs else {}, processes)
    run = {"run_id": "r", "state": state}
    assert truth.contradiction(run, now, now) == kind
    beginning = replace(now, alive=frozenset({"r"}))
    assert truth.contradiction(run, beginning, beginning) == ("" if state == "RUNNING" else kind)
    away = replace(now, answered=False)
    assert truth.contradiction(run, now, away) == (kind if process else "")
    changed = replace(now, jobs={"r": {"8_0": "PENDING"}}, processes={})
    assert truth.contradiction(run, now, changed) == ""
    assert truth.contradiction(run, now, replace(now, claimed={"r": 1})) == (kind if process else "")
