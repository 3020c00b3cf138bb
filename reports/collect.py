"""Run store → :class:`reports.model.Table`. Works at any time, on a half-finished store too; never writes.

A number enters a mean only if its run is done for the suite's own evaluation setting and was not withdrawn; every
other planned seed is named with its reason. Deltas are paired by seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.status.states import State
from experiments.store.run_dir import Store
from experiments.store.suite_record import SuiteRecord, SuiteRow
from experiments.suites import catalogue
from experiments.suites.scales import suite_name
from mpformer.config.schema import WITHOUT_PILOTING, effective_toggles
from mpformer.runtime.errors import UserError, choices
from reports import caption, compare, definitions
from reports.model import Cell, Column, Footnote, Kind, SeedValue, Table, TableRow, TickColumn
from reports.runs import Reader, RunView, Standing

MIXED = "†"
_TICK_LABELS = {
    "mp_queries": "MP queries",
    "guided_layers": "guided layers",
    "point_noise": "point noise",
    "flip_noise": "flip noise",
    "mask_noise": "mask noise",
    "mp_groups": "groups",
    "query_position": "query position",
}


@dataclass(frozen=True)
class RowRuns:
    """A row of the suite's record with its runs, one a planned seed."""

    name: str
    label: str
    toggles: Mapping[str, Any]
    changes: Mapping[str, Any]
    views: tuple[RunView, ...]
    not_applicable: str = ""
    baseline: str = ""
    """Name of the row that this one is compared with; its own name: with none."""

    @property
    def done(self) -> tuple[RunView, ...]:
        """The runs whose numbers count."""
        return tuple(view for view in self.views if trusted(view))


@dataclass(frozen=True)
class SuiteReport:
    """A table with everything behind it."""

    record: SuiteRecord
    rows: tuple[RowRuns, ...]
    table: Table

    @property
    def views(self) -> list[RunView]:
        """Every run of the suite, in table order."""
        return [view for row in self.rows for view in row.views]

    @property
    def baseline(self) -> RowRuns | None:
        """The row that the others are compared with."""
        return next((row for row in self.rows if row.name == self.record.baseline), None)

    def baseline_of(self, row: RowRuns) -> RowRuns | None:
        """The row that ``row`` is compared with; None for a baseline itself."""
        return baseline_of(row, self.rows)


def baseline_of(row: RowRuns, rows: Sequence[RowRuns]) -> RowRuns | None:
    """The row of a table that ``row`` is compared with; None for a baseline itself."""
    return next((other for other in rows if other.name == row.baseline and other is not row), None)


def records(store: Store, suites: Sequence[str], scale: str, dataset: str | None) -> list[SuiteRecord]:
    """The launched suites' records asked for; no name means all, at every scale and on every dataset.

    Raises UserError for a suite that was never launched, listing those that were.
    """
    known = store.suite_records()
    if not suites:
        return known
    names = {suite_name(r.suite, r.scale, r.dataset): r for r in known}
    wanted = [suite_name(suite, scale, dataset or _own_dataset(suite, scale)) for suite in suites]
    if missing := [name for name in wanted if name not in names]:
        if not names:
            start = f"mpformer launch {suites[0]} --root {store.root}"
            raise UserError(f"no suite has been launched into {store.root}; start with: {start}")
        raise choices("launched suite", missing[0], names)
    return [names[name] for name in wanted]


def _own_dataset(suite: str, scale: str) -> str | None:
    """The dataset that a suite has at a scale unless another is asked for."""
    suites = catalogue.all_suites()
    return suites[suite].datasets(scale)[0] if suite in suites else None


def collect(
    record: SuiteRecord, reader: Reader, columns: Sequence[str] = (), decimals: int | None = None
) -> SuiteReport:
    """Build the table of one suite's record; ``columns`` and ``decimals`` override the suite's."""
    rows = _told_apart([_row_runs(row, reader, record) for row in record.rows])
    chosen = definitions.columns(list(columns or record.columns), decimals, record.dataset)
    grid = [[cell(row, column, record) for column in chosen] for row in rows]
    chosen, grid, left_out = _applying(chosen, grid, keep=columns or (record.primary,))
    grid = _with_deltas(rows, grid, chosen, record.primary)
    grid = _with_best(grid, chosen)
    ticks = tick_columns(rows) if record.ticks else ()
    named = [caption.preset(record, row.toggles, row.changes, config_of(row)) for row in rows]
    table_rows = [_table_row(row, cells, ticks, name) for row, cells, name in zip(rows, grid, named, strict=True)]
    return SuiteReport(record, rows, _table(record, rows, table_rows, chosen, ticks, left_out))


def config_of(row: RowRuns) -> Mapping[str, Any]:
    """The row's full configuration, of whichever seed was launched; empty if none was."""
    return next((view.config for view in row.views if view.config), {})


