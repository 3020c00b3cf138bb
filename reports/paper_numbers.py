"""Published numbers (``paper_numbers.csv``) beside ours, with the verdicts of :mod:`analysis.statistics`.

The file is meant to be extended with a text editor: one number a line, columns

- ``table``, ``page``, ``dataset`` (coco, ade20k, cityscapes), ``task``, ``backbone`` (R50, Swin-L …), ``schedule``
  (50ep, 90k …), ``row`` (a row's name or label, or Mask2Former or MP-Former),
- ``metric`` (as in our tables; ``any`` for a claim), ``variant`` (empty, or how the number was made), ``kind``
  (``value``, ``delta`` of the row to Mask2Former, ``claim`` in words, or ``suite``: the line says which of our suites
  the table is, and reports number that suite), ``value`` (of a ``suite`` line the suite's name), ``tolerance`` (needed
  for a verdict),
- ``source``, ``how_sure``, ``notes``.

What is not known is written ``not stated`` or ``not available``; what is not in the file is not available, and no
report fills it in.
"""

import csv
import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from analysis import statistics
from experiments.suites import catalogue
from experiments.suites.rows import Row, Suite
from mpformer.config.dotted import leaves
from mpformer.config.paper_settings import BACKBONES
from mpformer.config.schema import effective_toggles
from mpformer.runtime.errors import UserError
from reports import caption, definitions, text
from reports.collect import RowRuns, SuiteReport, config_of
from reports.compare import by_seed
from reports.model import Cell, Column, Published

FILE = Path(__file__).with_name("paper_numbers.csv")
KINDS = ("value", "delta", "claim", "suite")
NOT_STATED = ("not stated", "not available")
COMPARABLE_VARIANTS = ("", "mean of 3 runs", "as reported")
_IMAGES = {"coco": 118287}
_IN_SUITES = ("coco", "ade20k", "cityscapes")
_TASKS = ("instance", "panoptic", "semantic", *NOT_STATED)


@dataclass(frozen=True)
class Number:
    """One line of the file; ``value`` is None for a claim or a suite, whose words are in ``words``."""

    line: int
    table: str
    page: str
    dataset: str
    task: str
    backbone: str
    schedule: str
    row: str
    metric: str
    variant: str
    kind: str
    value: float | None
    words: str
    tolerance: float | None
    source: str
    how_sure: str
    notes: str

    @property
    def summary(self) -> str:
        """Where it stands, what it is of, and the number."""
        shown = self.words if self.value is None else f"{self.value:g}"
        place = f"{self.table}, {self.row}, {self.dataset} {self.task}, {self.backbone}, {self.schedule}"
        return f"{place}, {self.metric} ({self.kind}): {shown}"

    @property
    def where(self) -> str:
        """Table, page if known, and what the number is of."""
        page = "" if self.page in NOT_STATED else f", page {self.page}"
        parts = [
            f"{self.table}{page}",
            self.dataset,
            self.task,
            self.backbone,
            f"schedule {self.schedule}",
            self.variant,
            self.notes,
        ]
        return "; ".join(part for part in parts if part)


FIELDS = tuple(name for name in Number.__dataclass_fields__ if name not in ("line", "words"))


