"""What commands print: JSON, warnings, progress."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.store.attempt_dir import Ending


def new_console() -> "Console":
    """Return what tables are printed on; when ``| head`` has closed the pipe the command goes on in silence."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            silence()

    return Quiet(highlight=False)


def silence() -> None:
    """Print nothing more: nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def print_json(content: Any) -> None:
    click.echo(json.dumps(content, indent=1))


def print_outcome(what: object, ending: "Ending") -> int:
    """Say how an attempt ended; returns the command's exit code."""
    click.echo(f"{what}: {ending.outcome} {ending.failure_class} {ending.detail}".rstrip())
    return {"failed": 1, "interrupted": 130}.get(ending.outcome, 0)


@contextlib.contextmanager
def progress_bar(console: "Console", title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, a few lines elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not console.is_terminal:
        yield _printed_progress(title, console.stderr)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _printed_progress(title: str, err: bool) -> Callable[[int, int], None]:
    shown = [-1]

    def show(done: int, total: int) -> None:
        quarter = 4 * done // max(total, 1)
        if quarter != shown[0]:
            shown[0] = quarter
            click.echo(f"{title}: {done}/{total}", err=err)

    return show


def warn(line: str) -> None:
    click.echo(f"mpformer: {line}", err=True)
