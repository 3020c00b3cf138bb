"""What `make study` refuses and says before it trains anything."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import run

from experiments.execution import provenance
from experiments.launch import begin
from experiments.store.attempt_dir import Git, Provenance
from experiments.store.run_dir import Store
from mpformer.runtime.errors import UserError
from tests.support import counting_jobs


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A kept run of some commit, looked at from a checkout of another one without changes."""
    plan = counting_jobs.plan(counting_jobs.data_root(tmp_path), (0,))
    found = Store(tmp_path / "kept")
    begin.record(plan, found, "")
    attempt = found.run(plan.unique[0].run_id).attempt(1)
    attempt.write_provenance(Provenance(git=Git(sha="a" * 40)))
    monkeypatch.setattr(provenance, "git", lambda: Git(sha="f" * 40))
    return found


def test_runs_of_another_commit_are_not_added_to(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="the kept runs are of commit aaaaaaaaaaaa, this is ffffffffffff: go on from a"):
        run.check_commit(store)
    run.check_commit(Store(tmp_path / "nothing"))
    monkeypatch.setattr(provenance, "git", lambda: Git(sha="a" * 40))
    run.check_commit(store)
    monkeypatch.setattr(provenance, "git", lambda: Git(sha="a" * 40, dirty=True))
    with pytest.raises(UserError, match="the code has changes"):
        run.check_commit(store)


def test_it_is_said_how_to_get_a_set_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEADLINE", "headline")
    found = run.missing_sets(tmp_path)
    assert set(found) == {"nuclei", "facades"}
    assert "mpformer data prepare nuclei" in found["nuclei"]
    assert "results/mini/nuclei.txt" in found["nuclei"]
    assert "results/mini/facades.py" in found["facades"]


def test_what_is_done_is_kept_where_a_launch_is_stopped(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, ...]] = []

    def command(*words: str) -> int:
        said.append(words[:2])
        if words[0] == "launch":
            sys.exit("stopped")
        return 0

    monkeypatch.setattr(run, "mpformer", command)
    with pytest.raises(SystemExit, match="stopped"):
        run._suite(run.HEADLINE, "nuclei", run.parse([]), store)
    assert said == [("launch", run.HEADLINE), ("archive", run.HEADLINE), ("archive", run.HEADLINE)]


def test_the_sets_can_be_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between processes, or machines: what one is asked for, of every kind of suite, and nothing else."""
    said: list[tuple[str, ...]] = []
    monkeypatch.setattr(run, "mpformer", lambda *words: said.append(words))
    monkeypatch.setattr(run, "check_commit", lambda _: None)
    monkeypatch.setattr(run, "missing_sets", lambda _: {"facades": "a way to get it"})
    monkeypatch.setattr(run, "undecided", lambda _: [(run.HEADLINE, "shapes"), (run.HEADLINE, "nuclei")])

    def launched(*sets: str) -> set[tuple[str, str]]:
        said.clear()
        assert run.main(run.parse(["--keep", str(tmp_path / "none"), "--sets", *sets])) == ("facades" in sets)
        return {(words[1], words[3]) for words in said if words[0] == "launch"}

    assert launched("facades") == set()
    assert {name for _, name in launched("nuclei", "facades")} == {"nuclei"}
    assert launched("shapes") == {step for step in (*run.ORDER, *run.HYPOTHESES) if step[1] == "shapes"}


def test_a_whole_headline_that_is_underpowered_gets_more_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(name: str, verdict: str, claim: str = "C1", *, n: int = 8, suite: str = run.HEADLINE) -> SimpleNamespace:
        return SimpleNamespace(of=SimpleNamespace(suite=suite), set=name, claim=claim, verdict=verdict, n=n)

    found = [
        *(answer("shapes", "seen"), answer("shapes", "underpowered", "C3"), answer("shapes", "underpowered", "C8")),
        *(answer("nuclei", "seen"), answer("nuclei", "underpowered", "C8"), answer("nuclei", "not applicable", n=0)),
        *(answer("facades", "underpowered"), answer("facades", "not run yet", "C3", n=0)),
        answer("shapes", "underpowered", suite=run.BACKBONE),
    ]
    monkeypatch.setattr("answers.answers", lambda _: found)
    assert run.undecided(Store(tmp_path)) == [(run.HEADLINE, "shapes"), (run.BACKBONE, "shapes")]
    found[:] = [answer("nuclei", "seen", n=10), answer("facades", "underpowered", n=7)]
    assert run.undecided(Store(tmp_path)) == [(run.HEADLINE, "nuclei")], "what was begun with more seeds ends with all"


def test_a_request_to_stop_reaches_the_command_and_ends_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    class Command:
        def __init__(self, *_: object) -> None:
            self.sent: list[int] = []

        def send_signal(self, number: int) -> None:
            self.sent.append(number)

        def wait(self) -> int:
            signal.raise_signal(signal.SIGTERM)
            assert self.sent == [signal.SIGTERM]
            return 143

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(subprocess, "Popen", Command)
    try:
        with pytest.raises(SystemExit, match="stopped; the same command goes on"):
            run.mpformer("launch")
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
