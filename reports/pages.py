"""The HTML pages: one self-contained file a suite, and an overview. No network, no server.

Everything is escaped by default (jinja2's autoescape, after control characters are made visible); a content security
policy allows the page's own script alone, by its hash, so that even an escaping mistake could run nothing.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from analysis.failure_cases import Aligned, gallery_cases, shown
from experiments.store.attempt_dir import AttemptRecord
from reports import caption, mask_pictures, text
from reports import run_page as provenance
from reports.collect import RowRuns, SuiteReport
from reports.escape import clean, slug
from reports.figures import Figure, pairs
from reports.mask_pictures import Case, LayerMasks, Step
from reports.model import Cell, Column, Kind, Table, TableRow
from reports.render import TEMPLATES, marks
from reports.runs import RunView

Runs = Sequence[tuple[RowRuns, Sequence[provenance.RunSection]]]


@dataclass(frozen=True)
class CaseView:
    """A gallery case with its pictures."""

    case: Case
    definition: Markup
    steps: tuple[tuple[Step, ...], ...]
    tiles: tuple[tuple[Markup, ...], ...]


@dataclass(frozen=True)
class Gallery:
    """What the page shows of two runs' layer masks."""

    names: tuple[str, ...]
    seed: int | None
    cases: tuple[Case, ...]
    folders: tuple[LayerMasks, ...]
    found: Aligned
    """Every object of the images that both runs kept."""
    views: tuple[RunView, ...]


@cache
def _environment() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = "".join((TEMPLATES / name).read_text() for name in ("page.js", "jumps.js", "table.js"))
    css = "".join((TEMPLATES / name).read_text() for name in ("style.css", "jumps.css"))
    env.globals.update(css=Markup(css), script=Markup(script), script_hash=script_hash(script))
    env.globals.update(text=text, slug=slug, when=when, took=took, primary=primary, json=json.dumps)
    return env


def _visible(value: Any) -> Any:
    """Control characters as pictures; markup made here is left alone."""
    return value if isinstance(value, Markup | jinja2.Undefined) or not isinstance(value, str) else clean(value)


