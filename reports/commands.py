"""``mpformer report`` and ``visualize``; the command line finds them through the entry points of pyproject.toml."""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from experiments.cli.console import new_console, print_json, warn
from experiments.cli.options import json_option, root_option, root_options, scale_options
from mpformer.runtime.errors import UserError

if TYPE_CHECKING:
    from reports.collect import SuiteReport


@click.command()
@click.argument("suites", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All launched suites, with an overview; no names: too.")
@scale_options
@root_option
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Directory; default: <root>/reports.")
@click.option(
    "--format", "formats", multiple=True, help="Only this format (md, tex, csv, json, html, pdf ...); repeatable."
)
@click.option("--column", "columns", multiple=True, help="A column of the table, instead of the suite's; repeatable.")
@click.option("--decimals", type=click.IntRange(0, 6), default=None, help="Decimals of the table; default: per metric.")
@click.option("--check", is_flag=True, help="Compare with the published numbers; exit code 1 if one is outside.")
@click.option("--watch", is_flag=True, help="Build again what changes, and show it on this machine, until Ctrl-C.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="With --watch: its port; default: a free one.")
@click.option("--single-file", is_flag=True, help="Also each suite (pages, explorer, figures) as one HTML file.")
@click.option("--zip", "as_zip", is_flag=True, help="Also all files as report.zip.")
@json_option
def report(
    suites: tuple[str, ...],
    everything: bool,
    root: Path,
    out: Path | None,
    formats: tuple[str, ...],
    check: bool,
    watch: bool,
    port: int,
    single_file: bool,
    as_zip: bool,
    as_json: bool,
    **table: Any,
) -> int:
    """Write tables (Markdown, LaTeX, ...) and self-contained pages for SUITES (none: all that were launched)."""
    from experiments.status import suite_view
    from reports import build, paper_numbers
    from reports.formats import FORMATS

    _check_names(suites, everything, root, table["scale"], table["dataset"])
    if check:
        return _check_report(suites, root, table["scale"], table["dataset"])
    suite_view.refresh(root, warn)
    for line in paper_numbers.warnings(paper_numbers.read()):
        warn(line)
    base = out or root / "reports"
    wanted = formats or (WATCHED if watch else tuple(FORMATS))
    make = partial(build.build, suites, root, out=base, formats=wanted, **table)
    if watch:
        return _watch(make, base, port, root)
    paths = make()
    packed = _packed(paths, base, single_file, as_zip)
    if as_json:
        print_json([str(path) for path in [*paths, *packed]])
        return 0
    _print_answers(build.gather(suites, root, **table) if suites else ())
    click.echo("\n".join([*_where(paths), *map(str, packed)]))
    return 0


def _check_names(suites: Sequence[str], everything: bool, root: Path, scale: str, dataset: str | None) -> None:
    """Raise UserError for a suite, scale or dataset that there is not."""
    from experiments.store.run_dir import Store
    from experiments.suites import catalogue

    if everything and suites:
        raise UserError(f"--all is every suite that was launched; leave it out, or {', '.join(suites)}")
    for name in suites:
        catalogue.recall(Store(root), name, scale, dataset)
        catalogue.find(name).check(scale, dataset)
    if not suites:
        catalogue.of_dataset(scale, dataset)


def _print_answers(reports: Iterable["SuiteReport"]) -> None:
    from reports import answer

    for each in reports:
        click.echo("\n".join([*answer.lines(each.table, new_console().width), "", answer.sentence(each.table)]))


def _packed(paths: Sequence[Path], base: Path, single_file: bool, as_zip: bool) -> list[Path]:
    from reports import packing

    made = packing.single_files(paths, base) if single_file else []
    if single_file and not made:
        raise UserError("--single-file packs pages: leave --format out, or add --format html")
    return made + ([packing.zipped(paths, base)] if as_zip else [])


WATCHED = ("html", "md", "tex", "csv", "json")
"""The formats of --watch: figures as PDF and PNG would take most of its time."""
WATCH_SECONDS, SLURM_SECONDS = 3.0, 30.0


def _watch(make: Callable[[], list[Path]], base: Path, port: int, root: Path) -> int:
    """Serve the report and build it anew while it changes; Slurm is asked more rarely than files are looked at."""
    from experiments.status import suite_view
    from reports import watching

    pages = [path for path in make() if path.name == "index.html"]
    if not pages:
        raise UserError("--watch shows pages: leave --format out, or add --format html")
    server = watching.start(base, port)
    page = min(pages, key=lambda path: len(path.parts)).relative_to(base)
    click.echo(f"http://{watching.ADDRESS}:{server.server_port}/{quote(page.as_posix())}  (Ctrl-C ends it)")
    asked = [time.monotonic()]

    def rebuild() -> None:
        if time.monotonic() - asked[0] > SLURM_SECONDS:
            suite_view.refresh(root, warn)
            asked[0] = time.monotonic()
        make()

    watching.watch(rebuild, WATCH_SECONDS, warn)
    server.shutdown()
    return 0


def _where(paths: Sequence[Path]) -> list[str]:
    """The pages to open, the overview before those of suites, or the files where no page was asked for."""
    pages = [path for path in paths if path.name == "index.html"]
    if not pages:
        return [str(path) for path in paths]
    overview = [path for path in pages if any(path.parent == other.parent.parent for other in pages)]
    return [f"{len(paths)} files; open {path.resolve().as_uri()}" for path in overview or pages]


@click.command()
@click.option("--check", is_flag=True, help="Say which lines meet which suites; exit code 1 if a name is unknown.")
def numbers(check: bool) -> int:
    """List the published numbers (reports/paper_numbers.csv) that reports show beside ours."""
    from reports import paper_numbers

    known = paper_numbers.read()
    if not check:
        click.echo("\n".join(f"line {number.line}: {number.summary}" for number in known))
        return 0
    click.echo("\n".join(paper_numbers.met(known)))
    wrong = paper_numbers.warnings(known)
    for line in wrong:
        warn(line)
    return 1 if wrong else 0


def _check_report(suites: tuple[str, ...], root: Path, scale: str, dataset: str | None) -> int:
    from reports import build

    outside, others = build.check(suites, root, scale=scale, dataset=dataset)
    click.echo("\n".join([*outside, *others]))
    return 1 if outside else 0


@click.command()
@click.argument("run")
@click.argument("run2", required=False)
@click.option("--images", default="", metavar="ID,ID", help="These images; masks that are not there are computed.")
@click.option("--worst", type=click.IntRange(1), default=None, metavar="N", help="The N most inconsistent objects.")
@click.option("--everywhere", is_flag=True, help="With --worst: of all evaluated images, not of the kept ones.")
@click.option("--query", type=click.IntRange(0), default=None, help="Only objects that end on this query.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=None, help="Page to write.")
@root_options
def visualize(
    run: str,
    run2: str | None,
    images: str,
    worst: int | None,
    everywhere: bool,
    query: int | None,
    out: Path | None,
    root: Path,
    data_root: Path,
) -> None:
    """Write a page that shows the masks of RUN (beside those of RUN2) layer by layer; opens without a server."""
    from experiments.runs import visualizing
    from experiments.store.run_dir import Store
    from reports.explorer import build_explorer

    if everywhere and worst is None:
        raise UserError("--everywhere says where to look for the worst objects: give --worst N too")
    store = Store(root)
    names = [store.find(name).run_id for name in (run, run2) if name is not None]
    found = [visualizing.newest_evaluation(store.reading(name)) for name in names]
    visualizing.check_comparable(found)
    chosen = visualizing.chosen_images(found, images, worst if everywhere else None)
    visualizing.complete(found, chosen, data_root)
    page = out or visualizing.default_page(root, found)
    folders, labels = [one.folder for one in found], visualizing.labels(found)
    click.echo(build_explorer(folders, page, images=chosen, worst=worst, query=query, labels=labels))
