"""What a report is made of: tables, columns and cells, independent of any output format.

A :class:`Cell` is one number with the runs behind it, or the reason why there is none. Nothing here reads
files (:mod:`reports.collect`) or knows of an output format (:mod:`reports.render`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from experiments.suites.scales import suite_name


class Kind(StrEnum):
    """What a cell holds; no cell is ever blank."""

    VALUE = "value"  # every planned seed is done
    PARTIAL = "partial"  # seeds are missing, or the number is a probe of a run that still trains
    STALE = "stale"  # made with an older evaluation setting or identity scheme
    VOID = "void"  # withdrawn by a person, with a reason
    MISSING = "missing"  # no number: never launched, queued, failed, or the metric does not apply


@dataclass(frozen=True)
class Column:
    """One metric: ``direction`` is +1 where higher is better, -1 where lower is, 0 where neither is."""

    key: str
    label: str
    group: str
    definition: str
    unit: str = "%"
    decimals: int = 1
    direction: int = 1

    @property
    def bounds(self) -> tuple[float, float] | None:
        """What a value can be; None without bounds."""
        return (0.0, 100.0) if self.unit == "%" else None

    @property
    def difference_bounds(self) -> tuple[float, float] | None:
        """What a difference of two values can be; None without bounds."""
        return (-100.0, 100.0) if self.unit == "%" else None


@dataclass(frozen=True)
class SeedValue:
    """One run's number, in the unit of its column."""

    seed: int
    run_id: str
    value: float


@dataclass(frozen=True)
class Delta:
    """A row minus the table's baseline, paired by seed; ``n`` counts the pairs.

    ``low`` and ``high`` are the 95 % interval of the paired difference, ``p`` its two-sided paired t test and
    ``p_holm`` the same after Holm over the table's family; each is None where n does not allow it.
    """

    mean: float
    n: int
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class Cell:
    """One number of a table with everything that is needed to judge it.

    Only values of runs that count have a mean. What is stale, void or a probe (``n`` is 0) has its ``values``, and as
    ``mean`` the value itself if it is the only one.
    """

    kind: Kind
    mean: float | None = None
    std: float | None = None  # sample standard deviation (ddof 1); None where n < 3
    n: int = 0
    planned: int = 0
    reason: str = ""  # why it is not a plain value; empty for VALUE
    short: str = ""  # the reason in one or two words, for narrow formats
    values: tuple[SeedValue, ...] = ()
    low: float | None = None  # 95 % interval of the mean; None where n < 3
    high: float | None = None
    delta: Delta | None = None
    best: bool = False
    flags: tuple[str, ...] = ()  # "mixed commits", ...

    @property
    def has_number(self) -> bool:
        """Whether there is a number to print, trusted or not."""
        return bool(self.values)

    @property
    def value_kind(self) -> Kind:
        """What the seeds' numbers are: results each, also where seeds are missing and their mean is none."""
        return Kind.VALUE if self.n else self.kind


@dataclass(frozen=True)
class TickColumn:
    """One component of a component table, such as point noise."""

    key: str
    label: str


@dataclass(frozen=True)
class TableRow:
    """One setting of the toggles; ``ticks`` has one entry per tick column, ``cells`` one per column."""

    name: str
    label: str
    cells: tuple[Cell, ...]
    ticks: tuple[str, ...] = ()  # "yes", "no", or the setting as text
    baseline: bool = False
    preset: str = ""
    note: str = ""


@dataclass(frozen=True)
class Footnote:
    """A remark below the table; ``mark`` is empty for a general one."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Published:
    """A published number beside ours; ``verdict`` is one of analysis.statistics' words, or a direction."""

    row: str
    metric: str
    kind: str
    published: str
    ours: str
    difference: str
    verdict: str
    why: str
    where: str
    source: str
    how_sure: str
    name: str = ""  # of the row
    comparable: bool = False


@dataclass(frozen=True)
class Table:
    """One table of the paper at one scale on one dataset."""

    suite: str
    scale: str
    dataset: str
    title: str
    paper_table: str
    primary: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    tick_columns: tuple[TickColumn, ...] = ()
    footnotes: tuple[Footnote, ...] = ()
    commits: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()
    published_note: str = ""
    progress: tuple[tuple[str, int], ...] = ()  # (state, number of runs), in order of the life of a run
    trained: tuple[tuple[str, float], ...] = ()  # (state, its runs' share of all iterations), of what is begun
    warnings: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """``suite@scale`` with ``+dataset`` where it is not the scale's own, as in the record's file name."""
        return suite_name(self.suite, self.scale, self.dataset)

    @property
    def groups(self) -> tuple[tuple[str, int], ...]:
        """Headers over the columns: (label, number of columns), in order."""
        return grouped([column.group for column in self.columns])

    @property
    def published_in(self) -> dict[tuple[str, str], str]:
        """The published numbers that stand beside ours, by row and column: those that may be compared."""
        found: dict[tuple[str, str], dict[str, None]] = {}
        for item in self.published:
            if item.comparable:
                shown = f"Δ {item.published}" if item.kind == "delta" else item.published
                found.setdefault((item.name, item.metric), {})[shown] = None
        return {place: "; ".join(texts) for place, texts in found.items()}

    @property
    def published_columns(self) -> tuple[str, ...]:
        """The columns that have a column of published numbers beside them."""
        return tuple(c.key for c in self.columns if any(metric == c.key for _, metric in self.published_in))

    @property
    def groups_with_published(self) -> tuple[tuple[str, int], ...]:
        """As ``groups``, where published numbers stand in columns of their own."""
        labels = [c.group for c in self.columns for _ in range(1 + (c.key in self.published_columns))]
        return grouped(labels)

    @property
    def percent(self) -> float:
        """How much of all iterations is done, in percent."""
        return 100 * sum(share for state, share in self.trained if state in ("DONE", "TRAINED", "RUNNING", "REQUEUED"))

    @property
    def runs(self) -> int:
        """How many runs the table needs."""
        return sum(count for _, count in self.progress)

    @property
    def done(self) -> int:
        """How many of them are done."""
        return dict(self.progress).get("DONE", 0)


def grouped(labels: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Runs of equal labels: ``["a", "a", "b"]`` gives ``(("a", 2), ("b", 1))``."""
    spans: list[tuple[str, int]] = []
    for label in labels:
        if spans and spans[-1][0] == label:
            spans[-1] = (label, spans[-1][1] + 1)
        else:
            spans.append((label, 1))
    return tuple(spans)
