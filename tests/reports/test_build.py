"""The report command's function: which files it writes, from what, and how it fails."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.runs import archiving
from experiments.store import usage
from experiments.store.run_dir import Store
from experiments.store.suite_record import SuiteRecord
from mpformer.runtime.errors import UserError
from reports import explorer, figures, incremental
from reports.build import build, check
from reports.collect import collect
from reports.formats import TABLES
from tests.reports.conftest import LIVE

ALL_TABLES = {*TABLES.values()}
LIGHT = (*TABLES, "html")  # figures as SVG and CSV alone: drawing is what takes time


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_everything_with_an_overview(store: Path, blank_figures: None) -> None:
    written = build([], store, formats=LIGHT)
    base = store / "reports"
    assert names(base) == {"index.html", "headline@mini", "components@mini", "headline@mini+nuclei"}
    assert names(base / "headline@mini") == ALL_TABLES | {"index.html", "figures", "explorer.html", "runs"}
    assert names(base / "headline@mini+nuclei") == ALL_TABLES | {"index.html", "figures", "runs"}
    assert all(path.exists() for path in written)
    page = (base / "headline@mini" / "index.html").read_text()
    assert "explorer.html" in page
    assert page.count("<figure") == 9


def test_every_figure_is_drawn(store: Path) -> None:
    build(["headline"], store, formats=(*LIGHT, "svg"))
    folder = store / "reports" / "headline@mini" / "figures"
    drawn = {path.stem for path in folder.glob("*.svg")}
    of_masks = {"effects", "jumps", "jump-thresholds", "gallery"}
    assert drawn == {"layers", "training", "transitions", "drops", "query-usage", "stability", "attention"} | of_masks
    page = (folder.parent / "index.html").read_text()
    shown = page[page.index('<section id="figures">') : page.index('<section id="gallery">')]
    assert "fill: #222222" in (folder / "layers.svg").read_text()  # a file of its own keeps its colours
    assert not re.search(r"(fill|stroke): #(000000|222222|444444|dddddd)", shown)  # readable in the dark
    grounds = re.findall(r'-ground"?[^>]*>\s*<path d="[^"]*"[^>]*style="fill: (\S+?)[;"]', shown)
    assert len(grounds) > 10
    assert set(grounds) == {"none"}  # no white box
    assert shown.count('href="#layers-figure_1"') == 6  # on a phone: two rows' signs and four axes, one below the other
    (said,) = re.findall(r'#layers-figure_1"/></svg>(MP-Former[^<]*)</p>', shown)
    assert said == "MP-Former (n\u00a0=\u00a03)", "text of the page, as large as that"
    assert all((folder / f"{stem}.csv").stat().st_size > 40 for stem in drawn)
    assert all("<metadata" not in page for page in [(folder.parent / "index.html").read_text()])


def test_a_finished_suite_is_left_alone_until_something_changes(store: Path, blank_figures: None) -> None:
    page = store / "reports" / "headline@mini" / "index.html"

    def again() -> int:
        build(["headline"], store, formats=LIGHT)
        return page.stat().st_mtime_ns

    first = again()
    assert again() == first
    build(["headline"], store, formats=["md"])  # asked for otherwise
    second = again()
    assert second != first
    run = next((store / "runs").glob("shapes-panoptic-m2f-s0-*"))
    (run / "void.json").write_text('{"reason": "a bug"}')
    third = again()
    assert third != second
    assert again() == third  # not finished any more, and unchanged since
    assert "a bug" in (store / "reports" / "headline@mini" / "table.md").read_text()


def test_the_overview_is_current_though_unchanged_suites_are_not_read(
    store: Path, blank_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    build([], store, formats=LIGHT)
    first = (store / "reports" / "index.html").read_text()
    read: list[str] = []

    def noted(record: SuiteRecord, *rest: Any) -> Any:
        read.append(f"{record.suite} on {record.dataset}")
        return collect(record, *rest)

    monkeypatch.setattr("reports.build.collect", noted)
    run = next((store / "runs").glob("nuclei-instance-m2f-s0-*"))
    (run / "void.json").write_text('{"reason": "a bug"}')
    build([], store, formats=LIGHT)
    assert read == ["headline on nuclei"], "what changed, and no unfinished suite that did not"
    page = (store / "reports" / "index.html").read_text()
    assert "1 of 2 runs done, 1 void" in page
    assert "1 of 2 runs done, 1 void" not in first
    assert page.count('class="card"') == 3


def test_a_second_build_draws_nothing_again(store: Path, blank_figures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    build(["headline"], store, dataset="nuclei", formats=["html"])
    incremental.forget(store / "reports" / "headline@mini+nuclei")
    monkeypatch.setattr(figures, "_draw", lambda *_: pytest.fail("drew a figure whose data had not changed"))
    build(["headline"], store, dataset="nuclei", formats=["html"])


def test_figures_are_written_as_every_kind(store: Path) -> None:
    build(["headline"], store, dataset="nuclei")
    folder = store / "reports" / "headline@mini+nuclei" / "figures"
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        f"{stem}.{kind}"
        for stem in ("effects", "layers", "training", "stability", "attention")
        for kind in ("svg", "pdf", "png", "csv")
    }


def test_a_suite_that_is_not_finished_is_left_alone_too(store: Path, blank_figures: None) -> None:
    """Until something changes, be it only that a heartbeat has grown old."""
    page = store / "reports" / "components@mini" / "index.html"

    def again() -> int:
        build(["components"], store, formats=LIGHT)
        return page.stat().st_mtime_ns

    first = again()
    assert again() == first
    for claim in next((store / "runs").glob(f"{LIVE}*")).glob("claims/*"):
        os.utime(claim, (0, 0))
    second = again()
    assert second != first
    assert "lost" in page.read_text()
    assert again() == second


def test_accounting_that_comes_late_is_shown_on_the_page_of_its_run_alone(store: Path, blank_figures: None) -> None:
    def again() -> dict[str, int]:
        build(["headline"], store, formats=LIGHT)
        pages = (store / "reports" / "headline@mini" / "runs").glob("*.html")
        return {path.name: path.stat().st_mtime_ns for path in pages}

    first = again()
    run = next((store / "runs").glob("shapes-panoptic-m2f-s0-*")).name
    launch = store / "launches" / "20260701-120000-late"
    launch.mkdir(parents=True)
    job = {"run_id": run, "element": "7_0", "elapsed": 5400.0, "gpus": 0, "max_rss": 3 << 30}
    usage.write(launch, usage.Usage({"7_0": job}))
    second = again()
    (changed,) = [name for name in first if second[name] != first[name]]
    assert run in changed
    page = (store / "reports" / "headline@mini" / "runs" / changed).read_text()
    assert "(sacct and own counters)" in page
    assert "peak memory 3.00 GiB" in page
    assert again() == second


def test_what_cannot_be_shown_becomes_a_box_and_the_page_is_there(
    store: Path, blank_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explorer, "LIMIT", 100)
    (store / "runs" / next((store / "runs").iterdir()).name / "attempts" / "nowhere").symlink_to("/nowhere/at/all")
    drawn = figures._draw

    def refuses(plan: figures.Plan, stem: Path, kinds: Any) -> Any:
        if plan.name == "layers":
            raise ValueError("a name that is <no> mathematics")
        return drawn(plan, stem, kinds)

    monkeypatch.setattr(figures, "_draw", refuses)
    build(["headline"], store, formats=LIGHT)
    page = (store / "reports" / "headline@mini" / "index.html").read_text()
    assert "The layer explorer cannot be shown: the page would be" in page
    assert (
        '<h3>Layer by layer</h3>\n<p class="notice">It cannot be shown: a name that is &lt;no&gt; mathematics' in page
    )
    assert 'id="figure-training"' in page


def test_class_names_that_are_no_mathematics_are_drawn(store: Path) -> None:
    for path in (store / "runs").glob("*/evals/*/layer_masks/[0-9]*.json"):
        path.write_text(path.read_text().replace('"class_name": "', '"class_name": "5$ ^_{ 界 '))
    build(["headline"], store, formats=["html", "svg"])
    page = (store / "reports" / "headline@mini" / "index.html").read_text()
    assert "cannot be shown" not in page
    assert (store / "reports" / "headline@mini" / "figures" / "gallery.svg").exists()


def test_changed_data_is_drawn_again(store: Path, blank_figures: None) -> None:
    build(["headline"], store, dataset="nuclei", formats=["html"])
    svg = store / "reports" / "headline@mini+nuclei" / "figures" / "training.svg"
    before = svg.read_text()
    for path in store.glob("runs/nuclei-*/metrics.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:10]))
    build(["headline"], store, dataset="nuclei", formats=["html"])
    assert svg.read_text() != before


def test_a_kind_left_out_of_one_build_is_not_taken_for_current(store: Path, blank_figures: None) -> None:
    def files() -> tuple[str, str]:
        folder = store / "reports" / "headline@mini+nuclei" / "figures"
        return (folder / "training.svg").read_text(), (folder / "training.pdf").read_text()

    build(["headline"], store, dataset="nuclei")
    first = files()
    for path in store.glob("runs/nuclei-*/metrics.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:10]))
    build(["headline"], store, dataset="nuclei", formats=["html"])
    second = files()
    assert second[0] != first[0]
    assert second[1] == first[1], "not asked for"
    build(["headline"], store, dataset="nuclei")
    assert files()[0] == second[0]
    assert files()[1] != first[1]


def test_formats_out_columns_and_decimals(store: Path, tmp_path: Path) -> None:
    written = build(["headline"], store, out=tmp_path / "x", formats=["md"], columns=["AP"], decimals=2)
    assert written == [tmp_path / "x" / "headline@mini" / "table.md"]
    assert "| 15.66" in written[0].read_text() or "**15.66**" in written[0].read_text()
    with pytest.raises(UserError, match="unknown report format 'docx'; valid: md, tex"):
        build(["headline"], store, formats=["docx"])


def test_unwritable_output_is_one_clear_line(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"cannot write the report to .*file: Not a directory; choose another with --out"
    ):
        build(["headline"], store, out=tmp_path / "file", formats=["md"])


def test_reading_leaves_the_runs_alone(store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (store / "runs").rglob("*")}
    build(["components"], store, formats=["md"])
    assert {path: path.stat().st_mtime_ns for path in (store / "runs").rglob("*") if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


def test_check_has_nothing_outside_at_mini(store: Path) -> None:
    outside, others = check([], store, scale="mini")
    assert outside == []
    assert any("same direction" in line for line in others)
    assert not any("\x1b" in line for line in others)


def test_reports_and_explorer_import_no_torch_nor_plotting() -> None:
    code = (
        "import sys; import reports.build, reports.explorer; "
        "heavy = {'torch', 'detectron2', 'matplotlib', 'pandas', 'mlflow', 'pyarrow', 'scipy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_format_of_figures_alone_draws_them_and_writes_no_page(store: Path) -> None:
    written = {path.name for path in build(["headline"], store, dataset="nuclei", formats=["png"])}
    assert {"layers.png", "layers.svg", "layers.csv"} <= written
    assert not any(name.endswith((".html", ".pdf")) for name in written)


def test_a_report_of_archived_runs_is_the_same(store: Path, blank_figures: None) -> None:
    def tables() -> list[str]:
        build(["headline"], store, formats=LIGHT)
        folder = store / "reports" / "headline@mini"
        runs = sorted(path.name for path in (folder / "runs").iterdir())
        return [(folder / name).read_text() for name in ("table.md", "table.json", "macros.tex")] + runs

    before = tables()
    opened = Store(store)
    record = opened.suites()["headline@mini"]
    packed = [one for one in archiving.archive(opened, [record]) if one.what == "archived"]
    assert packed
    assert not any((store / "runs" / one.run_id).exists() for one in packed)
    assert tables() == before
    assert not any((store / "runs" / one.run_id).exists() for one in packed), "reading unpacks nothing in its place"