def _told_apart(rows: Sequence[RowRuns]) -> tuple[RowRuns, ...]:
    """The rows; those that share a label are called by their names too."""
    labels = [row.label for row in rows]
    return tuple(replace(r, label=f"{r.label} ({r.name})") if labels.count(r.label) > 1 else r for r in rows)


Grid = list[list[Cell]]


def _applying(
    columns: tuple[Column, ...], grid: Grid, keep: Sequence[str]
) -> tuple[tuple[Column, ...], Grid, list[str]]:
    """The columns that apply to some row, their cells, and why each of the others is left out (not those to keep)."""
    reasons = [{row[k].reason if row[k].short == _NOT_APPLICABLE else "" for row in grid} for k in range(len(columns))]
    kept = [k for k, c in enumerate(columns) if c.key in keep or len(reasons[k]) != 1 or "" in reasons[k]]
    left = [f"{columns[k].label}: {min(reasons[k])} (column left out)." for k in range(len(columns)) if k not in kept]
    return tuple(columns[k] for k in kept), [[row[k] for k in kept] for row in grid], left


_NOT_APPLICABLE = "n/a"


def _row_runs(row: SuiteRow, reader: Reader, record: SuiteRecord) -> RowRuns:
    settings, baseline = record.evaluations, row.baseline or record.baseline
    views = tuple(reader.view(run.seed, run.run_id, run.eval_id, settings.get(run.eval_id)) for run in row.runs)
    return RowRuns(row.name, row.label, row.toggles, row.changes, views, row.not_applicable, baseline)


def trusted(view: RunView) -> bool:
    """Whether the run's numbers count: done for this setting, of this identity scheme, not withdrawn."""
    return view.standing.state == "DONE" and not view.old_scheme


def number(view: RunView, key: str, result: Mapping[str, Any] | None) -> float | None:
    """A metric of a result (or a cost of the run); None if it does not have it."""
    if key == "hours":
        return view.trained.seconds / 3600 if view.trained.seconds is not None else None
    if key == "memory":
        return view.trained.peak_memory_bytes / 2**30 if view.trained.peak_memory_bytes else None
    if key == "iteration":
        seconds, iterations = view.trained.seconds, view.trained.iterations
        return seconds / iterations if seconds is not None and iterations else None
    if key in definitions.COSTS:
        value = (result or {}).get("costs", {}).get(key)
        return None if value is None else float(value)
    value = (result or {}).get("metrics", {}).get(key)
    if value is None and key in definitions.JUMPS and result is not None and result is view.result:
        return view.jump_rate(late=key == "jump-rate-late")  # evaluated before the metric was
    return None if value is None else float(value)


def cell(row: RowRuns, column: Column, record: SuiteRecord) -> Cell:
    """One cell without its delta: the mean over the runs that count, or what there is instead and why."""
    planned = len(row.views)
    if row.not_applicable or not planned:
        return _missing(row.not_applicable or "no run planned", _NOT_APPLICABLE, planned)
    reasons = record.not_applicable_columns
    if column.key in reasons:
        return _missing(f"does not apply: {reasons[column.key]}", _NOT_APPLICABLE, planned)
    values = tuple(_seed_values(row.done, column.key, lambda view: view.result))
    if row.done and not values:
        return _missing(_unmeasured(row, column), _NOT_APPLICABLE, planned)
    if not values:
        return _untrusted(row, column)
    whole = len(values) == planned
    flags = (MIXED,) if len({commit for view in row.done for commit in view.commits}) > 1 else ()
    reason = "" if whole else "; ".join(filter(None, (_why(row.views), _valueless(row, column))))
    short = "" if whole else f"{len(values)} of {planned} seeds"
    found = _value_cell(Kind.VALUE if whole else Kind.PARTIAL, values, planned, reason, short)
    low, high = compare.mean_interval([value.value for value in values], column.bounds)
    return replace(found, flags=flags, low=low, high=high)


def _unmeasured(row: RowRuns, column: Column) -> str:
    """Why runs that are done have no value: not in their results, or a mean over nothing."""
    if any(column.key in (view.result or {}).get("metrics", {}) for view in row.done):
        return f"{column.label} has no value: nothing is left to average over (such as mask pairs that are all empty)"
    return f"{column.label} was not measured"


def _valueless(row: RowRuns, column: Column) -> str:
    """Which seeds are done and yet have no value of this metric; empty if all have."""
    lacking = [view.seed for view in row.done if number(view, column.key, view.result) is None]
    if not lacking:
        return ""
    return f"{'seed' if len(lacking) == 1 else 'seeds'} {', '.join(map(str, lacking))}: {_unmeasured(row, column)}"


