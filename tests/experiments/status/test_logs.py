"""Logs of runs that wait, and of runs that are followed through their attempts."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from experiments.execution.attempt import Options
from experiments.launch import begin
from experiments.status import logs
from experiments.store import claims
from experiments.store.files import write_json
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan
from mpformer.runtime.errors import UserError
from tests.support.fake_slurm import LAUNCH, FakeSlurm, Submitted

Make = Callable[..., Any]


def test_logs_of_a_run_that_waits_say_so(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(0, "PENDING", "Priority")
    assert list(logs.log(submitted.store, submitted.run(0), None, follow=False)) == ["QUEUED: Priority (job 1234_0)\n"]
    log = submitted.store.launches / LAUNCH / "jobs" / "0" / "1234_1_0_log.out"
    log.parent.mkdir(parents=True)
    log.write_text("module: command not found\n")
    text = "".join(logs.log(submitted.store, submitted.run(1), None, follow=True))
    assert "the log of job 1234_1:\nmodule: command not found" in text
    assert logs.job_log(submitted.store, submitted.run(1)) == "module: command not found\n"


def test_logs_follow_a_run_through_its_attempts(
    plan: Plan, store: Store, options: Options, counter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin.record(plan, store, "")
    run = store.run(plan.unique[0].run_id)
    with pytest.raises(UserError, match="unknown attempt"):
        list(logs.log(store, run, None, follow=False))
    for number in (1, 2):
        write_json(run.attempt(number).path / "stage.json", {"outcome": "requeued"})
        (run.attempt(number).path / "log.txt").write_text(f"round {number}\n")
    assert list(logs.log(store, run, None, follow=False)) == ["round 2\n"]
    assert list(logs.log(store, run, 1, follow=False)) == ["round 1\n"]
    text: list[str] = []
    claim = claims.acquire(run.claims)
    assert claim is not None
    assert claims.acquire(run.claims, timeout=0) is None, "this process lives"

    def later() -> None:
        time.sleep(0.3)
        whole = run.path / "3"
        write_json(whole / "stage.json", {"outcome": "done"})
        (whole / "log.txt").write_text("round 3\n")
        whole.rename(run.attempt(3).path)
        claim.release()

    thread = threading.Thread(target=later)
    thread.start()
    text = list(logs.log(store, run, None, follow=True, period=0.05))
    thread.join()
    assert "".join(text) == "round 2\n--- attempt 3 ---\nround 3\n"
