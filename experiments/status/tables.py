"""Tables of runs: how their states, progress and scores are written, for a terminal and as plain text."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.status.states import RunState, State
from experiments.status.suite_view import Delta, RunLine, SuiteView, WorkLeft

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
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


def coloured(state: RunState) -> str:
    """Return the state's label in its colour."""
    colour = COLOURS.get(state.state)
    return f"[{colour}]{state.label}[/]" if colour else state.label


_DROPPED = ("job", "loss", "run", "ETA", "iteration", "Δ")
"""What a narrow terminal does without, the first one first; never the row, its seed, its state and its score."""

_DETAIL_WIDTH = 16
"""Least width of the last column, which is wrapped."""


@dataclass(frozen=True)
class Compact:
    """A table that fits where it is shown: without columns that are empty, or that a narrow terminal does without."""

    title: str
    names: Sequence[str]
    lines: Sequence[Sequence[str]]
    """Cells as rich's markup."""

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> Iterator["Table"]:
        """Yield the table that fits the options' width."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        shown = Table(
            title=self.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1),
            pad_edge=False,
        )  # fmt: skip
        plain = [[Text.from_markup(cell).plain for cell in line] for line in self.lines]
        kept, widths = fitting(self.names, plain, options.max_width, gap=3), _widths(self.names, plain)
        left = options.max_width - 2 - sum(widths[index] + 3 for index in kept if self.names[index])
        for index in kept:
            name, most = self.names[index], max(left, _DETAIL_WIDTH)
            shown.add_column(name, no_wrap=name not in ("row", ""), overflow="fold", max_width=None if name else most)
        for line in self.lines:
            shown.add_row(*(line[index] for index in kept))
        yield shown


def fitting(names: Sequence[str], lines: Sequence[Sequence[str]], width: int, gap: int = 2) -> list[int]:
    """Return the columns that are shown in ``width`` characters, ``gap`` of them between two: none that is empty."""
    widths = _widths(names, lines)
    kept = [index for index in range(len(names)) if any(line[index] for line in lines)]
    for name in _DROPPED:
        needed = sum(widths[index] if names[index] else min(widths[index], _DETAIL_WIDTH) for index in kept)
        if needed + gap * (len(kept) - 1) + 2 <= width:
            break
        kept = [index for index in kept if names[index] != name]
    return kept


def _widths(names: Sequence[str], lines: Sequence[Sequence[str]]) -> list[int]:
    from rich.cells import cell_len

    return [max(map(cell_len, column)) for column in zip(names, *lines, strict=True)]


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
    return f"{value:.{_DECIMALS}f}" if isinstance(value, int | float) else ""


_DECIMALS = 1


def duration(seconds: float) -> str:
    """Return seconds as ``1h02m``, ``3m05s`` or ``12s``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


LONG = 100
"""Runs from which on a suite is shown as plain aligned text (a table takes a millisecond a line), live without DONE."""


def table(view: SuiteView) -> Compact:
    """Return a suite as a table for a terminal; a long one without the runs that are done."""
    from rich.markup import escape  # what logs say in brackets is no markup

    shown = [run for run in view.runs if not run.done] if len(view.runs) > LONG else view.runs
    lines = []
    for run in shown:
        cells = [escape(cell) for cell in _cells(run, view.record.primary)]
        cells[_STATE] = coloured(run.state)
        lines.append(cells)
    return Compact(_title(view), _names(view.record.primary), lines)


def text(view: SuiteView, width: int) -> str:
    """Return a suite as plain aligned text, every run of it, in lines of about ``width`` characters."""
    lines = [_names(view.record.primary), *(_cells(run, view.record.primary) for run in view.runs)]
    kept = fitting(lines[0], lines[1:], width)
    widths = [max(len(line[index]) for line in lines) for index in kept[:-1]] + [0]
    shown = ("  ".join(line[i].ljust(w) for i, w in zip(kept, widths, strict=True)).rstrip() for line in lines)
    return "\n".join((_title(view), *(line.replace("\n", " | ") for line in shown)))


def notes(views: Sequence[SuiteView]) -> list[str]:
    """Return one line for each thing that Slurm did not answer, and for each node that a suite's jobs avoid."""
    problems = [problem for view in views if view.answer for problem in view.answer.problems]
    silent = [f"{problem}: states are what files and accounting say" for problem in dict.fromkeys(problems)]
    return silent + [
        f"node {node} is left out: the infrastructure ended {count} starts of {view.record.suite} there; "
        f"{_forgetting(view)} takes it back (with the rows, seeds, --set and --root of the launch)"
        for view in views
        for node, count in view.bad_nodes.items()
    ]


def _forgetting(view: SuiteView) -> str:
    """The command that lets the suite's jobs begin on any node again."""
    about = ("--scale", view.record.scale, "--dataset", view.record.dataset, "--on", view.profile)
    return shlex.join(["mpformer", "launch", view.record.suite, *about, "--forget-nodes"])


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
    return ("row", "seed", "state", "iteration", "loss", "ETA", primary, "Δ", "run", "job", "")


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
    """The difference of the numbers as shown, with its iteration where that is not the one of the score beside it."""
    shown = delta.as_shown(_DECIMALS)
    if shown is None:
        return ""
    return f"{shown:+.{_DECIMALS}f}{'' if delta.iteration == scored else f' @{delta.iteration}'}"
