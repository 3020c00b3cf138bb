"""Tables → Markdown, LaTeX, CSV, JSON and LaTeX macros. The HTML page is :mod:`reports.pages`.

Every ``{{ … }}`` of a template is escaped for its format unless it is a :class:`Safe`: escaping is the default, not
something a template has to remember. LaTeX templates use ``<< … >>`` and ``<% … %>``, so that braces stay TeX's.
"""

import csv as csv_module
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2

from reports import caption, escape, text
from reports.model import Cell, Column, Delta, Kind, Published, Table, TableRow

TEMPLATES = Path(__file__).parent / "templates"


class Safe(str):
    """Text that already is markup of the format that it is for."""


def environment(escaped: Callable[[object], str], **syntax: str) -> jinja2.Environment:
    """A strict environment whose every expression is escaped by ``escaped``."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Safe | jinja2.Undefined) else escaped(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **syntax,  # type: ignore[arg-type]
    )


@cache
def _markdown() -> jinja2.Environment:
    env = environment(escape.markdown)
    env.globals.update(cell=_markdown_cell, tick=_markdown_tick, seeds=text.seeds, marks=marks, header=_header)
    env.globals.update(published_parts=published_parts)
    return env


@cache
def _latex() -> jinja2.Environment:
    env = environment(
        escape.latex,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
    )
    env.globals.update(
        cells=_latex_cells, tick=_latex_tick, seeds=text.seeds, marks=marks, slug=escape.slug, keys=macro_values
    )
    env.globals.update(spans=_latex_spans, comment=_latex_comment, key=_latex_key, columns=_latex_columns)
    env.globals.update(short=caption.short, east_asian=escape.has_east_asian)
    return env


def to_markdown(table: Table) -> str:
    """The table for a README."""
    return _markdown().get_template("table.md.j2").render(table=table)


def to_latex(table: Table) -> str:
    """The table for a paper."""
    return _latex().get_template("table.tex.j2").render(table=table)


def to_macros(table: Table) -> str:
    """Each number as a LaTeX macro."""
    return _latex().get_template("macros.tex.j2").render(table=table)


def to_json(table: Table) -> str:
    """The whole model as JSON, cells with every seed's number and run."""
    return json.dumps({"schema": 1, "name": table.name, **asdict(table)}, indent=1, allow_nan=False) + "\n"


CSV_FIELDS = (
    *("suite", "scale", "dataset", "row", "label", "preset", "metric", "unit", "kind", "mean", "std", "n", "planned"),
    *("delta", "delta_n", "delta_low", "delta_high", "p", "p_holm", "published", "best", "reason", "flags", "runs"),
)


