"""Launches of one store begin one at a time, and a launcher that died keeps nobody waiting."""

import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.launch import begin as beginning
from experiments.launch.begin import begin
from experiments.store import claims
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan
from mpformer.runtime.errors import UserError

FORK = multiprocessing.get_context("fork")


def _begin(plan: Plan, store: Store, barrier: Any, found: Any, seconds: float) -> None:
    barrier.wait()
    with begin(plan, store) as ours:
        entered = time.monotonic()
        time.sleep(seconds)
        found.put((entered, time.monotonic(), ours.id))


def test_two_launches_at_once_begin_one_after_the_other(plan: Plan, store: Store) -> None:
    barrier, found = FORK.Barrier(4), FORK.Queue()
    processes = [FORK.Process(target=_begin, args=(plan, store, barrier, found, 0.2)) for _ in range(4)]
    for process in processes:
        process.start()
    spans = sorted(found.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert all(later[0] >= earlier[1] for earlier, later in itertools.pairwise(spans))
    assert len({name for _, _, name in spans}) == 4
    assert [process.exitcode for process in processes] == [0] * 4


def _die(plan: Plan, store: Store) -> None:
    with begin(plan, store):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_claim_of_a_launcher_that_was_killed_is_free_at_once(plan: Plan, store: Store) -> None:
    process = FORK.Process(target=_die, args=(plan, store))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    began = time.monotonic()
    with begin(plan, store) as ours:
        assert time.monotonic() - began < 20, "not the heartbeat's timeout of minutes"
        assert ours.claim.number == 2
        assert len(ours.missing) == 4


def _elsewhere(store: Store, age: float) -> Path:
    """The launch claim of a process on another host that was heard of ``age`` seconds ago."""
    claim = store.root / "launching" / "1"
    claim.parent.mkdir(parents=True)
    claim.write_text(json.dumps({"host": "n7", "machine": "another", "pid": 7, "born": "8", "token": "t"}))
    os.utime(claim, (time.time() - age,) * 2)
    return claim


def test_a_launcher_on_another_host_is_waited_for_until_its_heartbeat_is_too_old(
    plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(beginning, "SILENT_SECONDS", 0.0)
    claim = _elsewhere(store, claims.HEARTBEAT_TIMEOUT / 2)

    def too_old(_: float) -> None:
        os.utime(claim, (time.time() - claims.HEARTBEAT_TIMEOUT - 1,) * 2)

    monkeypatch.setattr(time, "sleep", too_old)
    with begin(plan, store) as ours:
        assert ours.claim.number == 2
    assert capsys.readouterr().err == "mpformer: waiting for another launch into this store (process 7 on n7)\n"


def test_a_launcher_that_was_taken_for_dead_starts_nothing_more(plan: Plan, store: Store) -> None:
    with begin(plan, store) as ours:
        ours.confirm()
        claims.create(ours.claim.path.with_name("2"), "{}")
        with pytest.raises(UserError, match="another one has taken its place; launch again"):
            ours.confirm()


def test_requests_to_stop_are_taken_back_and_runs_that_then_go_on_are_not_started_again(
    plan: Plan, store: Store, claim_of: Callable[..., claims.Claim]
) -> None:
    stopped, working = (store.run(run.run_id) for run in plan.unique[:2])
    for run in (stopped, working):
        run.path.mkdir(parents=True)
        run.cancel_file.write_text("{}")
    claim_of(working)
    with begin(plan, store) as ours:
        assert not stopped.cancel_file.exists()
        names = {run.run_id for run in ours.missing}
    assert stopped.run_id in names
    assert working.run_id not in names


@pytest.fixture
def claim_of() -> Callable[..., claims.Claim]:
    def make(run: Any) -> claims.Claim:
        claim = claims.acquire(run.path / "claims")
        assert claim is not None
        return claim

    return make


def test_a_launch_leaves_two_small_files_whatever_its_runs(plan: Plan, store: Store) -> None:
    for _ in range(3):
        with begin(plan, store):
            pass
    names = sorted(path.name for path in (store.root / "launching").iterdir())
    assert names == ["1", "1.released", "2", "2.released", "3", "3.released"]
    assert {path.name for run in plan.unique for path in store.run(run.run_id).path.iterdir()} == {"run.json"}
