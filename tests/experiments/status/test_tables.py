"""Tables of a suite, for a terminal and as plain text."""

import io
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from experiments.status import suite_view, tables
from experiments.status.states import RunState, State
from experiments.status.suite_view import Delta, RunLine, Score, SuiteView
from experiments.store.attempt_dir import FailureClass, Progress
from experiments.store.files import write_json
from experiments.store.suite_record import SuiteRecord
from tests.support.fake_slurm import FakeSlurm, Submitted, suite_record


def _printed(table: Any, width: int = 250) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def test_the_table_shows_jobs_reasons_and_telling_lines_as_they_are(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(1, "PENDING", "(ReqNodeNotAvail, UnavailableNodes:n[0-1])")
    log = "Traceback\nValueError: a [bold] surprise\n"
    submitted.attempt(0, log=log, outcome="failed", failure_class="error", detail="ValueError", ended=time.time())
    text = _printed(tables.table(suite_view.views(submitted.store.root, [suite_record(submitted.plan)])[0]))
    assert "UnavailableNodes:n[0-1]" in text
    assert "1234_1" in text
    assert "ValueError: a [bold] surprise" in text


def test_a_long_suite_is_plain_text_with_every_run(submitted: Submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    first = submitted.plan.unique[0]
    result = {"schema": 1, "run_id": first.run_id, "eval_id": first.eval_id, "complete": True, "metrics": {"AP": 1.0}}
    write_json(submitted.run(0).evaluation(first.eval_id) / "result.json", result)
    submitted.attempt(1, outcome="failed", failure_class="data", detail="no [images]", ended=time.time())
    view = suite_view.views(submitted.store.root, [suite_record(submitted.plan)])[0]
    lines = tables.text(view, 250).splitlines()
    assert lines[0].startswith("headline@mini on shapes: 1 DONE, 1 FAILED(data), 2 CANCELLED")
    assert len(lines) == 2 + 4
    assert lines[1].index("state") == lines[2].index("DONE") == lines[3].index("FAILED(data)")
    assert lines[3].endswith("no [images]")
    assert "DONE" in _printed(tables.table(view)).split("\n", 1)[1]
    monkeypatch.setattr(tables, "LONG", 3)
    assert "DONE" not in _printed(tables.table(view)).split("\n", 1)[1], "a long live table shows what is open"


def _wide() -> SuiteView:
    """Every state, with everything that a line can have."""
    rows = []
    for number, state in enumerate(State):
        failure = FailureClass.CLAIM_LOST if state in (State.FAILED, State.LOST) else FailureClass.NONE
        run_id, detail = f"shapes-mp-every-{number:012d}", "a reason of several words that is wrapped"
        progress = Progress(stage="train", iteration=1234, max_iter=368750, loss=12.345, eta_seconds=98765.0)
        found = RunState(run_id, state, detail, failure, 1, progress, {"AP": 12.34}, job="123456_789")
        score = Score({"AP": 12.34}, 1234)
        rows.append(RunLine("mp-former,swin-l-160k", number, "e", found, score, delta=Delta(12.34, 10.06, 1234)))
    return SuiteView(SuiteRecord("headline", "mini", "shapes", (), primary="AP"), None, tuple(rows))


@pytest.mark.parametrize("width", [60, 80, 100, 250])
def test_a_narrow_place_drops_columns_and_no_letter_of_a_state(width: int) -> None:
    """Issue 12, 5.5."""
    view = _wide()
    for shown in (_printed(tables.table(view), width), tables.text(view, width)):
        assert "…" not in shown
        assert all(run.state.label in shown for run in view.runs)
        assert ("123456_789" in shown) == (width == 250)
        assert "12.3" in shown
    assert max(map(len, _printed(tables.table(view), width).splitlines())) <= width


def test_a_pipe_is_as_wide_as_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 12, 5.5."""
    monkeypatch.delenv("COLUMNS", raising=False)
    pipe = Console(file=io.StringIO(), highlight=False)
    pipe.print(tables.table(_wide()))
    shown = pipe.file.getvalue()  # type: ignore[attr-defined]
    assert pipe.width == 80
    assert "FAILED(claim-lost)" in shown
    assert "…" not in shown


@given(st.floats(0, 100), st.floats(0, 100))
def test_a_difference_is_that_of_the_numbers_beside_it(mine: float, baseline: float) -> None:
    """Issue 12, 5.5: 17.64 - 15.25 is +2.3 where 17.6 and 15.3 are shown."""
    one, other = (tables.score_text({"AP": value}, "AP") for value in (mine, baseline))
    assert tables._delta_text(Delta(mine, baseline, 4), 4) == f"{float(one) - float(other):+.1f}"