@cache
def read(path: Path = FILE) -> tuple[Number, ...]:
    """The file's numbers; raises UserError with one line that names file, line and fix."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header = tuple(reader.fieldnames or ())
            if header != FIELDS:
                raise UserError(f"{path}: the header must be: {','.join(FIELDS)} (it is: {','.join(header)})")
            return tuple(_number(line, reader.line_num, path) for line in reader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the published numbers: {path}: {error}") from error


def _number(fields: Mapping[str | None, Any], line: int, path: Path) -> Number:
    where = f"{path.name}, line {line}"
    if None in fields or None in fields.values():
        raise UserError(f"{where}: needs {len(FIELDS)} fields; quote a field that has a comma")
    known = {str(key): str(value).strip() for key, value in fields.items()}
    for key, valid in (("kind", KINDS), ("task", _TASKS)):
        if known[key] not in valid:
            raise UserError(f"{where}: unknown {key} {known[key]!r}; valid: {', '.join(valid)}")
    if missing := [key for key in ("table", "row", "metric", "value", "source", "how_sure") if not known[key]]:
        raise UserError(f"{where}: {missing[0]} is empty; write `not stated` if it is not known")
    claim = known["kind"] in ("claim", "suite")
    value = None if claim else _float(known["value"], "value", where)
    tolerance = _float(known["tolerance"], "tolerance", where) if known["tolerance"] else None
    if tolerance is not None and tolerance < 0:
        raise UserError(f"{where}: tolerance {tolerance:g} is negative")
    plain = {key: known[key] for key in FIELDS if key not in ("value", "tolerance")}
    return Number(line=line, value=value, words=known["value"] if claim else "", tolerance=tolerance, **plain)


def _float(given: str, key: str, where: str) -> float:
    try:
        number = float(given.replace(text.MINUS, "-"))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {key} {given!r} is not a number")
    return number


@dataclass(frozen=True)
class Setting:
    """What must agree before two numbers are compared."""

    scale: str
    dataset: str
    task: str
    backbone: str
    schedule: str


def setting(report: SuiteReport, config: Mapping[str, Any]) -> Setting:
    """The setting of a row, from its full configuration."""
    if not config:
        return Setting(report.table.scale, report.table.dataset, "", "", "")
    return _setting(report.table.scale, config)


def _setting(scale: str, config: Mapping[str, Any]) -> Setting:
    dataset = config["dataset"]
    schedule = schedule_name(dataset["name"], config["schedule"])
    return Setting(scale, dataset["name"], dataset["task"], caption.backbone(config["model"]["backbone"]), schedule)


def schedule_name(dataset: str, schedule: Mapping[str, Any]) -> str:
    """``50ep`` where epochs are the custom (COCO), else thousands of iterations, such as ``90k``."""
    iterations = schedule["max_iter"]
    if dataset in _IMAGES:
        return f"{round(iterations * schedule['batch_size'] / _IMAGES[dataset])}ep"
    return f"{iterations / 1000:g}k"


def beside(report: SuiteReport, numbers: Sequence[Number]) -> tuple[tuple[Published, ...], str]:
    """The published numbers that concern this table, each with its verdict, and a sentence about them."""
    if report.table.scale != "paper":
        return _directions(report, numbers)
    found = [
        _compare(report, row, number) for row in report.rows for number in numbers if _concerns(report, row, number)
    ]
    found.sort(key=lambda item: not item.comparable)
    note = "Ours against published numbers: *within*, *outside* and *underpowered* by the 95 % interval over seeds."
    none = (
        "No published number of this table's setting is available; the published columns stay empty rather than "
        "guessed."
    )
    return tuple(found), note.replace("*", "") if found else none


def family(toggles: Mapping[str, Any], changes: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Which published method a row is by what it sets: Mask2Former, MP-Former, or neither."""
    return _FAMILIES.get(caption.preset_toggles(toggles, changes), "")


_FAMILIES = {"mask2former": "Mask2Former", "mp-former/paper": "MP-Former", "mp-former/release": "MP-Former"}


def _is_row(row: RowRuns, number: Number) -> bool:
    return number.row.casefold() in _names(row, row.toggles)


def _names(row: RowRuns | Row, toggles: Mapping[str, Any]) -> set[str]:
    """What a line may call a row: its name, its label, or the method that it is."""
    return {row.name.casefold(), row.label.casefold(), family(toggles, row.changes).casefold()} - {""}


def _concerns(report: SuiteReport, row: RowRuns, number: Number) -> bool:
    """Whether a number is about this row at all: same row, dataset and task, and a column of the table."""
    ours = setting(report, config_of(row))
    return _is_row(row, number) and _same_cell(ours, number, {column.key for column in report.table.columns})


