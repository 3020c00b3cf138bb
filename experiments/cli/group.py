"""The group that every command joins, and the commands that other packages add to it.

A package adds a command by an entry point in the group ``mpformer.commands``: its name is the command's, its value a
``click.Command``. The package ``reports`` of this project does, and so does a laboratory with a command of its own.
"""

import functools
import tomllib
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import click

from experiments.cli.console import warn
from experiments.cli.options import suites_option
from mpformer.runtime.code import ROOT
from mpformer.runtime.errors import UserError

ENTRY_POINTS = "mpformer.commands"

PROJECT = ROOT / "pyproject.toml"
"""Beside the packages in a checkout and in a snapshot of the code, where no metadata, or an older one, may be."""


class Commands(click.Group):
    """A group that looks among the entry points for the commands that it does not hold itself."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names; one that an entry point shares with a command of this group is named in a warning."""
        own, added = super().list_commands(ctx), entry_points()
        for name in sorted(added.keys() & set(own)):
            warn(f"the command {name!r} of {added[name].value} is left out: mpformer has one of this name")
        return sorted({*own, *added})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command; one that cannot be loaded says so where it is listed, and fails where it is called."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        point = entry_points().get(cmd_name)
        return None if point is None else _loaded(point)


@functools.cache
def entry_points() -> dict[str, metadata.EntryPoint]:
    """What the installed packages add, by name; this project's own entry points are read where its code is."""
    found = {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}
    return found | {point.name: point for point in _beside_the_code()}


def _beside_the_code() -> Iterator[metadata.EntryPoint]:
    if not PROJECT.is_file():
        return
    project = tomllib.loads(PROJECT.read_text())["project"]
    for name, value in project.get("entry-points", {}).get(ENTRY_POINTS, {}).items():
        yield metadata.EntryPoint(name, value, ENTRY_POINTS)


def _loaded(point: metadata.EntryPoint) -> click.Command:
    try:
        command = point.load()
    except Exception as error:  # somebody else's module may raise anything, and the other commands go on
        return _broken(point, f"{type(error).__name__}: {error}")
    if not isinstance(command, click.Command):
        return _broken(point, f"it is a {type(command).__name__}, not a click.Command")
    return command


def _broken(point: metadata.EntryPoint, reason: str) -> click.Command:
    of = f" of package {point.dist.name}" if point.dist is not None else ""
    line = f"the command {point.name!r}{of} ({point.value}) cannot be loaded: {reason}"

    def fail(_: Any) -> None:
        raise UserError(line)

    words = click.Argument(["_"], nargs=-1, type=click.UNPROCESSED)
    settings = {"ignore_unknown_options": True, "help_option_names": []}
    return click.Command(point.name, settings, fail, [words], short_help=line)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="mpformer")
@suites_option
def cli() -> None:
    """Reproduce, ablate and explain MP-Former: launch a named suite, read its tables.

    \b
    mpformer suites                  what there is
    mpformer launch headline         train, evaluate, analyse what is missing
    mpformer report headline         tables and figures beside the paper's numbers
    """
