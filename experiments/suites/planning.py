"""From a suite's name to its runs: each row and seed resolved to one full, validated configuration and its ids."""

import json
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.store.identity import canonical, eval_id, run_id
from experiments.store.records import load_sound
from experiments.store.run_dir import Store
from experiments.store.suite_record import SuiteRecord, SuiteRow, SuiteRun
from experiments.suites import catalogue, datasets, scales
from experiments.suites.rows import Row, Suite
from mpformer.config.datasets import dataset as dataset_entry
from mpformer.config.schema import MAX_SEED, Config
from mpformer.data.own import registration
from mpformer.runtime.errors import UserError, choices

MAX_SEEDS = 1000
"""Most seeds of one command; each row has a run for every seed."""


@dataclass(frozen=True)
class Request:
    """What a user asked for: a suite, and what to change or leave out."""

    suite: str
    scale: str = "mini"
    dataset: str | None = None
    rows: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    overrides: tuple[tuple[str, Any], ...] = ()
    base: str | None = None
    """A setting of the paper that the rows change, instead of the scale's; it is of scale paper."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan."""

    row: Row
    seed: int
    config: Config
    run_id: str
    eval_id: str


@dataclass(frozen=True)
class Plan:
    """The runs that a request resolves to; ``missing`` lists data and weights that are not in place."""

    request: Request
    suite: Suite
    scale: str
    dataset: str
    rows: tuple[Row, ...]
    runs: tuple[PlannedRun, ...]
    data: datasets.DataState
    row_configs: Mapping[str, Config]
    """Every row of the suite, chosen or not, with its configuration at seed 0."""
    missing: tuple[str, ...] = ()
    data_root: Path = Path()

    @property
    def unique(self) -> tuple[PlannedRun, ...]:
        """The runs, each id once: two rows that mean the same run train it once."""
        return tuple({run.run_id: run for run in self.runs}.values())

    @property
    def base(self) -> Config:
        """A configuration of the plan, for its dataset."""
        return self.runs[0].config


def make(request: Request, data_root: Path) -> Plan:
    """Resolve a request; raises UserError that lists valid suites, scales, datasets, rows, keys or values."""
    registration.know_all(data_root)
    with scales.based_on(request.base):
        return _make(request, data_root)


def _make(request: Request, data_root: Path) -> Plan:
    suite = catalogue.find(request.suite)
    if request.base is not None:
        suite.check_base(request.base)
    scale, dataset = suite.check(request.scale, request.dataset)
    if why := suite.why_not(dataset):
        raise UserError(f"suite {suite.name!r} does not apply on {dataset}: {why}")
    every = suite.rows(scale, dataset)
    rows = _chosen_rows(suite, every, request.rows)
    base, data = _base(suite.base(scale, dataset), every, dict(request.overrides), data_root)
    found = {row.name: _row_config(row, base, dict(request.overrides), data_root) for row in every}
    configs = {name: config for name, (config, _) in found.items()}
    weights = [found[row.name][1] for row in rows]
    for row in rows:
        datasets.check_val_images(configs[row.name], data_root)
    runs = tuple(
        run for row in rows if not row.not_applicable for run in _row_runs(row, configs[row.name], suite, request)
    )
    if not runs:
        raise UserError(f"nothing to run: {rows[0].not_applicable}")
    if request.overrides:
        _refuse_merged_rows(runs, request, base)
    suite = replace(suite, primary=_primary(suite, dataset, base))
    missing = tuple(dict.fromkeys(line for line in (data.missing, *weights) if line))
    return Plan(request, suite, scale, dataset, every, runs, data, configs, missing, data_root)


def as_launched(request: Request, store: Store) -> Request:
    """Return the request with overrides, rows and seeds that it leaves open taken from the suite's record, if any.

    A suite that is not known here is defined by the file that the record has of it.
    """
    catalogue.recall(store, request.suite, request.scale, request.dataset)
    datasets.recall(store)
    scale, dataset = catalogue.check(request.suite, request.scale, request.dataset)
    record = load_sound(SuiteRecord, store.suite_path(scales.suite_name(request.suite, scale, dataset)))
    if record is None or request.overrides or request.base:
        return request
    rows = request.rows or tuple(row.name for row in record.rows if row.runs)
    seeds = request.seeds or tuple(sorted({run.seed for _, run in record.runs()}))
    given = tuple(record.overrides.items())
    return replace(request, rows=rows, seeds=seeds, overrides=given, base=record.base or None)


