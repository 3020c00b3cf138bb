"""``mpformer report``: everything rebuilt from the run store alone, at any time, halfway through a suite too."""

import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from experiments.status import scheduler
from experiments.store.files import write_text
from experiments.store.launches import queued_runs
from experiments.store.run_dir import Store
from experiments.store.suite_record import SuiteRecord
from experiments.suites.scales import suite_name
from mpformer.runtime.errors import UserError, choices
from reports import incremental, jump_picture, paper_numbers, run_page, why_figures
from reports import pages as site
from reports.collect import SuiteReport, collect, records
from reports.escape import clean
from reports.explorer import build_explorer
from reports.figures import suite_figures, why_missing
from reports.formats import FIGURES, FORMATS, TABLES, render
from reports.runs import Reader, RunView

EXPLORED = 100  # objects; the command `mpformer visualize` takes any number


@contextmanager
def _garbage_by_suite() -> Iterator[None]:
    """Objects in circles, as figures are, are looked for after each suite (:func:`_write`) and not while it is made:
    among everything that was read, that takes a tenth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


@_garbage_by_suite()
def build(
    suites: Sequence[str],
    root: Path,
    *,
    scale: str = "mini",
    dataset: str | None = None,
    out: Path | None = None,
    formats: Sequence[str] = tuple(FORMATS),
    columns: Sequence[str] = (),
    decimals: int | None = None,
) -> list[Path]:
    """Write the reports of ``suites`` (none: of everything that was launched, with an overview) and return the files.

    Goes to ``<root>/reports/<suite>@<scale>/``, or below ``out``. Raises UserError for an unknown suite, format or
    column, and where the directory cannot be written.
    """
    if unknown := [form for form in formats if form not in FORMATS]:
        raise choices("report format", unknown[0], FORMATS)
    base = out if out is not None else root / "reports"
    store = Store(root)
    options = (tuple(formats), tuple(columns), decimals, not suites)
    found = records(store, suites, scale, dataset)
    reader = Reader(store, queued_runs(store), scheduler.remembered(store))
    prints = [incremental.fingerprint(r, store, options, reader.queued, reader.placements) for r in found]
    folders = [base / suite_name(record.suite, record.scale, record.dataset) for record in found]
    old = [incremental.kept(folder, mine.whole) for folder, mine in zip(folders, prints, strict=True)]
    overview = [base / "index.html"] if not suites and "html" in formats else []
    if None not in old and all(path.exists() for path in overview):
        return [path for made in old if made for path in made.files] + overview
    changed = [record for record, made in zip(found, old, strict=True) if made is None]
    reports = iter(_collected(changed, reader, columns, decimals))
    try:
        every = [
            made or _write(next(reports), folder, formats, mine, bool(overview))
            for folder, mine, made in zip(folders, prints, old, strict=True)
        ]
        files = [path for made in every for path in made.files]
        return files + [_save(path, site.index_page([made.card for made in every])) for path in overview]
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
    reader = Reader(store, queued_runs(store), scheduler.remembered(store))
    return _collected(records(store, suites, scale, dataset), reader, columns, decimals)


def _collected(
    found: Sequence[SuiteRecord], reader: Reader, columns: Sequence[str], decimals: int | None
) -> list[SuiteReport]:
    return [_with_published(collect(record, reader, columns, decimals)) for record in found]


def _with_published(report: SuiteReport) -> SuiteReport:
    numbers = paper_numbers.read()
    published, note = paper_numbers.beside(report, numbers)
    table = report.table
    named = table.paper_table or paper_numbers.number_of(table.suite, numbers)
    return replace(report, table=replace(table, paper_table=named, published=published, published_note=note))


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


def _write(
    report: SuiteReport, folder: Path, formats: Sequence[str], mine: incremental.Fingerprint, overview: bool
) -> incremental.Made:
    """Write a suite's files and remember them, so that they are left alone until something changes."""
    gc.freeze()  # what was read stays
    pages = Pages(folder, incremental.digests(folder), mine.pages)
    incremental.forget(folder)
    written = tuple(_write_files(report, folder, formats, pages, overview))
    made = incremental.Made(written, site.card(report.table), pages.made)
    incremental.remember(folder, mine.whole, made)
    gc.collect()
    return made