def _same_cell(ours: Setting, number: Number, columns: Collection[str]) -> bool:
    same = number.dataset == ours.dataset and number.task in (ours.task, *NOT_STATED)
    return same and number.kind != "suite" and (number.metric == "any" or number.metric in columns)


def difference_of_settings(ours: Setting, number: Number) -> str:
    """Why the two must not be compared; empty if they may.

    What the source does not state counts as different for a value. For a difference between two rows the schedule
    alone may be unstated: both of our rows share ours.
    """
    reasons = []
    for key in ("task", "backbone", "schedule"):
        published, mine = getattr(number, key), getattr(ours, key)
        unstated = published in NOT_STATED
        if (unstated and not (number.kind == "delta" and key == "schedule")) or (not unstated and published != mine):
            reasons.append(f"{key} {published}, ours {mine or 'unknown'}")
    if number.variant not in COMPARABLE_VARIANTS:
        reasons.append(number.variant)
    return "; ".join(reasons)


def difference_of_kinds(report: SuiteReport, row: RowRuns) -> str:
    """Why a row's difference is not one that piloting makes to Mask2Former of the same setting; empty if it is.

    A published difference is one between MP-Former and Mask2Former: it says nothing of a row whose baseline is
    something else, or differs in anything but piloting (its data, model, schedule, evaluation or query positions).
    """
    baseline = report.baseline_of(row)
    ours, theirs = config_of(row), config_of(baseline) if baseline is not None else {}
    if baseline is None or not ours or not theirs:
        return ""
    if theirs["toggles"].get("mp_queries"):
        return f"ours is the difference to {baseline.name}, which is not Mask2Former"
    mine, base = (dict(leaves(_without_piloting(config))) for config in (ours, theirs))
    differing = [key for key in mine.keys() & base.keys() if mine[key] != base[key] and key not in _NOT_SETTING]
    more = "" if len(differing) < 4 else ", …"
    named = ", ".join(sorted(differing)[:3]) + more
    return f"ours is a difference in {named} too" if differing else ""


_NOT_SETTING = ("model.init_weights",)
"""A path; what counts of the initial weights is their checksum."""


def _without_piloting(config: Mapping[str, Any]) -> dict[str, Any]:
    """What two rows must share: everything but piloting, the seed, and what cannot change a result."""
    shared = {key: config[key] for key in ("dataset", "model", "schedule", "evaluation") if key in config}
    return {**shared, "toggles": effective_toggles({**config["toggles"], "mp_queries": False})}


def _compare(report: SuiteReport, row: RowRuns, number: Number) -> Published:
    if number.value is None:
        return _published(number, row, number.words, "—", "—", "claim", "in words only: nothing to compute")
    cell, column = _cell(report, row, number.metric)
    values = _ours(report, row, cell, column, number.kind)
    kinds = difference_of_kinds(report, row) if number.kind == "delta" else ""
    why = "; ".join(part for part in (kinds, difference_of_settings(setting(report, config_of(row)), number)) if part)
    if not values:
        found = _published(number, row, _shown(number, column), "—", "—", "no number of ours", cell.reason)
        return replace(found, comparable=not why)
    bounds = column.difference_bounds if number.kind == "delta" else column.bounds
    verdict = statistics.verdict(values, number.value, number.tolerance, not_comparable=why, bounds=bounds)
    mean = sum(values) / len(values)
    caveat = _caveat(report, row, number) if verdict.kind != "not comparable" else ""
    difference = "—" if verdict.kind == "not comparable" else text.signed(mean - number.value, column.decimals)
    ours = text.signed(mean, column.decimals) if number.kind == "delta" else text.number(mean, column.decimals)
    reason = "; ".join(part for part in (verdict.reason, caveat) if part)
    found = _published(
        number, row, _shown(number, column), f"{ours} (n = {len(values)})", difference, verdict.kind, reason
    )
    return replace(found, comparable=not why)


def _caveat(report: SuiteReport, row: RowRuns, number: Number) -> str:
    if number.schedule not in NOT_STATED:
        return ""
    return f"the source does not state its schedule; ours is {setting(report, config_of(row)).schedule}"


