"""What to do about a place that cannot be written: the line names the file and the option that chose its place."""

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from mpformer.runtime.disk import FULL

_DEFAULTS = (("--root", "MPFORMER_ROOT", "store"), ("--data-root", "DETECTRON2_DATASETS", "datasets"))
_OPTIONS = ("--out", "--masks", "--root", "--data-root")


def line(error: OSError, words: Sequence[str]) -> str:
    """Return one line about an error of the disk, for a command of these words.

    A file system that is full need not name the file: it is then the option whose place has least room left.
    """
    places = _places(words)
    file = error.filename2 or error.filename
    if file is None:
        option, place = min(places, key=lambda each: _free(each[1]))
        what = f"into {place}"
    else:
        option = next((name for name, place in places if _inside(Path(os.fsdecode(file)), place)), "--root")
        what = os.fsdecode(file)
    return f"cannot write {what}: {error.strerror}; {_advice(error, option)}"


def _advice(error: OSError, option: str) -> str:
    if error.errno in FULL:
        return f"free some space there, or choose another place with {option}"
    return f"choose a place that can be written with {option}"


def _places(words: Sequence[str]) -> list[tuple[str, Path]]:
    """The options that name where a command writes, with their values, those that were given first."""
    given = [(name, value) for name, value in itertools.pairwise(words) if name in _OPTIONS]
    pairs = (word.partition("=") for word in words)
    given += [(name, value) for name, equals, value in pairs if equals and name in _OPTIONS]
    rest = [(name, os.environ.get(variable) or default) for name, variable, default in _DEFAULTS]
    return [(name, Path(value)) for name, value in (*given, *rest)]


def _inside(file: Path, place: Path) -> bool:
    return file.absolute().is_relative_to(place.absolute())


def _free(place: Path) -> int:
    there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
