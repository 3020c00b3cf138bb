"""A store that two accounts share through a group: each in a process of its own that has given up root's rights."""

import os
import shutil
import stat
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.execution import provenance
from experiments.execution.attempt import Options, run_attempt
from experiments.launch import begin
from experiments.status import standing, suite_view
from experiments.status.states import State
from experiments.store import claims
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan

ANN, BOB, GROUP = 23451, 23452, 23450


@pytest.fixture
def shared() -> Iterator[Store]:
    """A store in a folder whose group both accounts are in; only root can be both."""
    if os.geteuid():
        pytest.skip("only root can work under two accounts")
    place = Path(tempfile.mkdtemp(prefix="shared-"))
    root = place / "store"
    root.mkdir()
    place.chmod(0o755)
    provenance.collect(1)  # read now: the accounts may not be let into the folder that Python is installed in
    os.chown(root, ANN, GROUP)
    root.chmod(0o2770)
    yield Store(root)
    shutil.rmtree(place)


def as_account(uid: int, work: Callable[[], Any]) -> int:
    """Do something in a process of this account, its umask 002; returns what ended it: 0, an exit code, or a signal."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([GROUP])
            os.setgid(GROUP)
            os.setuid(uid)
            os.umask(0o002)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def test_a_second_account_launches_continues_voids_and_looks(
    shared: Store, plan: Plan, options: Options, counter: Callable[..., Any], tmp_path: Path
) -> None:
    first, key = plan.unique[0], (plan.unique[0].run_id, plan.unique[0].eval_id)
    run = shared.run(first.run_id)
    dies = shared.root / "killed"

    def launch() -> None:
        with begin.begin(plan, shared, "a launch") as found:
            assert len(found.missing) == len(plan.unique)

    def attempt(runner: Any, outcome: str) -> Callable[[], None]:
        def work() -> None:
            quiet = replace(options, capture=True)
            assert run_attempt(shared.root, first.run_id, "all", quiet, runner).outcome == outcome

        return work

    def look(state: State) -> Callable[[], None]:
        def work() -> None:
            assert standing.look(shared, [key]).states[key].state is state
            assert suite_view.views(shared.root, shared.suite_records())

        return work

    assert as_account(ANN, launch) == 0
    assert as_account(ANN, attempt(counter(kill_once=dies), "")) == -9
    assert as_account(BOB, look(State.RUNNING)) == 0, "her process cannot be asked about, and her heart beat just now"
    assert as_account(BOB, attempt(counter(), "skipped")) == 0
    os.utime(run.claims / "1", (0, 0))
    assert as_account(BOB, launch) == 0
    assert as_account(BOB, attempt(counter(), "done")) == 0
    assert as_account(ANN, look(State.DONE)) == 0
    assert as_account(BOB, lambda: run.declare_void("a bug")) == 0
    assert as_account(ANN, look(State.VOID)) == 0
    assert as_account(ANN, attempt(counter(), "done")) == 0
    assert {path.stat().st_uid for path in shared.root.rglob("*")} == {ANN, BOB}
    for path in shared.root.rglob("*"):
        about = path.stat()
        assert about.st_gid == GROUP, path
        assert stat.S_IMODE(about.st_mode) & 0o060 == 0o060, f"the group may not change {path}"


def test_a_process_of_another_account_is_not_judged_by_its_pid(shared: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that hides others' processes (hidepid) shows none of hers: her claim lives by its heartbeat."""
    directory = shared.root / "claims"

    def claim() -> None:
        assert claims.acquire(directory) is not None

    assert as_account(ANN, claim) == 0
    monkeypatch.setattr(claims, "process_born", lambda pid: "")
    assert claims.holder(directory) == 1
    assert claims.acquire(directory) is None
    then = time.time() - 2 * claims.HEARTBEAT_TIMEOUT
    os.utime(directory / "1", (then, then))
    assert claims.holder(directory) is None