def parse_override(text: str) -> tuple[str, Any]:
    """Parse ``KEY=VALUE``; the value is JSON where it parses as such (numbers, true, lists, null), text otherwise."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"cannot read --set {text!r}; write KEY=VALUE, such as schedule.max_iter=300")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse ``0,1,2`` or ``0-4``; raises UserError for anything else, for too large seeds and for too many."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"cannot read seeds {text!r}; write 0,1,2 or 0-4")
        each = range(int(first), int(last or first) + 1)
        if each and each[-1] > MAX_SEED:
            raise UserError(f"seed {each[-1]} is too large; seeds go up to {MAX_SEED}")
        if len(seeds) + len(each) > MAX_SEEDS:
            raise UserError(f"seeds {text!r} are more than {MAX_SEEDS}, which is the most of one command")
        seeds += each
    if not seeds:
        raise UserError(f"seeds {text!r} are an empty range; write 0,1,2 or 0-4")
    return tuple(dict.fromkeys(seeds))


def declared_seconds(suite: Suite, scale: str, dataset: str) -> float:
    """Return the declared cost of all runs of a suite on one worker; 0 for rows that train nothing or do not apply."""
    base = suite.base(scale, dataset)
    each, _ = scales.declared_seconds(scale, dataset)
    total = 0.0
    for row in suite.rows(scale, dataset):
        if not row.not_applicable and not row.changes.get("schedule.evaluation_only"):
            seeds = len(row.seeds or suite.seeds.get(scale, (0,)))
            total += seeds * each * row.changes.get("schedule.max_iter", base.schedule.max_iter)
    return total


def command(verb: str, plan: Plan, store: Store, *more: str) -> str:
    """Return a command about the plan's suite that works in any folder: dataset, root and data root are in it.

    A suites file is not: launching has kept it in the store.
    """
    words = ["mpformer", verb, plan.suite.name, *more]
    if plan.scale != "mini":
        words += ["--scale", plan.scale]
    if plan.dataset != plan.suite.datasets(plan.scale)[0]:
        words += ["--dataset", plan.dataset]
    if plan.request.base and verb == "launch":
        words += ["--base", plan.request.base]
    words += ["--root", str(store.root.resolve())]
    if verb not in ("status", "report"):
        words += ["--data-root", str(plan.data_root.resolve())]
    return shlex.join(words)


def write_record(plan: Plan, store: Store, command: str) -> Path:
    """Write the suite's record: which runs it resolved to.

    Launching other seeds or rows of the same setting adds to the record; launching another setting (``--set``, or a
    changed suite) replaces it, and the earlier record is kept under ``suites/earlier``.
    """
    path = store.suite_path(scales.suite_name(plan.suite.name, plan.scale, plan.dataset))
    source = catalogue.source(plan.suite)
    file, package = (store.keep_suites_file(source.name, source.text), source.package) if source else ("", "")
    store.write_suite(path, replace(record_of(plan, command), file=file, package=package))
    return path


def _chosen_rows(suite: Suite, every: Sequence[Row], names: Iterable[str]) -> tuple[Row, ...]:
    rows = {row.name: row for row in every}
    for name in names:
        if name not in rows:
            raise choices(f"row of suite {suite.name!r}", name, rows)
    wanted = set(names) or set(rows)
    return tuple(row for row in rows.values() if row.name in wanted)


def _primary(suite: Suite, dataset: str, base: Config) -> str:
    """The metric of the verdicts: the suite's, or its first column that applies here."""
    reasons = scales.column_reasons(dataset, base.evaluation)
    return next((column for column in (suite.primary, *suite.columns) if column not in reasons), suite.primary)


def _base(
    base: Config, rows: Sequence[Row], overrides: Mapping[str, Any], data_root: Path
) -> tuple[Config, datasets.DataState]:
    """The configuration that rows change, already with what all of them and the overrides say of the set."""
    first, *others = (row.changes for row in rows)
    shared = {key: value for key, value in first.items() if all(key in of and of[key] == value for of in others)}
    about_data = {key: value for key, value in {**shared, **overrides}.items() if key.startswith("dataset.")}
    return datasets.resolve(base.replace(about_data), data_root)