@dataclass
class Pages:
    """The pages that are made of few runs: each is left alone while its runs are as they were."""

    folder: Path
    known: Mapping[str, str]
    runs: Mapping[tuple[str, str], str]
    made: dict[str, str] = field(default_factory=dict)

    def write(self, name: str, views: Sequence[RunView], render: Callable[[], str | None]) -> Path:
        """Write what ``render`` returns, unless that is None, or the page is there and was made of the same."""
        path = self.folder / name
        digest = incremental.digest(*(self.runs.get((view.run_id, view.eval_id)) for view in views))
        if self.known.get(name) != digest or not path.exists():
            content = render()
            if content is not None and _differs(path, content):
                _save(path, content)
        self.made[name] = digest
        return path


def _write_files(report: SuiteReport, folder: Path, formats: Sequence[str], pages: Pages, overview: bool) -> list[Path]:
    """Tables, figures (SVG and data always) if the page or a format of theirs is asked for, and pages."""
    written = [_save(folder / TABLES[form], render(report.table, form)) for form in formats if form in TABLES]
    if "html" not in formats and not FIGURES.keys() & set(formats):
        return written
    parts = Parts()
    gallery = parts.made("masks between layers", lambda: site.find_gallery(report))
    cases, names = (gallery.cases, gallery.names) if gallery else ((), ())
    found, views = (gallery.found, gallery.views) if gallery else (None, ())
    picture = parts.made("picture of the jumps", lambda: jump_picture.of_suite(report, found, views))
    further = itertools.chain(jump_picture.plans(report, picture), why_figures.plans(report))
    drawn = suite_figures(report, cases, names, folder / "figures", formats, further)
    written += [folder / "figures" / name for figure in drawn for name in figure.files]
    if "html" not in formats:
        return written
    index = "../index.html" if overview else ""
    downloads = [(FORMATS[form].label, TABLES[form]) for form in formats if form in TABLES]
    explorer = parts.made("layer explorer", lambda: _explorer(gallery, pages)) or []
    link = explorer[0].name if explorer else ""
    runs = run_page.sections(report)
    opening = parts.made("picture of the jumps", lambda: jump_picture.view(picture, strips=True) if picture else None)
    page = site.suite_page(
        report,
        drawn,
        gallery,
        downloads=downloads,
        index_link=index,
        explorer_link=link,
        runs=runs,
        opening=opening,
        missing=parts.missing,
    )
    return [*written, *explorer, *_run_pages(report, runs, pages, overview), _save(folder / "index.html", page)]


Made = TypeVar("Made")


@dataclass
class Parts:
    """The parts of a page: one that cannot be made becomes a box with the reason, and the page is there."""

    missing: list[str] = field(default_factory=list)

    def made(self, name: str, make: Callable[[], Made]) -> Made | None:
        """What ``make`` returns; None, and the reason kept, if it raises."""
        try:
            return make()
        except Exception as error:  # files of the store may hold anything
            self.missing.append(why_missing(f"The {name}", error))
            return None


def _run_pages(report: SuiteReport, runs: site.Runs, pages: Pages, overview: bool) -> list[Path]:
    """One page a run."""
    index = "../../index.html" if overview else ""
    sections = {section.file: section for _, mine in runs for section in mine}
    return [
        pages.write(name, [of.view], partial(site.run_page, report, of, index_link=index))
        for name, of in sections.items()
    ]


def _differs(path: Path, content: str) -> bool:
    try:
        return path.read_text() != content
    except OSError:
        return True


def _explorer(gallery: site.Gallery | None, pages: Pages) -> list[Path]:
    """The layer explorer of the gallery's two runs, for their most inconsistent objects."""
    if gallery is None:
        return []
    evaluations = [masks.folder.parent for masks in gallery.folders]
    labels = [f"{name}, seed {gallery.seed}" for name in gallery.names]

    def render() -> None:
        out = pages.folder / "explorer.html"
        build_explorer(evaluations, out, worst=EXPLORED, labels=labels, back="index.html#gallery")

    return [pages.write("explorer.html", gallery.views, render)]


def _save(path: Path, content: str) -> Path:
    write_text(path, content, durable=False)
    return path
