"""The command in a process of its own, on a terminal, and what Ctrl-C in that terminal does."""

import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from experiments.status.states import State, derive
from experiments.store.files import read_json
from experiments.store.launches import LaunchDir
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan

SCRIPT = """
import functools, importlib.util, sys
spec = importlib.util.spec_from_file_location("counting", sys.argv[1])
counting = importlib.util.module_from_spec(spec)
sys.modules["counting"] = counting
spec.loader.exec_module(counting)
from experiments.cli import main
from experiments.launch import local
local.launch = functools.partial(local.launch, runner=counting.Counter(seconds=float(sys.argv[2])))
sys.argv[1:] = sys.argv[3:]
main.main()
"""
ARGUMENTS = (
    "launch",
    "headline",
    "--seeds",
    "0,1",
    "--set",
    "schedule.max_iter=12",
    "--workers",
    "2",
    "--no-mlflow",
    "--no-report",
)


def _as_in_a_terminal() -> None:
    """A test run in the background of a script, or by nohup, inherits ignored signals; a terminal's programs do not.

    Only a controlling terminal hangs up.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A process that leads a session on a terminal of its own."""

    def __init__(self, store: Store, data_root: Path, seconds: float, *arguments: str) -> None:
        ours, theirs = pty.openpty()
        script = [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[1] / "conftest.py"), str(seconds)]
        roots = {"MPFORMER_ROOT": str(store.root), "DETECTRON2_DATASETS": str(data_root)}
        self.process = subprocess.Popen(
            [*script, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, **roots, "COLUMNS": "150", "LINES": "40", "TERM": "xterm"},
            start_new_session=True,
            preexec_fn=_as_in_a_terminal,
        )
        os.close(theirs)
        self._terminal, self.text = ours, ""

    def read(self) -> None:
        """Take in what was printed; blocks until there is something."""
        try:
            self.text += os.read(self._terminal, 65536).decode(errors="replace")
        except OSError:  # the other side is closed
            time.sleep(0.05)

    def until(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end, self.text
            assert self.process.poll() is None or text in self.text, self.text
            self.read()

    def ctrl_c(self) -> None:
        """What a terminal does: SIGINT to every process of the foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> int:
        """Close the terminal's window; returns the command's exit code."""
        os.close(self._terminal)
        return self.process.wait(60)

    def end(self) -> int:
        while self.process.poll() is None:
            self.read()
        self.read()
        os.close(self._terminal)
        self.text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.text)
        return self.process.returncode


def _states(plan: Plan, store: Store) -> list[State]:
    return [derive(store.run(run.run_id), run.eval_id).state for run in plan.unique]


def test_a_launch_shows_live_progress_and_ends(plan: Plan, store: Store, data_root: Path) -> None:
    terminal = Terminal(store, data_root, 0.1, *ARGUMENTS)
    terminal.until("12 ")
    assert terminal.end() == 0
    for text in ("iteration", "loss", "ETA", "RUNNING", "4 of 4 runs done"):
        assert text in terminal.text
    assert _states(plan, store) == [State.DONE] * 4


def test_a_launch_ends_with_the_answer(store: Store, data_root: Path) -> None:
    """Issue 12, 5.6: the table, one sentence and one link."""
    words = [word for word in ARGUMENTS if word != "--no-report"]
    terminal = Terminal(store, data_root, 0.0, *words)
    assert terminal.end() == 0
    *_, row, _, sentence, link = [line.strip() for line in terminal.text.strip().splitlines()]
    assert row.split()[:3] == ["MP-Former", "12.5", "±0.0"]
    assert sentence == "MP-Former, ±0.0 AP to its baseline: no verdict from 2 seeds, which takes three (--seeds 0-2)."
    assert link.endswith((store.root / "reports" / "headline@mini" / "index.html").resolve().as_uri())


def test_a_pipe_that_is_closed_ends_no_run(plan: Plan, store: Store, data_root: Path) -> None:
    """`mpformer launch … | head -1`: the command goes on until its runs are done."""
    script = [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[1] / "conftest.py"), "0.05", *ARGUMENTS]
    roots = {"MPFORMER_ROOT": str(store.root), "DETECTRON2_DATASETS": str(data_root)}
    process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **roots})
    assert process.stdout is not None
    assert process.stderr is not None
    assert b"launched 4 runs" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
    assert _states(plan, store) == [State.DONE] * 4


def test_ctrl_c_is_clean(plan: Plan, store: Store, data_root: Path) -> None:
    terminal = Terminal(store, data_root, 0.3, *ARGUMENTS)
    terminal.until("/12")
    terminal.ctrl_c()
    assert terminal.end() == 130
    assert "launch again to continue" in terminal.text
    assert "Traceback" not in terminal.text
    states = _states(plan, store)
    assert set(states) <= {State.CANCELLED, State.PLANNED, State.DONE}
    stopped = store.run(plan.unique[states.index(State.CANCELLED)].run_id)
    assert read_json(stopped.path / "checkpoints" / "state.json")["iteration"] >= 1
    again = Terminal(store, data_root, 0.0, *ARGUMENTS)
    assert again.end() == 0
    assert _states(plan, store) == [State.DONE] * 4


@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "closed terminal"])
def test_ending_the_launcher_ends_its_runs_as_ctrl_c_does(plan: Plan, store: Store, data_root: Path, how: str) -> None:
    """Issue 12, 5.3: the runs checkpoint and end before the command does; nothing works on unseen."""
    terminal = Terminal(store, data_root, 0.3, *ARGUMENTS)
    terminal.until("/12")
    if how == "closed terminal":
        assert terminal.close() == 130
    else:
        for _ in range(2):  # a second one changes nothing
            os.kill(terminal.process.pid, signal.Signals[how])
        assert terminal.end() == 130
        assert "launch again to continue" in terminal.text
    (launch,) = map(LaunchDir, store.launches.iterdir())
    assert launch.live_workers() == []
    states = _states(plan, store)
    assert set(states) <= {State.CANCELLED, State.PLANNED, State.DONE}
    stopped = store.run(plan.unique[states.index(State.CANCELLED)].run_id)
    assert read_json(stopped.path / "checkpoints" / "state.json")["iteration"] >= 1


def test_detached_workers_outlive_the_command_and_its_terminal(plan: Plan, store: Store, data_root: Path) -> None:
    terminal = Terminal(store, data_root, 0.1, *ARGUMENTS, "--detach")
    assert terminal.end() == 0
    for number in (signal.SIGHUP, signal.SIGINT):
        try:
            os.killpg(terminal.process.pid, number)
        except ProcessLookupError:
            pytest.fail("the workers are gone")
    end = time.monotonic() + 60
    while _states(plan, store) != [State.DONE] * 4:
        assert time.monotonic() < end, _states(plan, store)
        time.sleep(0.1)
