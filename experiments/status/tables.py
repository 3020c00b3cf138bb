"""How states, progress and scores of runs are written in tables."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.status.states import RunState, State

if TYPE_CHECKING:
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
    now = state.progress
    if state.state is State.DONE or not (now.stage or now.max_iter):
        return "", "", ""
    if now.stage == "start":
        return "starting", "", ""
    iteration = f"{now.iteration}/{now.max_iter}" if now.max_iter is not None else ""
    if now.stage == "evaluate":
        iteration = f"evaluating {now.image or 0}/{now.images or '?'}"
    loss = f"{now.loss:.3f}" if now.loss is not None else ""
    eta = now.eta_seconds if state.state is State.RUNNING else None
    return iteration, loss, duration(eta) if eta is not None else ""


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
