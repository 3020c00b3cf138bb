"""Live progress of a launch: a table on a terminal, plain lines in a file; and a clean end on Ctrl-C."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments import launching
from experiments.launching import Launch
from experiments.planning import Plan
from experiments.states import RunState, State
from experiments.store import Store

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLOURS: Mapping[State, str] = {
    State.DONE: "green",
    State.RUNNING: "cyan",
    State.QUEUED: "blue",
    State.TRAINED: "cyan",
    State.FAILED: "red",
    State.LOST: "red",
    State.TIMEOUT: "red",
    State.VOID: "magenta",
    State.UNKNOWN: "red",
    State.CANCELLED: "yellow",
}

SLURM_PERIOD = 10.0
"""Seconds between two questions to Slurm while a live table is shown."""

LINE_PERIOD = 15.0
"""Seconds between two lines about a running run where there is no terminal."""


def follow(plan: Plan, store: Store, launch: Launch | None, console: "Console") -> list[RunState]:
    """Show the plan's runs until nothing works on them any more; returns their last states.

    On Ctrl-C the launch's workers are asked to checkpoint and end, which is waited for; a second Ctrl-C kills them.
    Raises KeyboardInterrupt when that is over. Without a launch of one's own, Ctrl-C only ends the watching.
    """
    try:
        return _follow(plan, store, launch, console)
    except KeyboardInterrupt:
        if launch is not None and launch.started:
            _stop(plan, store, launch, console)
        raise


def _follow(plan: Plan, store: Store, launch: Launch | None, console: "Console") -> list[RunState]:
    show: Callable[[Sequence[RunState]], None]
    if not console.is_terminal:
        show = _Lines(console, plan).show
        return _until_over(plan, store, launch, show)
    from rich.live import Live

    with Live(console=console, refresh_per_second=4) as live:
        return _until_over(plan, store, launch, lambda states: live.update(table(plan, states)))


def _until_over(
    plan: Plan, store: Store, launch: Launch | None, show: Callable[[Sequence[RunState]], None], period: float = 0.5
) -> list[RunState]:
    while True:
        working = launch is not None and launch.working()
        if launch is not None and not working:
            launch.close()
        states = launching.snapshot(plan, store, SLURM_PERIOD)
        show(states)
        if not working and not any(state.active for state in states):
            return states
        time.sleep(period)


def _stop(plan: Plan, store: Store, launch: Launch, console: "Console") -> None:
    """Wait for the workers to checkpoint; a second Ctrl-C kills them."""
    launch.stop("interrupted: Ctrl-C")
    console.print("stopping: the runs write a checkpoint (Ctrl-C again to kill them at once)")
    try:
        while launch.working():
            time.sleep(0.2)
        launch.close()
    except KeyboardInterrupt:
        launch.kill()
        console.print("killed: the next launch continues from the last checkpoints")
        return
    states = launching.snapshot(plan, store)
    done = sum(state.state is State.DONE for state in states)
    console.print(f"stopped: {done} of {len(states)} runs done; launch again to continue the others")


def table(plan: Plan, states: Sequence[RunState]) -> "Table":
    """Return a table of the plan's runs."""
    runs = {run.run_id: run for run in plan.unique}
    lines = []
    for state in states:
        run = runs[state.run_id]
        score = score_text(state.metrics, plan.suite.primary)
        cells = (run.row.name, str(run.seed), coloured(state), *progress_cells(state), score, state.run_id[-12:])
        lines.append((*cells, escaped(state.detail)))
    return compact(f"{plan.suite.name}@{plan.scale} on {plan.dataset}", columns(plan.suite.primary), lines)


def columns(primary: str) -> tuple[str, ...]:
    """Return the headings of a table of runs."""
    return ("row", "seed", "state", "iteration", "loss", "ETA", primary, "run", "")


def coloured(state: RunState) -> str:
    """Return the state's label in its colour."""
    colour = COLOURS.get(state.state)
    return f"[{colour}]{state.label}[/]" if colour else state.label


def escaped(text: str) -> str:
    """Return text that rich prints as it is: what logs say in brackets is no markup."""
    from rich.markup import escape

    return escape(text)


def compact(title: str, names: Sequence[str], lines: Sequence[Sequence[str]]) -> "Table":
    """Return a table that leaves out columns with nothing in them, so that it fits a narrow terminal."""
    from rich import box
    from rich.table import Table

    shown = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    kept = [index for index in range(len(names)) if any(line[index] for line in lines)]
    for index in kept:
        shown.add_column(names[index], no_wrap=bool(names[index]))
    for line in lines:
        shown.add_row(*(line[index] for index in kept))
    return shown


def progress_cells(state: RunState) -> tuple[str, str, str]:
    """Return iteration, loss and time to go as text."""
    values = state.progress
    if state.state is State.DONE or not values:
        return "", "", ""
    if "stage" not in values and "max_iter" not in values:
        return "", "", ""
    if values.get("stage") == "start":
        return "starting", "", ""
    iteration = f"{values['iteration']}/{values['max_iter']}" if "max_iter" in values else ""
    if values.get("stage") == "evaluate":
        iteration = f"evaluating {values.get('image', 0)}/{values.get('images', '?')}"
    loss = f"{values['loss']:.3f}" if isinstance(values.get("loss"), int | float) else ""
    eta = values.get("eta_seconds") if state.state is State.RUNNING else None
    return iteration, loss, duration(eta) if isinstance(eta, int | float) else ""


def score_text(metrics: Mapping[str, Any], name: str) -> str:
    """Return one score with a decimal, empty if there is none."""
    value = metrics.get(name)
    return f"{value:.1f}" if isinstance(value, int | float) else ""


def duration(seconds: float) -> str:
    """Return seconds as ``1h02m``, ``3m05s`` or ``12s``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


class _Lines:
    """Progress where there is no terminal: a line when a run's state changes, and one now and then while it runs."""

    def __init__(self, console: "Console", plan: Plan) -> None:
        self._console, self._plan = console, plan
        self._shown: dict[str, tuple[str, float]] = {}

    def show(self, states: Sequence[RunState]) -> None:
        """Print what is new."""
        for state in states:
            label, at = self._shown.get(state.run_id, ("", 0.0))
            now = time.monotonic()
            if state.label != label or (state.state is State.RUNNING and now - at >= LINE_PERIOD):
                self._shown[state.run_id] = (state.label, now)
                self._console.print(self._line(state), highlight=False, markup=False, soft_wrap=True)

    def _line(self, state: RunState) -> str:
        run = next(run for run in self._plan.unique if run.run_id == state.run_id)
        iteration, loss, eta = progress_cells(state)
        score = score_text(state.metrics, self._plan.suite.primary)
        parts = [f"{run.row.name} seed {run.seed}: {state.label}", iteration, f"loss {loss}" if loss else ""]
        detail = "" if state.state is State.RUNNING else state.detail
        parts += [f"ETA {eta}" if eta else "", f"{self._plan.suite.primary} {score}" if score else "", detail]
        return "  ".join(part for part in parts if part)
