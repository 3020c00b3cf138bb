import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.store import claims
from experiments.store.claims import ClaimLost, Heartbeat, acquire, holder


def _race(directory: Path, barrier: "multiprocessing.synchronize.Barrier", won: "multiprocessing.Queue[int]") -> None:
    barrier.wait()
    for number in range(30):
        claim = acquire(directory / str(number))
        if claim is not None:
            won.put(number)
    barrier.wait()  # everyone stays alive, so that no claim becomes stale


def test_eight_processes_racing_claim_each_run_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, won = context.Barrier(8), context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, barrier, won)) for _ in range(8)]
    for racer in racers:
        racer.start()
    claimed = sorted(won.get(timeout=60) for _ in range(30))
    for racer in racers:
        racer.join(60)
    assert claimed == list(range(30))
    assert won.empty()


def test_a_claim_is_exclusive_until_it_is_released(tmp_path: Path) -> None:
    claim = acquire(tmp_path)
    assert claim is not None
    assert holder(tmp_path) == 1
    assert acquire(tmp_path) is None
    claim.release()
    assert holder(tmp_path) is None
    second = acquire(tmp_path)
    assert second is not None
    assert second.number == 2


@pytest.mark.parametrize(
    "deleted", [("1",), ("2",), ("1", "2"), ("2", "2.released"), ("1", "1.released", "2", "2.released")]
)
def test_the_number_of_a_deleted_claim_is_used_no_second_time(tmp_path: Path, deleted: tuple[str, ...]) -> None:
    """Otherwise the `.released` that stayed, or the attempt, would be taken for the new claim's."""
    directory = tmp_path / "claims"
    for number in ("1", "2"):
        claim = acquire(directory)
        assert claim is not None
        (tmp_path / "attempts" / number).mkdir(parents=True)
        claim.release()
    for name in deleted:
        (directory / name).unlink()
    third = acquire(directory)
    assert third is not None
    assert third.number == 3
    assert holder(directory) == 3
    assert acquire(directory) is None
    third.confirm()


def test_the_owner_of_a_deleted_claim_has_lost_it(tmp_path: Path) -> None:
    claim = acquire(tmp_path)
    assert claim is not None
    claim.path.unlink()
    with pytest.raises(ClaimLost):
        claim.confirm()


def _dead_claim(directory: Path) -> int:
    """A claim by a process that was killed."""
    code = "import sys, time; from pathlib import Path; from experiments.store.claims import acquire\n"
    code += f"acquire(Path({str(directory)!r})); print('claimed', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline()
    assert acquire(directory) is None
    child.send_signal(signal.SIGKILL)
    time.sleep(0.2)
    assert claims.process_born(child.pid) == "", "a zombie counts as dead"
    child.wait()
    child.stdout.close()
    return child.pid


def test_a_killed_owner_is_taken_over_at_once(tmp_path: Path) -> None:
    _dead_claim(tmp_path)
    claim = acquire(tmp_path)
    assert claim is not None
    assert claim.number == 2


def _foreign(directory: Path, age: float) -> None:
    """A claim from another machine whose last heartbeat is ``age`` seconds old."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {"host": "other", "machine": "other", "pid": 1, "born": "1", "token": "t"}
    (directory / "1").write_text(json.dumps(content))
    then = time.time() - age
    os.utime(directory / "1", (then, then))


def test_another_machine_keeps_its_claim_while_its_heart_beats(tmp_path: Path) -> None:
    _foreign(tmp_path, age=30)
    assert acquire(tmp_path, timeout=60) is None
    _foreign(tmp_path, age=90)
    assert acquire(tmp_path, timeout=60) is not None


def test_a_claim_cut_short_while_it_was_written_is_stale_after_the_timeout(tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    assert acquire(tmp_path, timeout=60) is None
    os.utime(tmp_path / "1", (0, 0))
    assert acquire(tmp_path, timeout=60) is not None


def test_a_reused_pid_is_not_the_owner(tmp_path: Path) -> None:
    content = {"host": "h", "machine": claims.machine(), "pid": os.getpid(), "born": "12", "token": "t"}
    (tmp_path / "1").write_text(json.dumps(content))
    assert holder(tmp_path) is None


def test_an_owner_that_was_taken_over_may_write_nothing_more(tmp_path: Path) -> None:
    claim = acquire(tmp_path)
    assert claim is not None
    claim.confirm()
    (tmp_path / "2").write_text("{}")  # what a takeover does
    with pytest.raises(ClaimLost, match="taken over"):
        claim.confirm()


def test_a_claim_file_overwritten_by_another_token_is_lost(tmp_path: Path) -> None:
    claim = acquire(tmp_path)
    assert claim is not None
    claim.path.write_text(claim.path.read_text().replace(claim.token, "someone else"))
    with pytest.raises(ClaimLost):
        claim.confirm()


def test_the_heartbeat_renews_the_claim_and_notices_a_takeover(tmp_path: Path) -> None:
    claim = acquire(tmp_path)
    assert claim is not None
    os.utime(claim.path, (0, 0))
    with Heartbeat(claim, period=0.02) as heartbeat:
        _wait(lambda: claim.path.stat().st_mtime > 1e9)
        assert not heartbeat.lost
        (tmp_path / "2").write_text("{}")
        _wait(lambda: heartbeat.lost)


def _wait(condition: "object", seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


_steps = st.lists(st.tuples(st.sampled_from(["acquire", "release", "die"]), st.integers(0, 3)), max_size=25)


@given(_steps)
def test_at_most_one_of_several_processes_holds_a_run(steps: list[tuple[str, int]]) -> None:
    """Against a model: who holds the run, after any order of claims, releases and deaths."""
    with _Machine() as machine:
        for action, who in steps:
            machine.do(action, who)
            assert machine.held_by_files() == machine.holder


class _Machine:
    """Four pretended processes and what the claims should say of them."""

    def __enter__(self) -> "_Machine":
        import tempfile

        self.place = tempfile.TemporaryDirectory()
        self.directory = Path(self.place.name)
        self.holder: int | None = None
        self.claims: dict[int, claims.Claim] = {}
        self.owners: dict[int, int] = {}
        return self

    def __exit__(self, *_: object) -> None:
        self.place.cleanup()

    def do(self, action: str, who: int) -> None:
        if action == "acquire":
            claim = acquire(self.directory)
            assert (claim is not None) == (self.holder is None)
            if claim is not None:
                self.holder, self.claims[who], self.owners[claim.number] = who, claim, who
        elif self.holder == who and action == "release":
            self.claims.pop(who).release()
            self.holder = None
        elif self.holder == who:
            claim = self.claims.pop(who)
            claim.path.write_text(claim.path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 4194304'))
            self.holder = None

    def held_by_files(self) -> int | None:
        number = holder(self.directory)
        return None if number is None else self.owners[number]
