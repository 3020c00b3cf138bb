"""Tables of a suite, for a terminal and as plain text."""

import time
from typing import Any

import pytest

from experiments.status import suite_view, tables
from experiments.store.files import write_json
from tests.support.fake_slurm import FakeSlurm, Submitted, suite_record


def _printed(table: Any) -> str:
    import io

    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=250).print(table)
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
    lines = tables.text(view).splitlines()
    assert lines[0].startswith("headline@mini on shapes: 1 DONE, 1 FAILED(data), 2 CANCELLED")
    assert len(lines) == 2 + 4
    assert lines[1].index("state") == lines[2].index("DONE") == lines[3].index("FAILED(data)")
    assert lines[3].endswith("no [images]")
    assert "DONE" in _printed(tables.table(view)).split("\n", 1)[1]
    monkeypatch.setattr(tables, "LONG", 3)
    assert "DONE" not in _printed(tables.table(view)).split("\n", 1)[1], "a long live table shows what is open"