def _row_runs(row: Row, config: Config, suite: Suite, request: Request) -> list[PlannedRun]:
    seeds = request.seeds or row.seeds or suite.seeds.get(request.scale, (0,))
    configs = [config.replace({"seed": seed}) if seed != config.seed else config for seed in seeds]
    return [PlannedRun(row, one.seed, one, run_id(one), eval_id(one)) for one in configs]


def _row_config(row: Row, base: Config, overrides: dict[str, Any], data_root: Path) -> tuple[Config, str]:
    """A row's configuration at seed 0, and what is missing of its initial weights."""
    given = {key for key in overrides if key.startswith("dataset.")}  # is in the base, before rows say anything
    before = base.replace({key: value for key, value in row.changes.items() if key not in given})
    _check_same_set(row, before, base)
    config = before.replace({key: value for key, value in overrides.items() if not key.startswith("dataset.")})
    if "schedule.max_iter" in overrides and "schedule.steps" not in overrides:
        config = scales.scale_steps(config, before.schedule.max_iter)
    return datasets.resolve_weights(config, data_root)


def _check_same_set(row: Row, config: Config, base: Config) -> None:
    """Rows are compared on the same images: what one alone says of the set would find no set, or another."""
    for key in ("crop", "shapes", "fingerprint"):
        if getattr(config.dataset, key) != getattr(base.dataset, key):
            raise UserError(
                f"row {row.name!r} has another dataset.{key} than other rows: the rows of a suite are of one set; "
                "give every row the same, or launch with --set"
            )


def _refuse_merged_rows(runs: Sequence[PlannedRun], request: Request, base: Config) -> None:
    """An override of what rows differ in would compare a row with itself; rows that are the same without it may be."""
    owners: dict[str, Row] = {}
    for run in runs:
        other = owners.setdefault(run.run_id, run.row)
        if other is not run.row and run_id(base.replace(dict(other.changes))) != run_id(
            base.replace(dict(run.row.changes))
        ):
            keys = ", ".join(key for key, _ in request.overrides)
            raise UserError(f"with --set {keys} the rows {other.name!r} and {run.row.name!r} are one and the same run")


def record_of(plan: Plan, command: str = "") -> SuiteRecord:
    """Return the record of a plan; of a set of the user's own with its registration."""
    added = dataset_entry(plan.dataset).added
    return SuiteRecord(
        suite=plan.suite.name,
        scale=plan.scale,
        dataset=plan.dataset,
        not_applicable_columns=_column_reasons(plan),
        overrides=dict(plan.request.overrides),
        setting=canonical([dict(plan.request.overrides), plan.data.fingerprint, *filter(None, [plan.request.base])]),
        base=plan.request.base or "",
        rows=tuple(_row_record(row, plan) for row in plan.rows),
        created=time.time(),
        command=command,
        evaluations={run.eval_id: run.config.evaluation.model_dump(mode="json") for run in plan.runs},
        data_root=str(plan.data_root.resolve()),
        registration=registration.load(plan.dataset, plan.data_root).plain() if added else {},
        **{name: getattr(plan.suite, name) for name in _SHARED},
    )


_SHARED = ("title", "paper_table", "baseline", "columns", "primary", "ticks")
"""Fields of a suite that its record has too."""


def _column_reasons(plan: Plan) -> dict[str, str]:
    """The columns that apply to none of the rows, each with its reason."""
    found = [scales.column_reasons(plan.dataset, config.evaluation) for config in plan.row_configs.values()]
    return {column: why for column, why in found[0].items() if all(column in reasons for reasons in found)}


def _row_record(row: Row, plan: Plan) -> SuiteRow:
    toggles = plan.row_configs[row.name].toggles.model_dump(mode="json")
    runs = tuple(SuiteRun(run.seed, run.run_id, run.eval_id) for run in plan.runs if run.row.name == row.name)
    return SuiteRow(row.name, row.label, toggles, dict(row.changes), row.not_applicable, row.baseline, runs)
