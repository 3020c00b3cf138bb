"""Tables of runs: how their states, progress and scores are written, for a terminal and as plain text."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.status.states import RunState, State
from experiments.status.suite_view import Delta, RunLine, SuiteView, WorkLeft

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


LONG = 100
"""Runs from which on a suite is shown as plain aligned text (a table takes a millisecond a line), live without DONE."""


def table(view: SuiteView) -> "Table":
    """Return a suite as a table for a terminal; a long one without the runs that are done."""
    shown = [run for run in view.runs if not run.done] if len(view.runs) > LONG else view.runs
    lines = []
    for run in shown:
        cells = [escaped(cell) for cell in _cells(run, view.primary)]
        cells[_STATE] = coloured(run.state)
        lines.append(cells)
    return compact(_title(view), _names(view.primary), lines)


def text(view: SuiteView) -> str:
    """Return a suite as plain aligned text, every run of it."""
    lines = [_names(view.primary), *(_cells(run, view.primary) for run in view.runs)]
    kept = [index for index in range(len(lines[0])) if any(line[index] for line in lines[1:])]
    widths = [max(len(line[index]) for line in lines) for index in kept[:-1]] + [0]
    shown = ("  ".join(line[i].ljust(w) for i, w in zip(kept, widths, strict=True)).rstrip() for line in lines)
    return "\n".join((_title(view), *(line.replace("\n", " | ") for line in shown)))


def notes(views: Sequence[SuiteView]) -> list[str]:
    """Return one line for each thing that Slurm did not answer, and for each node that a suite's jobs avoid."""
    problems = [problem for view in views if view.answer for problem in view.answer.problems]
    silent = [f"{problem}: states are what files and accounting say" for problem in dict.fromkeys(problems)]
    return silent + [
        f"node {node} is left out: the infrastructure ended {count} starts of {view.suite} there; "
        f"mpformer launch {view.suite} --forget-nodes takes it back"
        for view in views
        for node, count in view.bad_nodes.items()
    ]


def _title(view: SuiteView) -> str:
    counts = ", ".join(f"{count} {label}" for label, count in view.counts.items())
    return f"{view.name}: {counts or 'no runs'}{_left_text(view.left)}"


def _left_text(left: WorkLeft) -> str:
    if not left.seconds:
        return ""
    wide = f", about {duration(left.seconds / left.running)} at the present width" if left.running else ""
    unknown = f", {left.unknown} runs not counted: nothing like them has been measured" if left.unknown else ""
    return f"; {duration(left.seconds)} of runs left, as measured{wide}{unknown}"


def _names(primary: str) -> tuple[str, ...]:
    *first, score, run, detail = columns(primary)
    return (*first, score, "Δ", run, "job", detail)


_STATE = 2
"""Column of the state."""


def _cells(run: RunLine, primary: str) -> tuple[str, ...]:
    state = run.state
    iteration, loss, eta = progress_cells(state)
    if state.active and not eta and run.left.seconds is not None:
        eta = f"~{duration(run.left.seconds)}"  # of the run itself, not of its waiting
    cells = (run.row, str(run.seed), state.label, iteration, loss, eta, score_text(run.score.metrics, primary))
    plain = state.state is State.RUNNING and state.detail in ("start", "train", "evaluate")
    detail = "\n".join([] if plain else [line for line in (state.detail, *run.log_lines) if line])
    return (*cells, _delta_text(run.delta, run.score.iteration), state.run_id[-12:], state.job, detail)


def _delta_text(delta: Delta, scored: int | None) -> str:
    """The difference, with its iteration where that is not the one of the score beside it."""
    if delta.value is None:
        return ""
    return f"{delta.value:+.1f}{'' if delta.iteration == scored else f' @{delta.iteration}'}"
