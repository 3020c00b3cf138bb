"""What to do about a file that cannot be written: the line names it and the option that chose its folder."""

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

    A file system that is full need not name the file: it is then the option whose folder has least room left.
    """
    folders = _folders(words)
    file = error.filename2 or error.filename
    if file is None:
        option, folder = min(folders, key=lambda each: _free(each[1]))
        what = f"into {folder}"
    else:
        option = next((name for name, folder in folders if _inside(Path(os.fsdecode(file)), folder)), "--root")
        what = os.fsdecode(file)
    return f"cannot write {what}: {error.strerror}; {_advice(error, option)}"


def _advice(error: OSError, option: str) -> str:
    if error.errno in FULL:
        return f"free some space there, or choose another folder with {option}"
    return f"choose a folder that can be written with {option}"


def _folders(words: Sequence[str]) -> list[tuple[str, Path]]:
    """The options that name where a command writes, with their values, those that were given first."""
    given = [(name, value) for name, value in itertools.pairwise(words) if name in _OPTIONS]
    pairs = (word.partition("=") for word in words)
    given += [(name, value) for name, equals, value in pairs if equals and name in _OPTIONS]
    rest = [(name, os.environ.get(variable) or default) for name, variable, default in _DEFAULTS]
    return [(name, Path(value)) for name, value in (*given, *rest)]


def _inside(file: Path, folder: Path) -> bool:
    return file.absolute().is_relative_to(folder.absolute())


def _free(folder: Path) -> int:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
