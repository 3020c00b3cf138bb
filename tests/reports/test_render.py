"""Templates against committed texts, escaping in every format, and LaTeX that compiles.

After a wanted change: `MPFORMER_UPDATE_GOLDEN=1 pytest tests/reports/test_render.py`, then read the difference.
"""

import csv
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from reports import escape, pages, text
from reports import run_page as provenance
from reports.build import _with_published
from reports.collect import SuiteReport
from reports.formats import TABLES, render
from reports.model import Cell, Column, Delta, Kind, Table
from reports.render import macro_values, marks

GOLDEN = Path(__file__).parent / "golden"
Gather = Callable[..., SuiteReport]
HOSTILE = (
    "<script>alert(1)</script> \\input{/etc/passwd} ${PATH} | a_b \x1b[31mred {{ 7*7 }} <<7*7>> %x &amp; `id` ~ ^ #"
)
COLUMN = Column("AP", "AP", "Instance", "AP: x.")


_LONG = re.compile(r"\d+\.\d{10,}")
"""Numbers whose last decimals differ from one kind of processor to another."""


def golden(name: str, content: str) -> None:
    path, content = GOLDEN / name, _LONG.sub(lambda found: f"{float(found[0]):.9f}", content)
    if os.environ.get("MPFORMER_UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(content)
    assert content == path.read_text()


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize(("suite", "dataset"), [("headline", None), ("components", None), ("headline", "nuclei")])
def test_template(gather: Gather, suite: str, dataset: str | None, form: str) -> None:
    report = _with_published(gather(suite, dataset))
    golden(f"{report.table.name}.{TABLES[form].removeprefix('table.')}", render(report.table, form))


def test_page_template(gather: Gather, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "stamp", lambda: "made at a fixed time")
    page = pages.suite_page(_with_published(gather("headline", "nuclei")), (), None)
    golden("headline@mini+nuclei.html", page)


def test_overview_and_run_page_templates(gather: Gather, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "stamp", lambda: "made at a fixed time")
    reports = [_with_published(gather(suite)) for suite in ("headline", "components")]
    golden("index.html", pages.index_page([pages.card(report.table) for report in reports]))
    golden("run.html", run_page(reports[1], "mp-former", 2))


def run_page(report: SuiteReport, row: str, seed: int) -> str:
    (found,) = [s for r, runs in provenance.sections(report) if r.name == row for s in runs if s.view.seed == seed]
    return pages.run_page(report, found, index_link="../../index.html")


def hostile(report: SuiteReport) -> SuiteReport:
    """Everything that a run or a person can name is hostile."""
    cells = (Cell(Kind.MISSING, reason=HOSTILE, short=HOSTILE),) * len(report.table.columns)
    rows = tuple(
        replace(row, label=HOSTILE, name=HOSTILE + str(i), note=HOSTILE, cells=cells)
        for i, row in enumerate(report.table.rows)
    )
    notes = tuple(replace(note, text=HOSTILE) for note in report.table.footnotes)
    published = tuple(
        replace(p, row=HOSTILE, why=HOSTILE, source=HOSTILE, where=HOSTILE) for p in report.table.published
    )
    table = replace(
        report.table, title=HOSTILE, caption=HOSTILE, rows=rows, footnotes=notes, dataset=HOSTILE, published=published
    )
    return replace(report, table=table)


@pytest.fixture
def attacked(gather: Gather) -> SuiteReport:
    return hostile(_with_published(gather("headline")))


def test_markdown_shows_hostile_text_as_text(attacked: SuiteReport) -> None:
    content = render(attacked.table, "md")
    assert "<script" not in content
    assert "\x1b" not in content
    assert "&lt;script&gt;" in content
    assert r"\$\{PATH\}" in content
    rows = [line for line in content.splitlines() if line.startswith("| &lt;script")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in rows if "delta" not in line}
    assert widths == {len(attacked.table.columns) + 3}  # no cell of a row broke out of its column


def test_latex_shows_hostile_text_as_text(attacked: SuiteReport) -> None:
    for form in ("tex", "macros"):
        content = render(attacked.table, form)
        assert not re.search(r"^[^%\n]*\\input", content, flags=re.MULTILINE)
        assert "\x1b" not in content
    content = render(attacked.table, "tex")
    assert r"\textbackslash{}input\{/\allowbreak{}etc/\allowbreak{}passwd\} \$\{PATH\}" in content
    assert "49" not in content.replace("-49", "")  # no template ran inside a value


def test_html_shows_hostile_text_as_text(attacked: SuiteReport) -> None:
    page = pages.suite_page(attacked, (), None) + pages.index_page([pages.card(attacked.table)])
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "\x1b" not in page
    assert page.count("<script>") == 2  # the two pages' own


def test_html_log_and_diff_are_text(gather: Gather) -> None:
    page = run_page(gather("headline"), "mp-former", 2)
    assert "+a = 2  # &lt;/pre&gt;&lt;script&gt;alert(2)&lt;/script&gt;" in page
    assert "\u241b[1miteration 80" in page
    assert page.count("<script>") == 1


def test_script_is_allowed_by_its_hash_alone(gather: Gather) -> None:
    page = pages.suite_page(gather("headline", "nuclei"), (), None)
    script = re.search(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert script is not None
    assert f"script-src '{pages.script_hash(script[1])}'" in page
    assert "default-src 'none'" in page
    assert not re.search(r"\son[a-z]+=", page)


def test_csv_is_inert_and_readable(attacked: SuiteReport, gather: Gather) -> None:
    lines = list(csv.DictReader(io.StringIO(render(gather("components").table, "csv"))))
    assert len(lines) == 25
    assert lines[5]["label"] == "'+ MP queries, first layer"  # a spreadsheet would run a leading +
    assert float(lines[0]["mean"]) > 10
    assert "\x1b" not in render(attacked.table, "csv")


def test_json_is_the_whole_model(gather: Gather) -> None:
    table = gather("headline").table
    content = json.loads(render(table, "json"))
    assert content["name"] == "headline@mini"
    assert content["rows"][1]["cells"][0]["delta"]["n"] == 3
    assert len(content["rows"][0]["cells"][0]["values"]) == 3


@pytest.mark.parametrize(
    ("value", "shown"), [(1.25, "+1.2"), (-1.25, "−1.2"), (0.04, "±0.0"), (-0.04, "±0.0"), (12.0, "+12.0")]
)
def test_signed(value: float, shown: str) -> None:
    assert text.signed(value, 1) == shown


def test_significance_needs_three_pairs_and_holm() -> None:
    assert not text.significant(Delta(5.0, 2, p=0.001, p_holm=0.001))
    assert not text.significant(Delta(5.0, 3, 1, 9, p=0.01, p_holm=None))
    assert text.significant(Delta(5.0, 3, 1, 9, p=0.01, p_holm=0.02))
    assert text.interval(Delta(1.0, 1), 1) == "n = 1 pair, no significance"


def test_change_follows_the_direction_of_the_metric() -> None:
    cell = Cell(Kind.VALUE, 1.0, delta=Delta(1.0, 3))
    assert text.change(cell, COLUMN) == "better"
    assert text.change(cell, replace(COLUMN, direction=-1)) == "worse"
    assert text.change(cell, replace(COLUMN, direction=0)) == "same"


def test_row_marks_go_on_after_z(gather: Gather) -> None:
    table = gather("components").table
    many = replace(table, rows=tuple(replace(table.rows[1], name=f"r{i}") for i in range(28)))
    assert list(marks(many).values())[25:] == ["z", "aa", "ab"]


@pytest.mark.parametrize("suite", ["headline", "components"])
def test_every_number_is_a_macro(gather: Gather, suite: str) -> None:
    table = _with_published(gather(suite)).table
    values = dict(macro_values(table))
    for row in table.rows:
        for cell, column in zip(row.cells, table.columns, strict=True):
            key = f"{escape.slug(table.name)}.{escape.slug(row.name)}.{column.key}"
            if cell.has_number:
                assert values[key if cell.kind is Kind.VALUE else f"{key}.{cell.kind}"] == text.mean(cell, column)
            assert values[f"{key}.n"] == str(cell.n)
            assert (f"{key}.std" in values) is (cell.std is not None)
            assert (f"{key}.delta" in values) is (cell.delta is not None)
    shown = [value for key, value in values.items() if ".published." in key]
    assert shown == [item.published for item in table.published]
    assert len(values) == len(macro_values(table)), "no key twice"


def test_differences_have_their_interval_as_macros(gather: Gather) -> None:
    values = dict(macro_values(gather("headline").table))
    key = "headline-mini.mp-former.AP.delta"
    assert values[key] == "+2.3"
    assert float(values[f"{key}.low"]) < 2.3 < float(values[f"{key}.high"])
    assert values[f"{key}.p"] == values[f"{key}.p.holm"]


def test_macros_give_complete_numbers_only(gather: Gather) -> None:
    values = dict(macro_values(gather("components").table))
    assert values["components-mini.mask2former.AP"] == "13.3"
    assert values["components-mini.mask2former.AP.n"] == "3"
    assert values["components-mini.guided.AP"] == "[not available]"
    assert values["components-mini.guided.AP.partial"] == "12.8"
    assert "components-mini.guided.AP.std" not in values


def test_slug() -> None:
    assert escape.slug("<x> a/b..") == "x-a-b"
    assert escape.slug("\u241b") == "x"


def has_siunitx() -> bool:
    """Whether LaTeX and the package that aligns numbers are installed."""
    if shutil.which("pdflatex") is None or shutil.which("kpsewhich") is None:
        return False
    return subprocess.run(["kpsewhich", "siunitx.sty"], capture_output=True).returncode == 0


needs_tex = pytest.mark.skipif(not has_siunitx(), reason="needs pdflatex and siunitx (texlive-science)")


def compile_tex(folder: Path, name: str) -> str:
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (folder / name).with_suffix(".pdf").stat().st_size > 10_000
    return done.stdout


@needs_tex
@pytest.mark.parametrize("suite", ["headline", "components"])
def test_table_compiles_as_it_is(gather: Gather, tmp_path: Path, suite: str) -> None:
    table = _with_published(gather(suite)).table
    (tmp_path / "table.tex").write_text(render(table, "tex"))
    output = compile_tex(tmp_path, "table.tex")
    assert suite != "headline" or "Overfull" not in output
    if shutil.which("pdftotext"):
        assert not missing_on_paper(table, tmp_path / "table.pdf")


def missing_on_paper(table: Table, pdf: Path) -> set[str]:
    """The numbers and names that cannot be read on the pages: cut off, or never typeset."""
    done = subprocess.run(["pdftotext", "-layout", str(pdf), "-"], capture_output=True, text=True, check=True)
    page = done.stdout
    cells = [(cell, column) for row in table.rows for cell, column in zip(row.cells, table.columns, strict=True)]
    wanted = {text.mean(cell, column) for cell, column in cells if cell.has_number}
    wanted |= {text.signed(cell.delta.mean, column.decimals) for cell, column in cells if cell.delta}
    wanted |= {column.label for column in table.columns} | {item.published for item in table.published}
    return {word for word in wanted if word not in page}


@needs_tex
def test_numbers_are_aligned_at_the_point_with_short_caption_and_notes_on_request(
    gather: Gather, tmp_path: Path
) -> None:
    table = _with_published(gather("components")).table
    (tmp_path / "table.tex").write_text(render(table, "tex"))
    pages = []
    for notes in ("", r"\def\mpnotes{}"):
        body = rf"\usepackage{{booktabs,siunitx,graphicx}}\begin{{document}}{notes}\input{{table}}\end{{document}}"
        (tmp_path / "paper.tex").write_text(r"\documentclass{article}" + body)
        compile_tex(tmp_path, "paper.tex")
        done = subprocess.run(["pdftotext", "-bbox", str(tmp_path / "paper.pdf"), "-"], capture_output=True, text=True)
        pages.append(done.stdout)
    assert "Hungarian" in pages[1]
    assert "Hungarian" not in pages[0]
    places = re.findall(r'xMax="([\d.]+)"[^>]*>([^<]*)<', pages[0])
    for column in (0, 1):
        wanted = {text.mean(row.cells[column], table.columns[column]) for row in table.rows}
        ends = {round(float(x), 0) for x, word in places if word in wanted}
        assert len(ends) <= 2, (column, ends)  # one edge (of two when bold digits are wider)


@needs_tex
def test_names_in_chinese_japanese_and_korean_are_spelt_without_their_packages(gather: Gather, tmp_path: Path) -> None:
    table = gather("headline").table
    rows = (replace(table.rows[0], label="基线 ひらがな 한국"), *table.rows[1:])
    (tmp_path / "table.tex").write_text(render(replace(table, rows=rows), "tex"))
    compile_tex(tmp_path, "table.tex")
    done = subprocess.run(["pdftotext", str(tmp_path / "table.pdf"), "-"], capture_output=True, text=True)
    page = re.sub(r"\s", "", done.stdout)
    assert "[U+57FA][U+7EBF]" in page
    assert "hiragana" in page
    assert "hangug" in page
    assert "arespelt" in page


@needs_tex
def test_hostile_table_compiles_and_reads_nothing(attacked: SuiteReport, tmp_path: Path) -> None:
    (tmp_path / "table.tex").write_text(render(attacked.table, "tex"))
    assert "passwd" not in re.sub(r"\s", "", compile_tex(tmp_path, "table.tex"))


@needs_tex
@pytest.mark.parametrize("options", ["", "[twocolumn]"])
def test_tables_and_macros_compile_by_input(gather: Gather, tmp_path: Path, options: str) -> None:
    for name, suite in (("one", "headline"), ("two", "components")):
        report = _with_published(gather(suite))
        table = replace(report.table, rows=tuple(replace(row, label=row.name) for row in report.table.rows))
        table = replace(table, published=tuple(replace(item, row="MP-Former") for item in table.published))
        (tmp_path / f"{name}.tex").write_text(render(table, "tex"))
        (tmp_path / f"{name}macros.tex").write_text(render(table, "macros"))
    key = "headline-mini.mp-former.AP"
    body = rf"\input{{one}}\input{{two}}\input{{onemacros}} AP is \mpnum{{{key}}} (\mpnum{{{key}.delta}})."
    preamble = (
        rf"\documentclass{options}{{article}}\usepackage{{booktabs}}\usepackage{{graphicx}}\usepackage{{siunitx}}"
    )
    (tmp_path / "paper.tex").write_text(rf"{preamble}\begin{{document}}{body}\end{{document}}")
    assert "Overfull" not in compile_tex(tmp_path, "paper.tex")


@needs_tex
def test_unknown_macro_is_an_error(gather: Gather, tmp_path: Path) -> None:
    (tmp_path / "m.tex").write_text(render(gather("headline").table, "macros"))
    (tmp_path / "p.tex").write_text(r"\documentclass{article}\begin{document}\input{m}\mpnum{nothing}\end{document}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "p.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=300)
    assert done.returncode != 0
    assert "No number `nothing'" in done.stdout