def _seed_values(views: Sequence[RunView], key: str, result: Any) -> list[SeedValue]:
    pairs = [(view, number(view, key, result(view))) for view in views]
    return [SeedValue(view.seed, view.run_id, value) for view, value in pairs if value is not None]


def _value_cell(kind: Kind, values: tuple[SeedValue, ...], planned: int, reason: str, short: str) -> Cell:
    mean, std = compare.mean_std([value.value for value in values])
    return Cell(kind, mean, std, len(values), planned, reason, short, values)


def _missing(reason: str, short: str, planned: int) -> Cell:
    return Cell(Kind.MISSING, planned=planned, reason=reason, short=short)


def _untrusted(row: RowRuns, column: Column) -> Cell:
    """No run counts: show a stale, void or probe number as such, else say what every seed waits for."""
    for kind, views, result, word in (
        (Kind.STALE, [v for v in row.views if _stale(v)], _stale_result, "stale"),
        (Kind.VOID, [v for v in row.views if v.void is not None], lambda v: v.result, "void"),
        (Kind.PARTIAL, [v for v in row.views if v.standing.state != "VOID"], _probe, "probe"),
    ):
        values = tuple(_seed_values(views, column.key, result))
        if values:
            found = [view for view in views if view.seed in {value.seed for value in values}]
            short, suffix = (
                _probed(found) if word == "probe" else ({"stale": _standing(found[0]).short}.get(word, word), "")
            )
            only = values[0].value if len(values) == 1 else None  # they enter no mean
            return Cell(kind, only, None, 0, len(row.views), _why(row.views) + suffix, short, values)
    standings = [_standing(view) for view in row.views]
    shorts = list(dict.fromkeys(standing.short for standing in standings))
    return _missing(_why(row.views), "; ".join(shorts), len(row.views))


def _probed(views: Sequence[RunView]) -> tuple[str, str]:
    """What a probe's number is, in short and in a clause: of few images, and of an iteration before the current one."""
    at = sorted({int(view.evaluations[-1].get("iteration", 0)) for view in views})
    whole = max(view.max_iter for view in views)
    short = f"probe {' … '.join(map(str, dict.fromkeys((at[0], at[-1]))))}" + (f"/{whole}" if whole else "")
    return short, f"; the number is a probe on a few images at iteration {', '.join(map(str, at))}"


def _stale(view: RunView) -> bool:
    if view.void is not None:
        return False
    return (view.old_scheme and view.result is not None) or (view.result is None and view.other_result is not None)


def _stale_result(view: RunView) -> Mapping[str, Any] | None:
    return view.result or view.other_result


def _probe(view: RunView) -> Mapping[str, Any] | None:
    return view.evaluations[-1] if view.evaluations else None


def _standing(view: RunView) -> Standing:
    if not _stale(view):
        return view.standing
    if view.old_scheme:
        return Standing("STALE", "stale: made with an older identity scheme", "stale")
    made = ", ".join(f"{_SETTINGS.get(key, key)} {value}" for key, value in view.outdated.items())
    return Standing("STALE", f"stale: made with {made or 'another evaluation setting'}", _stale_short(made))


_SETTINGS = {"object_mask_threshold": "threshold"}
"""Keys of the evaluation that have a short name."""


def _stale_short(made: str) -> str:
    return f"stale ({made})" if made else "stale"


def _why(views: Sequence[RunView]) -> str:
    """``seed 1: queued; seed 2: failed (…)``; seeds of one reason are named together."""
    seeds: dict[str, list[int]] = {}
    for view in views:
        if not trusted(view):
            seeds.setdefault(_standing(view).reason, []).append(view.seed)
    named = (("seed " if len(s) == 1 else "seeds ") + ", ".join(map(str, s)) + f": {r}" for r, s in seeds.items())
    return "; ".join(named)


def _with_deltas(
    rows: Sequence[RowRuns],
    grid: list[list[Cell]],
    columns: Sequence[Column],
    primary: str,
) -> list[list[Cell]]:
    """Deltas to each row's baseline; Holm over the non-baseline rows of the primary metric."""
    bases = {index: baseline_of(row, rows) for index, row in enumerate(rows)}
    plain = [list(cells) for cells in grid]
    others = [index for index, base in bases.items() if base is not None]
    for index in others:
        base = plain[rows.index(bases[index])]
        grid[index] = [_with_delta(*three) for three in zip(grid[index], base, columns, strict=True)]
    tested = [k for k, column in enumerate(columns) if column.key == primary]
    for k in tested:
        corrected = compare.holm({rows[i].name: d.p for i in others if (d := grid[i][k].delta) is not None})
        for i in others:
            grid[i][k] = _corrected(grid[i][k], corrected.get(rows[i].name))
    return grid


