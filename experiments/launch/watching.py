"""Live progress of a launch: a table on a terminal, plain lines in a file; and a clean end on Ctrl-C."""

import contextlib
import errno
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from experiments.launch import choosing
from experiments.launch.local import Launch
from experiments.status import scheduler, suite_view, tables
from experiments.status.states import RunState, State
from experiments.status.suite_view import RunLine, SuiteView
from experiments.store import files
from experiments.store.attempt_dir import Stop, StopReason
from experiments.store.launches import LaunchDir
from experiments.store.run_dir import Store
from experiments.suites import planning
from experiments.suites.planning import Plan
from mpformer.runtime.signals import handled

if TYPE_CHECKING:
    from rich.console import Console

LINE_PERIOD = 15.0
"""Seconds between two lines about a running run where there is no terminal."""


def follow(plan: Plan, store: Store, launch: Launch, console: "Console") -> list[RunState]:
    """Show the plan's runs until nothing works on them any more; returns their last states.

    On Ctrl-C, or when nobody is left to show it to, the launch's workers are asked to checkpoint and end, which is
    waited for; a second Ctrl-C kills them. Raises KeyboardInterrupt when that is over.
    """
    try:
        return _follow(plan, store, launch, console)
    except (KeyboardInterrupt, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NOBODY_READS:
            raise
        if launch.started:
            _stop(plan, store, launch, console, str(error) or "Ctrl-C")
        raise KeyboardInterrupt from None


_NOBODY_READS = (errno.EIO, errno.EPIPE)
"""What writing to a closed terminal or pipe gives, and what is then raised in place of the signal's interrupt."""


@contextlib.contextmanager
def ended_with_the_command() -> Iterator[None]:
    """Let SIGTERM and SIGHUP (a closed terminal) interrupt as Ctrl-C does; ``nohup`` stays in force."""
    asked = [number for number in _ENDS if signal.getsignal(number) is not signal.SIG_IGN]
    with handled(dict.fromkeys(asked, _interrupt)):
        yield


_ENDS = (signal.SIGTERM, signal.SIGHUP)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _follow(plan: Plan, store: Store, launch: Launch, console: "Console") -> list[RunState]:
    if not console.is_terminal:
        return _until_over(plan, store, launch, _Lines(console).show)
    from rich.live import Live

    with Live(console=console, refresh_per_second=4) as live, files.remembering():
        return _until_over(plan, store, launch, lambda view: live.update(tables.table(view)))


def _until_over(
    plan: Plan, store: Store, launch: Launch, show: Callable[[SuiteView], None], period: float = 0.5
) -> list[RunState]:
    record = planning.record_of(plan)
    while True:
        working = launch.working()
        if not working:
            LaunchDir(launch.directory).close()
        (view,) = suite_view.views(store.root, [record], scheduler.ASK_PERIOD)
        show(view)
        states = {run.state.run_id: run.state for run in view.runs}
        if not working and not any(state.active for state in states.values()):
            return list(states.values())
        time.sleep(period)


def _stop(plan: Plan, store: Store, launch: Launch, console: "Console", why: str) -> None:
    """Wait for the workers to checkpoint; a second Ctrl-C kills them, another signal changes nothing."""
    with handled(dict.fromkeys(_ENDS, signal.SIG_IGN)):
        LaunchDir(launch.directory).ask_to_stop(StopReason(Stop.INTERRUPTED, why))
        _say(console, "stopping: the runs write a checkpoint (Ctrl-C again to kill them at once)")
        try:
            while launch.working():
                time.sleep(0.2)
            LaunchDir(launch.directory).close()
        except KeyboardInterrupt:
            launch.kill()
            _say(console, "killed: the next launch continues from the last checkpoints")
            return
        states = choosing.snapshot(plan, store)
        done = sum(state.state is State.DONE for state in states)
        _say(console, f"stopped: {done} of {len(states)} runs done; launch again to continue the others")


def _say(console: "Console", line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        console.print(line)


class _Lines:
    """Progress where there is no terminal: a line when a run's state changes, and one now and then while it runs."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._shown: dict[str, tuple[str, float]] = {}

    def show(self, view: SuiteView) -> None:
        """Print what is new."""
        for run in view.runs:
            state, now = run.state, time.monotonic()
            label, at = self._shown.get(state.run_id, ("", 0.0))
            if state.label != label or (state.state is State.RUNNING and now - at >= LINE_PERIOD):
                self._shown[state.run_id] = (state.label, now)
                self._console.print(_line(run, view.record.primary), highlight=False, markup=False, soft_wrap=True)


def _line(run: RunLine, primary: str) -> str:
    state = run.state
    iteration, loss, eta = tables.progress_cells(state)
    score = tables.score_text(state.metrics, primary)
    parts = [f"{run.row} seed {run.seed}: {state.label}", iteration, f"loss {loss}" if loss else ""]
    detail = "" if state.state is State.RUNNING else state.detail
    parts += [f"ETA {eta}" if eta else "", f"{primary} {score}" if score else "", detail]
    return "  ".join(part for part in parts if part)
