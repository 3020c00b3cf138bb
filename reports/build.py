"""``mpformer report``: everything rebuilt from the run store alone, at any time, halfway through a suite too."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.store import Store, write_text
from experiments.worker import queued_runs
from mpformer.errors import UserError, choices
from reports import paper_numbers, site
from reports.collect import SuiteReport, collect, records
from reports.escape import clean
from reports.explorer import build_explorer
from reports.figures import DRAWN, suite_figures
from reports.render import render
from reports.runs import Reader

FILES = {"md": "table.md", "tex": "table.tex", "macros": "macros.tex", "csv": "table.csv", "json": "table.json"}
FORMATS = (*FILES, "html", *DRAWN)
"""``html`` brings the figures as SVG and CSV; ``pdf`` and ``png`` add those files of each figure."""
EXPLORED = 100  # objects; the command `mpformer visualize` takes any number
_LABELS = {"md": "Markdown", "tex": "LaTeX", "macros": "LaTeX macros", "csv": "CSV", "json": "JSON"}


def build(
    suites: Sequence[str],
    root: Path,
    *,
    scale: str = "mini",
    dataset: str | None = None,
    out: Path | None = None,
    formats: Sequence[str] = FORMATS,
    columns: Sequence[str] = (),
    decimals: int | None = None,
) -> list[Path]:
    """Write the reports of ``suites`` (none: of everything that was launched, with an overview) and return the files.

    Goes to ``<root>/reports/<suite>@<scale>/``, or below ``out``. Raises UserError for an unknown suite, format or
    column, and where the directory cannot be written.
    """
    if unknown := [form for form in formats if form not in FORMATS]:
        raise choices("report format", unknown[0], FORMATS)
    reports = gather(suites, root, scale, dataset, columns, decimals)
    base = out if out is not None else root / "reports"
    try:
        return _write_all(reports, base, formats, overview=not suites)
    except OSError as error:
        raise UserError(
            f"cannot write the report to {base}: {error.strerror or error}; choose another with --out"
        ) from error


def gather(
    suites: Sequence[str],
    root: Path,
    scale: str,
    dataset: str | None,
    columns: Sequence[str] = (),
    decimals: int | None = None,
) -> list[SuiteReport]:
    """Collect the tables of the suites from the store."""
    store = Store(root)
    reader = Reader(store, queued_runs(store))
    found = [collect(record, reader, columns, decimals) for record in records(store, suites, scale, dataset)]
    return [_with_published(report) for report in found]


def _with_published(report: SuiteReport) -> SuiteReport:
    published, note = paper_numbers.beside(report, paper_numbers.read())
    return replace(report, table=replace(report.table, published=published, published_note=note))


def check(
    suites: Sequence[str], root: Path, *, scale: str = "paper", dataset: str | None = None
) -> tuple[list[str], list[str]]:
    """For ``report --check``: (lines about numbers outside the tolerance of a published one, other lines to print).

    The command exits non-zero if and only if the first list is not empty.
    """
    reports = gather(suites, root, scale, dataset)
    named = [(report.table.name, report.table.published) for report in reports]
    others = [
        clean(f"{name}: {item.row}, {item.metric}: {item.verdict}")
        for name, items in named
        for item in items
        if item.verdict != "outside"
    ]
    empty = [f"{name}: no published number to check against" for name, items in named if not items]
    return [clean(line) for line in paper_numbers.outside(named)], others + empty


def _write_all(reports: Sequence[SuiteReport], base: Path, formats: Sequence[str], overview: bool) -> list[Path]:
    written = [path for report in reports for path in _write(report, base / report.table.name, formats, overview)]
    if overview and "html" in formats:
        links = [(report.table, f"{report.table.name}/index.html") for report in reports]
        written.append(_save(base / "index.html", site.index_page(links)))
    return written


def _write(report: SuiteReport, folder: Path, formats: Sequence[str], overview: bool) -> list[Path]:
    written = [_save(folder / FILES[form], render(report.table, form)) for form in formats if form in FILES]
    if "html" not in formats:
        return written
    downloads = [(_LABELS[form], FILES[form]) for form in formats if form in FILES]
    index = "../index.html" if overview else ""
    gallery = site.find_gallery(report)
    drawn = suite_figures(
        report, gallery.cases if gallery else (), gallery.names if gallery else (), folder / "figures"
    )
    written += [folder / "figures" / name for figure in drawn for name in figure.files]
    explorer = _explorer(gallery, folder)
    link = explorer[0].name if explorer else ""
    page = site.suite_page(report, drawn, gallery, downloads=downloads, index_link=index, explorer_link=link)
    return [*written, *explorer, _save(folder / "index.html", page)]


def _explorer(gallery: site.Gallery | None, folder: Path) -> list[Path]:
    """The layer explorer of the gallery's two runs, for their most inconsistent objects."""
    if gallery is None:
        return []
    evaluations = [masks.folder.parent for masks in gallery.folders]
    labels = [f"{name}, seed {gallery.seed}" for name in gallery.names]
    return [build_explorer(evaluations, folder / "explorer.html", worst=EXPLORED, labels=labels)]


def _save(path: Path, content: str) -> Path:
    write_text(path, content)
    return path
