"""All suites: this project's, those of suites files, and those of installed packages.

A *suites file* is a Python file with suites of one's own (``--suites FILE``, or the environment's ``MPFORMER_SUITES``).
A package adds suites by an entry point in the group ``mpformer.suites`` whose value is the module that defines them.
Of two suites of one name, the one of ``--suites`` counts before that of the environment, then that of a package, then
what a store recorded; this project's own names cannot be taken.
"""

import contextlib
import functools
import hashlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from experiments.store.run_dir import Store
from experiments.suites import (
    ablations,  # noqa: F401  (importing defines its suites)
    paper_tables,  # noqa: F401
    scales,
)
from experiments.suites.rows import SUITES, Suite
from mpformer.runtime.errors import UserError, choices

ENTRY_POINTS = "mpformer.suites"
ENVIRONMENT = "MPFORMER_SUITES"
"""Paths of suites files, separated as those of ``PATH`` are."""


@dataclass(frozen=True)
class Source:
    """A file that defines suites, with what it said when it was read."""

    name: str
    text: str
    package: str = ""
    """Distribution and version that it comes with; empty: it is a file of its own."""


_SOURCES: dict[str, Source] = {}
"""Files that were read, by the name of the module that each became."""

_BROKEN: list[str] = []
"""Packages whose suites could not be loaded, one line each."""


def all_suites() -> dict[str, Suite]:
    """Return the suites by name, in the order of definition; raises UserError for a broken file of the environment."""
    _load_others()
    return dict(SUITES)


def find(name: str) -> Suite:
    """Return one suite; raises UserError that lists the suites there are."""
    suites = all_suites()
    if name not in suites:
        raise UserError("; ".join([str(choices("suite", name, suites)), *_BROKEN]))
    return suites[name]


def of_dataset(scale: str, dataset: str | None) -> list[Suite]:
    """Return the suites that have the dataset at a scale, all for None; raises UserError with the valid choices."""
    suites = list(all_suites().values())
    found = [suite for suite in suites if dataset is None or dataset in suite.datasets(scale)]
    if not found:
        known = dict.fromkeys(name for suite in suites for name in suite.datasets(scale))
        raise choices(f"dataset at scale {scale!r}", str(dataset), known)
    return found


def check(name: str, scale: str, dataset: str | None) -> tuple[str, str]:
    """Return scale and dataset of a suite, the default filled in; raises UserError with the valid choices.

    A suite that this version does not have any more, but that was launched once, has the scale's default dataset.
    """
    suites = all_suites()
    return suites[name].check(scale, dataset) if name in suites else scales.check(scale, dataset)


def broken() -> tuple[str, ...]:
    """Return a line for each package whose suites cannot be loaded."""
    _load_others()
    return tuple(_BROKEN)


def source(suite: Suite) -> Source | None:
    """Return the file that defines a suite; None for this project's own."""
    return _SOURCES.get(suite.make.__module__)


def add_file(path: Path) -> None:
    """Define the suites of a file, once; raises UserError if it is not there, fails, or defines none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read suites file {path}: {getattr(error, 'strerror', None) or error}") from None
    name = f"suites_of_file_{hashlib.sha256(text.encode()).hexdigest()}"
    if name in _SOURCES:
        return
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    _SOURCES[name] = Source(path.name, text)
    known = set(SUITES)
    try:
        _execute(text, path, module)
        if not set(SUITES) - known:
            raise UserError(f"suites file {path} defines no suite: docs/suites.md shows how")
    except BaseException:
        _forget(name)
        raise


def _execute(text: str, path: Path, module: ModuleType) -> None:
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except UserError as error:
        raise UserError(f"suites file {path}: {error}") from None
    except Exception as error:  # somebody's code may raise anything
        raise UserError(f"suites file {path} fails{_line(error, path)}: {type(error).__name__}: {error}") from None


def _line(error: Exception, path: Path) -> str:
    """Where in the file it went wrong."""
    if isinstance(error, SyntaxError):
        return ""  # its message says it
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" in line {lines[-1]}" if lines else ""


def _forget(module: str) -> None:
    sys.modules.pop(module, None)
    _SOURCES.pop(module, None)
    for name in [name for name, suite in SUITES.items() if suite.make.__module__ == module]:
        del SUITES[name]


def recall(store: Store, name: str, scale: str, dataset: str | None) -> None:
    """Define a suite that is not known here from the file that its launch into the store recorded, if it did."""
    if name in all_suites():
        return
    found = [record for record in store.suite_records() if record.suite == name and record.file]
    here = [record for record in found if record.scale == scale and dataset in (None, record.dataset)]
    for record in (here or found)[:1]:
        with _behind_the_others():
            add_file(store.root / record.file)


@functools.cache
def _load_others() -> None:
    """Define what the environment's files and the installed packages add."""
    with _behind_the_others():
        for path in filter(None, os.environ.get(ENVIRONMENT, "").split(os.pathsep)):
            add_file(Path(path))
    with _behind_the_others():
        for point in metadata.entry_points(group=ENTRY_POINTS):
            _load(point)


@contextlib.contextmanager
def _behind_the_others() -> Iterator[None]:
    """Let the block define suites whose names others than this project's have; those count, and its own do not."""
    others = {name: suite for name, suite in SUITES.items() if source(suite) is not None}
    for name in others:
        del SUITES[name]
    try:
        yield
    finally:
        SUITES.update(others)


def _load(point: metadata.EntryPoint) -> None:
    """Define a package's suites; one that fails leaves a line, and the other suites are there."""
    known = set(SUITES)
    try:
        point.load()
        for name in set(SUITES) - known:
            module = SUITES[name].make.__module__
            text = inspect.getsource(sys.modules[module])
            _SOURCES[module] = Source(f"{module.rpartition('.')[2]}.py", text, _package(point))
    except Exception as error:  # somebody else's module may raise anything
        _BROKEN.append(f"suites of {_package(point)} ({point.value}) cannot be loaded: {type(error).__name__}: {error}")


def _package(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.name
