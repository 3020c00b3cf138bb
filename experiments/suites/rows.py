"""Suites and their rows: what a table of the paper compares, as plain Python.

    @suite(title="Mask2Former against MP-Former", baseline="mask2former")
    def headline(scale, dataset):
        yield Row("mask2former", "Mask2Former", {"toggles.mp_queries": False})
        yield Row("mp-former", "MP-Former", {"toggles.mp_queries": True})

The function's name is the suite's name (``_`` becomes ``-``). A row's changes are dotted configuration keys applied to
the base configuration of the scale and dataset (:mod:`experiments.suites.scales`).
"""

import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from experiments.suites import scales
from mpformer.config import paper_settings
from mpformer.config.schema import Config
from mpformer.runtime.errors import UserError, choices

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
    baseline: str = ""
    """Name of the row that this one is compared with; empty: the suite's baseline; its own name: with none."""


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
    not_applicable: Mapping[str, str] | Callable[[str], str] = field(default_factory=dict)
    """Why the whole suite means nothing on a dataset: by its name, or a function of the name (empty: it applies)."""
    paper: tuple[str, ...] = (scales.ABLATIONS,)
    """Settings (:mod:`mpformer.config.paper_settings`) that the rows change at scale paper, one a dataset, the default
    one first."""
    mini_task: str = ""
    """Task at scale mini; empty: panoptic where the dataset has stuff, so that one model gives every score."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Configuration keys that all rows share, at every scale, on every dataset that the suite applies to."""

    def why_not(self, dataset: str) -> str:
        """Return why the whole suite means nothing on the dataset; empty: it applies."""
        why = self.not_applicable
        return why(dataset) if callable(why) else why.get(dataset, "")

    def datasets(self, scale: str) -> tuple[str, ...]:
        """Return the datasets of the suite at a scale, the default one first; raises UserError for unknown scales."""
        known = scales.datasets(scale)
        return tuple(name.partition("/")[0] for name in self.paper) if self._own_settings(scale) else known

    def _own_settings(self, scale: str) -> bool:
        """Whether it has settings of its own where others change that of the paper's ablations."""
        return scale == "paper" and self.paper != (scales.ABLATIONS,)

    def check_base(self, setting: str) -> None:
        """Raise UserError if the rows cannot change another setting of the paper."""
        if self._own_settings("paper"):
            raise UserError(f"suite {self.name!r} has settings of its own ({', '.join(self.paper)}), not {setting}")

    def check(self, scale: str, dataset: str | None) -> tuple[str, str]:
        """Return scale and dataset, the default filled in; raises UserError with the valid choices."""
        return scales.check(scale, dataset, self.datasets(scale))

    def base(self, scale: str, dataset: str) -> Config:
        """Return the configuration that the rows change."""
        if self._own_settings(scale):
            config = paper_settings.setting(self.paper[self.datasets(scale).index(dataset)])
        else:
            config = scales.base(scale, dataset)
        if self.why_not(dataset):
            return config
        task = self.mini_task if scale != "paper" else ""
        return config.replace({**(scales.task_changes(task) if task else {}), **self.settings})

    def rows(self, scale: str, dataset: str) -> tuple[Row, ...]:
        """Return the rows at a scale on a dataset; raises UserError if two of them share a name."""
        rows = self._made(scale, dataset)
        if why := self.why_not(dataset):
            rows = tuple(replace(row, not_applicable=why) for row in rows)
        names = [row.name for row in rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"suite {self.name!r} yields row {twice[0]!r} twice; give each row a name of its own")
        for name in (self.baseline, *(row.baseline for row in rows if row.baseline)):
            if name not in names:
                raise choices("baseline row", name, names)
        return rows

    def _made(self, scale: str, dataset: str) -> tuple[Row, ...]:
        """What the suite's function yields; it is anybody's code, and may raise anything."""
        try:
            rows = tuple(self.make(scale, dataset))
        except UserError:
            raise
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{line.filename}, line {line.lineno}"
            raise UserError(f"suite {self.name!r} yields no rows: {type(error).__name__}: {error} ({where})") from error
        wrong = [row for row in rows if not isinstance(row, Row)]
        if wrong:
            raise UserError(f"suite {self.name!r} yields {wrong[0]!r}, which is no Row")
        return rows


SUITES: dict[str, Suite] = {}
"""Every suite that was defined so far, by name; :mod:`experiments.suites.catalogue` sees that all of ours are."""


def suite(*, title: str, baseline: str, **fields: Any) -> Callable[[RowMaker], RowMaker]:
    """Register the decorated function, which yields rows for (scale, dataset), as a suite; see :class:`Suite`."""

    def register(make: RowMaker) -> RowMaker:
        name = make.__name__.replace("_", "-")
        if name in SUITES and SUITES[name].make.__module__ != make.__module__:
            raise UserError(f"suite {name!r} is already defined in {inspect.getfile(SUITES[name].make)}")
        description = " ".join((make.__doc__ or "").split())
        SUITES[name] = Suite(name=name, title=title, make=make, baseline=baseline, description=description, **fields)
        return make

    return register