def script_hash(script: str) -> str:
    """The hash by which a content security policy allows an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def facts(cell: Cell, column: Column) -> list[str]:
    """What is said of a cell besides its seeds: its kind and reason, its interval, its difference."""
    parts = [f"{text.mean(cell, column)} {text.spread(cell, column)}".strip() + f", n = {cell.n} of {cell.planned}"]
    parts += [found] if (found := text.mean_interval(cell, column)) else []
    if cell.kind is not Kind.VALUE:
        parts.append(f"{cell.kind}: {cell.reason}")
    if cell.delta is not None:
        parts.append(f"difference {text.delta(cell, column)}, {text.interval(cell.delta, column.decimals)}")
    return [clean(part) for part in parts]


def table_data(report: SuiteReport, files: Mapping[str, str]) -> dict[str, Any]:
    """The table as its script works with it: unrounded numbers by seed, each with the page of its run (``files``)."""
    table = report.table
    cells = [cell for row in table.rows for cell in row.cells]
    columns = []
    for k, column in enumerate(table.columns):
        values = [value.value for row in table.rows for value in row.cells[k].values]
        shown = {"label": column.label, "group": column.group, "decimals": column.decimals}
        ends = {"low": min(values, default=0), "high": max(values, default=0)}
        columns.append({**shown, "direction": column.direction, **ends})
    rows = [
        {
            "name": clean(row.name),
            "label": clean(row.label),
            "anchor": slug(row.name),
            "baseline": clean(runs.baseline),
            "cells": [_cell_data(*pair, files) for pair in zip(row.cells, table.columns, strict=True)],
        }
        for row, runs in zip(table.rows, report.rows, strict=True)
    ]
    return {"columns": columns, "rows": rows, "seeds": sorted({v.seed for cell in cells for v in cell.values})}


def _cell_data(cell: Cell, column: Column, files: Mapping[str, str]) -> dict[str, Any]:
    values = [(value.seed, value.value, files.get(value.run_id, "")) for value in cell.values]
    return {"kind": cell.kind, "n": cell.n, "values": values, "facts": facts(cell, column)}


def row_groups(report: SuiteReport, least: int = 8) -> list[tuple[str, list[int]]]:
    """(title, rows) in table order: rows that are compared with one baseline, or that change the same keys.

    One group without a title where the table has fewer than ``least`` rows, or would fall into groups of one.
    """
    several = len({row.baseline for row in report.rows}) > 1
    labels = {row.name: row.label for row in report.rows}

    def key(row: RowRuns) -> str:
        if several:
            return f"compared with {labels.get(row.baseline, row.baseline)}"
        return ", ".join(sorted(_key_words(name) for name in row.changes)) or "as the suite's base"

    parts: list[tuple[str, list[int]]] = []
    for index, row in enumerate(report.rows):
        if not parts or parts[-1][0] != key(row):
            parts.append((key(row), []))
        parts[-1][1].append(index)
    whole = len(report.rows) < least or len(parts) < 2 or len(parts) > len(report.rows) / 2
    return [("", list(range(len(report.rows))))] if whole else parts


def _key_words(key: str) -> str:
    return key.rpartition(".")[2].replace("_", " ")


def when(moment: Any) -> str:
    """A unix time as UTC minutes; any other text as it is."""
    if isinstance(moment, int | float):
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M")
    return str(moment or "")


def took(record: AttemptRecord) -> str:
    """How long an attempt lasted, empty while it has not ended."""
    if record.started is None or record.ended is None:
        return ""
    return f"{(record.ended - record.started) / 60:.1f} min"


def primary(table: Table, row: TableRow) -> tuple[Cell, Column] | None:
    """The row's cell of the table's primary metric."""
    pairs = zip(row.cells, table.columns, strict=True)
    return next(((cell, column) for cell, column in pairs if column.key == table.primary), None)


def stamp() -> str:
    """When the page was made."""
    return "made " + datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def suite_page(
    report: SuiteReport,
    figures: Sequence[Figure],
    found: Gallery | None,
    *,
    downloads: Sequence[tuple[str, str]] = (),
    index_link: str = "",
    explorer_link: str = "",
    runs: Runs | None = None,
    opening: Mapping[str, Any] | None = None,
    missing: Sequence[str] = (),
) -> str:
    """The page of one suite; ``runs`` are its :func:`reports.run_page.sections`, if they are known already, and
    ``opening`` is what :func:`reports.jump_picture.view` makes of its two runs. ``missing`` says what could
    not be made, and why.
    """
    cases = [case_view(case, number) for number, case in enumerate(found.cases)] if found else []
    rows = provenance.sections(report) if runs is None else runs
    return _environment().get_template("suite.html.j2").render(
        table=report.table,
        letters=marks(report.table),
        figures=figures,
        cases=cases,
        gallery_found=found is not None,
        gallery_rule=mask_pictures.RULE,
        gallery_names=found.names if found else (),
        gallery_seed=found.seed if found else None,
        rows=rows,
        groups=row_groups(report),
        data=table_data(report, {s.view.run_id: s.file for _, sections in rows for s in sections}),
        downloads=downloads,
        index_link=index_link,
        explorer_link=explorer_link,
        opening=opening,
        missing=missing,
        updated=last_logged(report.views),
        stamp=stamp(),
    )  # fmt: skip


def run_page(report: SuiteReport, run: provenance.RunSection, *, index_link: str = "") -> str:
    """The page of one run, which lies in a folder below that of its suite. Without the time: it changes with the run
    alone.
    """
    baseline = report.baseline_of(run.row) is None
    preset = caption.preset(report.record, run.row.toggles, run.row.changes, run.view.config)
    template = _environment().get_template("run.html.j2")
    updated = last_logged([run.view])
    return template.render(
        table=report.table, run=run, preset=preset, baseline=baseline, index_link=index_link, updated=updated
    )


def last_logged(views: Sequence[RunView]) -> float | None:
    """When a run that trains logged last, in unix seconds; None where none trains."""
    logs = (view.directory.metrics for view in views if view.standing.state == "RUNNING")
    return max((path.stat().st_mtime for path in logs if path.exists()), default=None)


def card(table: Table) -> Markup:
    """A suite on the overview: completion and the primary numbers, linked to its page."""
    template = _environment().get_template("card.html.j2")
    return Markup(template.render(table=table, link=f"{table.name}/index.html").strip())


def index_page(cards: Sequence[Markup]) -> str:
    """The overview of all suites, of their :func:`card`s."""
    return _environment().get_template("index.html.j2").render(cards=cards, stamp=stamp())


def case_view(case: Case, number: int) -> CaseView:
    """A case with its image embedded once and a picture per run and layer shown."""
    identifier = f"picture-{number}"
    steps = tuple(tuple(shown(case, track)) if track else () for track in case.tracks)
    tiles = tuple(
        tuple(mask_pictures.tile(step, case, identifier, which) for step in row) for which, row in enumerate(steps)
    )
    return CaseView(case, mask_pictures.picture_definition(case, identifier), steps, tiles)


def find_gallery(report: SuiteReport, each: int = 3) -> Gallery | None:
    """The gallery of the baseline and the last row that has masks at the same seed; None if there is no such pair."""
    for (base, theirs), (row, mine) in pairs(report):
        folders = masks_of(theirs), masks_of(mine)
        if all(folder.images for folder in folders):
            found = mask_pictures.align(folders)
            return Gallery(
                (base.label, row.label), mine.seed, tuple(gallery_cases(found, each)), folders, found, (theirs, mine)
            )
    return None


def masks_of(view: RunView) -> LayerMasks:
    """Where a run's layer masks are, if it has any."""
    return LayerMasks(view.directory.evaluation(view.eval_id) / "layer_masks")
