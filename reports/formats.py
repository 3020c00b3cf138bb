"""The formats of a report, one entry each, by the name that ``--format`` takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from reports.model import Table
from reports.render import to_csv, to_json, to_latex, to_macros, to_markdown


@dataclass(frozen=True)
class Format:
    """A format of the table, of each figure, or (with neither) of the pages that show both."""

    label: str
    """Its name on a page."""
    file: str = ""
    """File of the table or page; a figure's is called after the figure."""
    table: Callable[[Table], str] | None = None
    figure: Mapping[str, None] | None = None
    """Metadata that matplotlib would fill with the time of day, which would change the bytes of an unchanged figure."""


FORMATS: Mapping[str, Format] = {
    "md": Format("Markdown", "table.md", to_markdown),
    "tex": Format("LaTeX", "table.tex", to_latex),
    "macros": Format("LaTeX macros", "macros.tex", to_macros),
    "csv": Format("CSV", "table.csv", to_csv),
    "json": Format("JSON", "table.json", to_json),
    "html": Format("Page", "index.html"),
    "svg": Format("SVG", figure={"Date": None}),
    "pdf": Format("PDF", figure={"CreationDate": None}),
    "png": Format("PNG", figure={}),
}
"""A new one is a line here, and its function in a module of its own."""

TABLES: Mapping[str, str] = {name: form.file for name, form in FORMATS.items() if form.table is not None}
"""The formats of tables, with their files."""

FIGURES: Mapping[str, Mapping[str, None]] = {
    name: form.figure for name, form in FORMATS.items() if form.figure is not None
}
"""The formats of figures, with that metadata."""


def render(table: Table, form: str) -> str:
    """The table in one format out of TABLES."""
    make = FORMATS[form].table
    assert make is not None
    return make(table)
