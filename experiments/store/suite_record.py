"""``suites/<suite>@<scale>.json``: which rows and runs a suite's launches resolved to."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from experiments.store.records import Record


@dataclass(frozen=True)
class SuiteRun:
    """One seed of a row."""

    seed: int
    run_id: str
    eval_id: str


@dataclass(frozen=True)
class SuiteRow:
    """One row of a suite, as it was launched."""

    name: str
    label: str = ""
    toggles: Mapping[str, Any] = field(default_factory=dict)
    """The resolved toggles."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Configuration keys that the row changes."""
    not_applicable: str = ""
    """Why the row means nothing on this dataset; empty: it does."""
    baseline: str = ""
    """Row that it is compared with; empty: the suite's baseline."""
    runs: tuple[SuiteRun, ...] = ()

    def with_runs_of(self, earlier: "SuiteRow") -> "SuiteRow":
        """Return it with the runs of an earlier launch for seeds that it lacks, in the order of seeds."""
        runs = {run.seed: run for run in (*earlier.runs, *self.runs)}
        return replace(self, runs=tuple(runs[seed] for seed in sorted(runs)))


@dataclass(frozen=True)
class SuiteRecord(Record):
    """A suite at a scale on a dataset, as it was launched last."""

    remedy: ClassVar[str] = "launch the suite again to rewrite it"

    suite: str
    scale: str
    dataset: str
    rows: tuple[SuiteRow, ...]
    title: str = ""
    paper_table: str = "unknown"
    baseline: str = ""
    columns: tuple[str, ...] = ()
    not_applicable_columns: Mapping[str, str] = field(default_factory=dict)
    """Columns that apply to no row, with the reason."""
    primary: str = ""
    """Metric of the verdicts."""
    ticks: bool = False
    """Whether the table shows the toggles as ticks."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Configuration keys that the launch changed in every row."""
    setting: str = ""
    """Canonical text of the overrides, the data and the base: launches with another one replace the record."""
    base: str = ""
    """Setting of the paper that the launch asked for; empty: the suite's."""
    created: float = 0.0
    command: str = ""
    evaluations: Mapping[str, Any] = field(default_factory=dict)
    """The evaluation settings of its runs, by evaluation id."""
    data_root: str = ""
    """Where the launch found its data."""
    registration: Mapping[str, Any] = field(default_factory=dict)
    """What `mpformer data add` recorded of the dataset, if it is one of the user's own."""
    file: str = ""
    """Path in the store of the suites file that defines the suite; empty: this project does."""
    package: str = ""
    """Package that the suites file comes with; empty: it was a file of its own."""

    def runs(self) -> Iterator[tuple[SuiteRow, SuiteRun]]:
        """Yield every run with its row, in table order."""
        return ((row, run) for row in self.rows for run in row.runs)

    def with_rows_of(self, earlier: "SuiteRecord") -> "SuiteRecord":
        """Return it with the seeds and rows that only an earlier record of the same setting has."""
        old = {row.name: row for row in earlier.rows}
        rows = [row.with_runs_of(old.pop(row.name)) if row.name in old else row for row in self.rows]
        return replace(self, rows=(*rows, *old.values()), evaluations={**earlier.evaluations, **self.evaluations})
