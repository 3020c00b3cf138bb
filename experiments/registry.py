"""Suites and their rows: what a table of the paper compares, as plain Python.

    @suite(title="Mask2Former against MP-Former", baseline="mask2former")
    def headline(scale, dataset):
        yield Row("mask2former", "Mask2Former", {"toggles.mp_queries": False})
        yield Row("mp-former", "MP-Former", {"toggles.mp_queries": True})

The function's name is the suite's name (``_`` becomes ``-``). A row's changes are dotted configuration keys applied to
the base configuration of the scale and dataset (:mod:`experiments.scales`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mpformer.errors import UserError, choices

RowMaker = Callable[[str, str], Iterable["Row"]]

COLUMNS = ("AP", "PQ", "mIoU", "mIoU-L", "Util")
SEEDS: Mapping[str, tuple[int, ...]] = MappingProxyType({"mini": (0, 1, 2), "paper": (0, 1, 2)})


@dataclass(frozen=True)
class Row:
    """One setting of the toggles. ``not_applicable`` says why the row means nothing on this dataset; empty: it does."""

    name: str
    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    not_applicable: str = ""
    seeds: tuple[int, ...] = ()
    """Seeds of this row alone; empty: the suite's."""


@dataclass(frozen=True)
class Suite:
    """A table or figure to reproduce. ``primary`` is the metric of the verdicts; ``ticks``: a component table."""

    name: str
    title: str
    make: RowMaker
    baseline: str
    paper_table: str = "unknown"
    columns: tuple[str, ...] = COLUMNS
    seeds: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: dict(SEEDS))
    primary: str = "AP"
    ticks: bool = False
    description: str = ""
    not_applicable: Mapping[str, str] = field(default_factory=dict)
    """Why the whole suite means nothing on a dataset, by dataset name."""

    def rows(self, scale: str, dataset: str) -> tuple[Row, ...]:
        """Return the rows at a scale on a dataset; raises UserError if two of them share a name."""
        rows = tuple(self.make(scale, dataset))
        names = [row.name for row in rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"suite {self.name!r} yields row {twice[0]!r} twice; give each row a name of its own")
        if self.baseline not in names:
            raise choices("baseline row", self.baseline, names)
        return rows

    def row(self, name: str, scale: str, dataset: str) -> Row:
        """Return the row called ``name``; raises UserError that lists the rows there are."""
        rows = {row.name: row for row in self.rows(scale, dataset)}
        if name not in rows:
            raise choices(f"row of suite {self.name!r}", name, rows)
        return rows[name]


_SUITES: dict[str, Suite] = {}


def suite(*, title: str, baseline: str, **fields: Any) -> Callable[[RowMaker], RowMaker]:
    """Register the decorated function, which yields rows for (scale, dataset), as a suite; see :class:`Suite`."""

    def register(make: RowMaker) -> RowMaker:
        name = make.__name__.replace("_", "-")
        if name in _SUITES and _SUITES[name].make.__module__ != make.__module__:
            raise UserError(f"suite {name!r} is already registered by {_SUITES[name].make.__module__}")
        description = " ".join((make.__doc__ or "").split())
        _SUITES[name] = Suite(name=name, title=title, make=make, baseline=baseline, description=description, **fields)
        return make

    return register


def all_suites() -> dict[str, Suite]:
    """Return the registered suites by name, in the order of definition."""
    import experiments.suites  # noqa: F401  (registers them)

    return dict(_SUITES)


def find(name: str) -> Suite:
    """Return one suite; raises UserError that lists the suites there are."""
    suites = all_suites()
    if name not in suites:
        raise choices("suite", name, suites)
    return suites[name]