def _cell(report: SuiteReport, row: RowRuns, metric: str) -> tuple[Cell, Column]:
    index = next(i for i, column in enumerate(report.table.columns) if column.key == metric)
    return report.table.rows[report.rows.index(row)].cells[index], report.table.columns[index]


def _ours(report: SuiteReport, row: RowRuns, cell: Cell, column: Column, kind: str) -> list[float]:
    """The values (or paired differences to the baseline row) that a published number is held against."""
    mine = by_seed(cell.values) if cell.n else {}
    if kind != "delta":
        return list(mine.values())
    baseline = report.baseline_of(row)
    if baseline is None:
        return []
    base = by_seed(_cell(report, baseline, column.key)[0].values)
    return [mine[seed] - base[seed] for seed in mine if seed in base]


def _shown(number: Number, column: Column) -> str:
    assert number.value is not None
    decimals = max(column.decimals, len(f"{number.value:g}".partition(".")[2]))
    return text.signed(number.value, decimals) if number.kind == "delta" else text.number(number.value, decimals)


def _published(
    number: Number, row: RowRuns, shown: str, ours: str, difference: str, verdict: str, why: str
) -> Published:
    return Published(
        row.label,
        number.metric,
        number.kind,
        shown,
        ours,
        difference,
        verdict,
        why,
        number.where,
        number.source,
        number.how_sure,
        row.name,
    )


def _directions(report: SuiteReport, numbers: Sequence[Number]) -> tuple[tuple[Published, ...], str]:
    """At another scale than the paper's: published differences, compared in their direction and nothing else."""
    keys = {column.key for column in report.table.columns}
    deltas = [n for n in numbers if n.kind == "delta" and n.metric in keys]
    found = [
        _direction(report, row, n)
        for row in report.rows
        for n in deltas
        if report.baseline_of(row) is not None and _is_row(row, n)
    ]
    note = (
        f"Scale {report.table.scale} is not the paper's setting: no number here is compared with a published one. "
        f"Published differences "
        "are listed for their direction only."
    )
    none = (
        f"Scale {report.table.scale} is not the paper's setting, and no published difference concerns this table's "
        f"rows and columns."
    )
    return tuple(found), note if found else none


def _direction(report: SuiteReport, row: RowRuns, number: Number) -> Published:
    cell, column = _cell(report, row, number.metric)
    shown = _shown(number, column)
    if cell.delta is None or number.value is None:
        return _published(number, row, shown, "—", "—", "no number of ours", cell.reason)
    mean, low, high = cell.delta.mean, cell.delta.low, cell.delta.high
    same = _sign(round(mean, column.decimals) * number.value)
    certain = low is not None and high is not None and low * high > 0
    why = "" if certain else f"the interval includes 0 or n < {statistics.MIN_SEEDS}: not established"
    ours = f"{text.signed(mean, column.decimals)} (n = {cell.delta.n})"
    if other := difference_of_kinds(report, row):
        return _published(number, row, shown, ours, "—", "not comparable", other)
    return _published(number, row, shown, ours, "—", f"{same} (direction only)", why)


def _sign(product: float) -> str:
    """What the product of our difference and the published one says."""
    return "no difference" if product == 0 else "same direction" if product > 0 else "opposite direction"


def outside(tables: Sequence[tuple[str, Sequence[Published]]]) -> list[str]:
    """One line for each number that is outside the tolerance of its published one."""
    return [
        f"{name}: {item.row}, {item.metric} ({item.kind}): ours {item.ours}, published {item.published}: {item.why}"
        for name, published in tables
        for item in published
        if item.verdict == "outside"
    ]


# ------------------------------------------------------------------ which lines meet which suites


@dataclass(frozen=True)
class PaperRow:
    """A row of a suite at the paper's scale: where a line of the file may belong."""

    suite: str
    names: frozenset[str]
    setting: Setting
    columns: frozenset[str]