def to_csv(table: Table) -> str:
    """One line a cell, numbers unrounded."""
    out = io.StringIO()
    writer = csv_module.DictWriter(out, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in table.rows:
        writer.writerows(
            _csv_line(table, row, cell, column) for cell, column in zip(row.cells, table.columns, strict=True)
        )
    return out.getvalue()


def _csv_line(table: Table, row: TableRow, cell: Cell, column: Column) -> dict[str, Any]:
    named = {"suite": table.suite, "scale": table.scale, "dataset": table.dataset, "row": row.name, "label": row.label}
    named |= {"published": table.published_in.get((row.name, column.key), "")}
    words = {"preset": row.preset, "metric": column.key, "unit": column.unit, "kind": cell.kind, "reason": cell.reason}
    words |= {"flags": "; ".join(cell.flags), "runs": " ".join(value.run_id for value in cell.values)}
    delta = cell.delta
    numbers = {"mean": cell.mean, "std": cell.std, "n": cell.n, "planned": cell.planned, "best": int(cell.best)}
    if delta is not None:
        numbers |= {
            "delta": delta.mean,
            "delta_n": delta.n,
            "delta_low": delta.low,
            "delta_high": delta.high,
            "p": delta.p,
            "p_holm": delta.p_holm,
        }
    return {key: escape.csv(value) for key, value in (named | words).items()} | numbers


def marks(table: Table) -> dict[str, str]:
    """Letters for the rows that need a note below the table, by row name."""
    noted = [row.name for row in table.rows if row.note]
    return {name: _letter(index) for index, name in enumerate(noted)}


def _letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else _letter(index // 26 - 1) + chr(ord("a") + index % 26)


def _markdown_cell(cell: Cell, column: Column, cells: Sequence[Cell]) -> Safe:
    wrap = {Kind.PARTIAL: "_", Kind.STALE: "_", Kind.VOID: "~~"}.get(cell.kind, "")
    number = escape.markdown(text.mean(cell, column))
    if cell.has_number:
        number = f"**{number}**" if cell.best else f"{wrap}{number}{wrap}"
    number += text.flags(cell)
    extras = [text.spread(cell, column), _in_brackets(text.delta(cell, column)), _in_brackets(text.remark(cell, cells))]
    return Safe(" ".join([number, *(escape.markdown(extra) for extra in extras if extra)]))


def _in_brackets(inner: str) -> str:
    return f"({inner})" if inner else ""


def _markdown_tick(value: str) -> str:
    return {"yes": "✓", "no": ""}.get(value, value)


def _header(table: Table) -> list[str]:
    """Column headers with their group, since Markdown has no spanning cells."""
    named = [(c, f"{c.group}: {c.label}" if c.group == "Cost" else c.label) for c in table.columns]
    return [
        label for c, name in named for label in (name, *(["published"] if c.key in table.published_columns else []))
    ]


def published_parts(table: Table) -> list[tuple[list[Published], str]]:
    """The published numbers that may be compared, and under a title to fold away, those that may not."""
    parts = [([p for p in table.published if p.comparable], "")]
    parts += [
        ([p for p in table.published if not p.comparable], "Published numbers that ours may not be compared with")
    ]
    return [(items, title) for items, title in parts if items]


@dataclass(frozen=True)
class _LatexColumns:
    """How a metric is set: an S column for the number, others for what stands beside it and Δ if a row has it."""

    column: Column
    specification: Safe
    beside: bool
    delta: bool
    published: bool

    @property
    def width(self) -> int:
        """Columns of the tabular."""
        return 1 + self.beside + self.delta + self.published


def _latex_columns(table: Table) -> list[_LatexColumns]:
    return [_latex_column(table, k, column) for k, column in enumerate(table.columns)]


def _latex_column(table: Table, k: int, column: Column) -> _LatexColumns:
    cells = [(row.cells[k], row.cells) for row in table.rows]
    beside = any(_latex_beside(cell, column, of) for cell, of in cells)
    delta = any(cell.delta is not None for cell, _ in cells)
    published = column.key in table.published_columns
    parts = [f"S[table-format={_digits([c.mean for c, _ in cells], column)}]"]
    parts += [r"@{\,}l"] if beside else []
    if delta:
        digits = _digits([cell.delta.mean for cell, _ in cells if cell.delta], column)
        parts.append(rf"S[table-format=+{digits},table-space-text-post={{*}}]")
    return _LatexColumns(column, Safe("".join([*parts, "l" if published else ""])), beside, delta, published)


def _digits(values: Sequence[float | None], column: Column) -> str:
    """siunitx's format of a column's numbers: digits before and after the point."""
    whole = max((len(f"{abs(value):.0f}") for value in values if value is not None), default=1)
    return f"{whole}.{column.decimals}"


def _latex_cells(cell: Cell, of: _LatexColumns, cells: Sequence[Cell], published: str) -> Safe:
    """The cell's columns; what is no number stands in braces, where siunitx leaves it alone."""
    found = [_latex_number(cell, of.column)]
    found += [_latex_beside(cell, of.column, cells)] if of.beside else []
    found += [_latex_delta(cell, of.column)] if of.delta else []
    found += [escape.latex(published)] if of.published else []
    return Safe(" & ".join(found))


def _latex_number(cell: Cell, column: Column) -> str:
    shown = text.mean(cell, column)
    if cell.mean is None or cell.kind is Kind.VOID:
        return f"{{\\mpfvoid{{{escape.latex(shown)}}}}}" if cell.kind is Kind.VOID else f"{{{escape.latex(shown)}}}"
    before = {Kind.PARTIAL: r"\mpfpartial ", Kind.STALE: r"\mpfpartial "}.get(cell.kind, "")
    return (r"\mpfbest " if cell.best else before) + shown.replace(text.MINUS, "-")


def _latex_beside(cell: Cell, column: Column, cells: Sequence[Cell]) -> str:
    """Marks, spread and the reason of what is no plain value."""
    parts = [escape.latex(text.flags(cell))]
    if spread := text.spread(cell, column):
        parts.append(rf"\mpfspread{{{escape.latex(spread)}}}")
    if remark := text.remark(cell, cells):
        parts.append(rf"\mpfremark{{{escape.latex(remark)}}}")
    return r"\,".join(part for part in parts if part)


def _latex_delta(cell: Cell, column: Column) -> str:
    if cell.delta is None:
        return ""
    shown, star, more = text.signed(cell.delta.mean, column.decimals), "", ""
    if text.significant(cell.delta):
        star = "{*}"
    if cell.delta.n != cell.n:
        more = rf"{{\mpfremark{{{escape.latex(f'{cell.delta.n} of {cell.n}')}}}}}"
    number = shown.replace(text.MINUS, "-").replace("±", r"\pm ")
    return rf"\mpf{text.change(cell, column)} {number}{star}{more}"


def _latex_tick(value: str) -> Safe | str:
    return {"yes": Safe(r"$\surd$"), "no": ""}.get(value, value)


def _latex_spans(table: Table) -> list[tuple[int, int, int, str]]:
    """(first column, last column, width, label) of each header group, counted as TeX counts."""
    first = 2 + len(table.tick_columns)
    columns = _latex_columns(table)
    spans = []
    for label, members in itertools.groupby(columns, key=lambda of: of.column.group):
        width = sum(of.width for of in members)
        spans.append((first, first + width - 1, width, label))
        first += width
    return spans


def _latex_comment(value: object) -> Safe:
    """Text for one TeX comment line."""
    return Safe(" ".join(escape.clean(value).split()))


def _latex_key(key: str) -> Safe:
    """A macro's key as it is: slugs and metric names only (letters, digits, dots, hyphens), refused otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9.-]+", key):
        raise ValueError(f"not a macro key: {key!r}")
    return Safe(key)


def macro_values(table: Table) -> list[tuple[str, str]]:
    """(key, text) of every number: ``row.metric``, with ``.n``, ``.std``, ``.delta``, ``.delta.low`` … after it.

    Under ``row.metric`` there is nothing but the mean over all planned seeds; what is partial, stale or void has to be
    asked for by that name (``row.metric.partial``). Published numbers are ``published.row.metric.kind``, the second of
    a kind ``….2``.
    """
    prefix = escape.slug(table.name)
    found: list[tuple[str, str]] = []
    for row in table.rows:
        for cell, column in zip(row.cells, table.columns, strict=True):
            key = f"{prefix}.{escape.slug(row.name)}.{column.key.replace('_', '-')}"
            found += [(key + suffix, value) for suffix, value in _values(cell, column)]
    return found + [(f"{prefix}.published.{key}", value) for key, value in _published_values(table)]


def _values(cell: Cell, column: Column) -> list[tuple[str, str]]:
    number = partial(text.number, decimals=column.decimals)
    mean = text.mean(cell, column)
    values = [("", mean if cell.kind is Kind.VALUE else "[not available]"), (".n", str(cell.n))]
    if cell.has_number and cell.kind is not Kind.VALUE:
        values.append((f".{cell.kind}", mean))
    if cell.std is not None:
        values.append((".std", number(cell.std)))
    return values + ([] if cell.delta is None else _delta_values(cell.delta, column))


def _delta_values(delta: Delta, column: Column) -> list[tuple[str, str]]:
    signed = partial(text.signed, decimals=column.decimals)
    bounds = {".low": delta.low, ".high": delta.high}
    values = [("", signed(delta.mean)), (".n", str(delta.n))]
    values += [(suffix, signed(value)) for suffix, value in bounds.items() if value is not None]
    values += [(suffix, f"{p:.3g}") for suffix, p in ((".p", delta.p), (".p.holm", delta.p_holm)) if p is not None]
    return [(f".delta{suffix}", value) for suffix, value in values]


def _published_values(table: Table) -> list[tuple[str, str]]:
    known: Counter[str] = Counter()
    found = []
    for item in table.published:
        key = f"{escape.slug(item.row)}.{re.sub('[^A-Za-z0-9.]+', '-', item.metric)}.{item.kind}"
        known[key] += 1
        found.append((key if known[key] == 1 else f"{key}.{known[key]}", item.published))
    return found