def _with_delta(mine: Cell, base: Cell, column: Column) -> Cell:
    if mine.n == 0 or base.n == 0:
        return mine
    return replace(mine, delta=compare.paired_delta(mine.values, base.values, column.difference_bounds))


def _corrected(cell: Cell, p_holm: float | None) -> Cell:
    return cell if cell.delta is None else replace(cell, delta=replace(cell.delta, p_holm=p_holm))


def _with_best(grid: list[list[Cell]], columns: Sequence[Column]) -> list[list[Cell]]:
    """Mark the best complete number of each column (ties as printed all count), unless all are equal."""
    for k, column in enumerate(columns):
        means = [c.mean for c in (row[k] for row in grid) if c.kind is Kind.VALUE and c.mean is not None]
        shown = {round(mean, column.decimals) for mean in means}
        if len(shown) < 2 or not column.direction:
            continue
        top = max(shown) if column.direction > 0 else min(shown)
        for row in grid:
            mine = row[k]
            if mine.kind is Kind.VALUE and mine.mean is not None and round(mine.mean, column.decimals) == top:
                row[k] = replace(mine, best=True)
    return grid


def tick_columns(rows: Sequence[RowRuns]) -> tuple[TickColumn, ...]:
    """The toggles that differ between the rows, piloting's own first."""
    settings = [effective_toggles(row.toggles) for row in rows if row.toggles]
    piloted = [toggles for toggles in settings if toggles["mp_queries"]]
    names = list(dict.fromkeys([*_TICK_LABELS, *(name for toggles in piloted for name in toggles)]))
    varying = [n for n in names if len({str(t[n]) for t in (settings if n in WITHOUT_PILOTING else piloted)}) > 1]
    return tuple(TickColumn(name, _TICK_LABELS.get(name, name.replace("_", " "))) for name in varying)


def tick(value: Any) -> str:
    """How a toggle's value is shown: yes, no, or the value itself."""
    if value is True:
        return "yes"
    if value is False or value is None or value == 0:
        return "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table_row(row: RowRuns, cells: list[Cell], ticks: Sequence[TickColumn], preset: str) -> TableRow:
    toggles = effective_toggles(row.toggles)
    shown = tuple(tick(toggles.get(column.key)) for column in ticks)
    probed = next((cell.reason for cell in cells if cell.kind is Kind.PARTIAL and cell.n == 0), "")
    note = row.not_applicable or probed or _why(row.views)
    return TableRow(row.name, row.label, tuple(cells), shown, row.baseline == row.name, preset, note)


def _table(
    record: SuiteRecord,
    rows: Sequence[RowRuns],
    table_rows: Sequence[TableRow],
    columns: tuple[Column, ...],
    ticks: tuple[TickColumn, ...],
    left_out: Sequence[str],
) -> Table:
    views = [view for row in rows for view in row.views]
    commits = sorted({commit.label for row in rows for view in row.done for commit in view.commits})
    table = Table(
        suite=record.suite,
        scale=record.scale,
        dataset=record.dataset,
        title=record.title,
        paper_table="" if record.paper_table.startswith("unknown") else record.paper_table,
        primary=record.primary,
        caption="",
        columns=columns,
        rows=tuple(table_rows),
        tick_columns=ticks,
        commits=tuple(commits),
        progress=_progress(views),
        trained=_trained(views),
        warnings=_warnings(commits),
    )
    notes = tuple(Footnote(text) for text in [*caption.footnotes(table), *left_out])
    return replace(table, caption=caption.caption(table, views, record), footnotes=notes)


def _warnings(commits: Sequence[str]) -> tuple[str, ...]:
    if len(commits) < 2:
        return ()
    return (
        f"† mixed commits: the numbers come from {len(commits)} versions of the code; † marks cells that average "
        f"over them.",
    )


def _progress(views: Sequence[RunView]) -> tuple[tuple[str, int], ...]:
    states = [view.standing.state for view in views]
    return tuple((state, states.count(state)) for state in State if state in states)


def _trained(views: Sequence[RunView]) -> tuple[tuple[str, float], ...]:
    """(state, share of all iterations): what is done counts whole, what is under way by its iterations, and what ended
    without a result whole too, for that is what it will take again.
    """
    shares: dict[str, float] = {}
    for view in views:
        whole = view.standing.state not in _UNDER_WAY
        share = 1.0 if whole else min(1.0, view.iteration / view.max_iter) if view.max_iter else 0.0
        shares[view.standing.state] = shares.get(view.standing.state, 0.0) + share
    return tuple((state, shares[state] / len(views)) for state in State if shares.get(state))


_UNDER_WAY = (State.RUNNING, State.REQUEUED, State.QUEUED, State.PLANNED)