def number_of(suite: str, numbers: Sequence[Number]) -> str:
    """The paper's table that a suite is, if the file says so (in a line of kind ``suite``), else an empty string."""
    return ", ".join(dict.fromkeys(n.table for n in numbers if n.kind == "suite" and n.words == suite))


def paper_rows() -> list[PaperRow]:
    """Every row of every suite, on each dataset that the suite has at the paper's scale."""
    suites = catalogue.all_suites().values()
    return [one for suite in suites for dataset in suite.datasets("paper") for one in _paper_rows(suite, dataset)]


def _paper_rows(suite: Suite, dataset: str) -> list[PaperRow]:
    base = suite.base("paper", dataset)
    found = []
    for row in suite.rows("paper", dataset):
        if not row.not_applicable:
            config = base.replace(dict(row.changes)).model_dump(mode="json")
            names = frozenset(_names(row, config["toggles"]))
            found.append(PaperRow(suite.name, names, _setting("paper", config), frozenset(suite.columns)))
    return found


def meeting(number: Number, known: Sequence[PaperRow]) -> list[str]:
    """The suites that have a row, dataset, task, column and setting of a line, each with what may differ."""
    if number.kind == "suite":
        return [number.words] if number.words in catalogue.all_suites() else []
    found: dict[str, str] = {}
    for one in known:
        if number.row.casefold() in one.names and _same_cell(one.setting, number, one.columns):
            differs = difference_of_settings(one.setting, number)
            found[one.suite] = "" if found.get(one.suite) == "" else differs
    return [name + (f" (not comparable: {why})" if why else "") for name, why in found.items()]


def misnamed(number: Number, known: Sequence[PaperRow]) -> str:
    """Which name of a line is none that any suite has, with the nearest ones; empty if all are known."""
    words = {
        "dataset": {one.setting.dataset for one in known},
        "backbone": _backbones(),
        "row": {name for one in known for name in one.names},
    }
    given = {"dataset": number.dataset, "backbone": number.backbone, "row": number.row.casefold()}
    if number.kind == "suite":
        words, given = {"suite": set(catalogue.all_suites())}, {"suite": number.words}
    for kind, name in given.items():
        if name not in words[kind]:
            near = difflib.get_close_matches(name, sorted(words[kind]), cutoff=0.4) or sorted(words[kind])[:5]
            return f"unknown {'row or method' if kind == 'row' else kind} {name!r}; nearest: {', '.join(near)}"
    return ""


@cache
def _backbones() -> frozenset[str]:
    return frozenset({caption.backbone(known.config.model_dump()) for known in BACKBONES.values()} | set(NOT_STATED))


def warnings(numbers: Sequence[Number]) -> list[str]:
    """A line for each number whose dataset, backbone, suite, row or method no suite has: it would never be shown."""
    doubtful = [number for number in numbers if not _well_known(number)]
    known = paper_rows() if doubtful else []
    named = ((number, misnamed(number, known)) for number in doubtful)
    return [f"{FILE.name}, line {number.line}: {why}" for number, why in named if why]


def _well_known(number: Number) -> bool:
    """Whether a line's names are known without resolving the rows of all suites."""
    plain = number.dataset in _IN_SUITES and number.backbone in _backbones() and number.row in _FAMILIES.values()
    return plain and number.kind != "suite"


def met(numbers: Sequence[Number]) -> list[str]:
    """A line for each number: the suites that it meets, or why it meets none."""
    known = paper_rows()
    return [f"line {number.line}: {number.summary}: {_met(number, known)}" for number in numbers]


def _met(number: Number, known: Sequence[PaperRow]) -> str:
    found = meeting(number, known)
    metrics = {column for one in known for column in one.columns}
    if found or number.metric in metrics or number.metric == "any":
        return ", ".join(found) or misnamed(number, known) or "no suite has this row, task and column on this dataset"
    near = difflib.get_close_matches(number.metric, sorted(metrics))
    also = "" if number.metric not in definitions.COLUMNS else " (--column shows it)"
    return f"no suite has a column {number.metric!r}{also}" + (f"; nearest: {', '.join(near)}" if near else "")
