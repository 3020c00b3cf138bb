"""A whole store in which everything that a person, a dataset or a log can name is hostile: text in every format."""

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from reports import answer, escape, figures
from reports.build import build, check, gather
from reports.formats import TABLES
from tests.reports.conftest import copy_store, draw_blanks
from tests.reports.test_escape import HOSTILE

NASTY = (
    "<script>alert(1)</script> \\input{/etc/passwd} ${PATH} $(id) \x1b[31mred\x1b[0m \u202e "
    "<img src=x onerror=alert(2)>"
)
RUN = "<img src=x onerror=alert(3)> \\input{x} ${HOME} $(id) \x1b[1m"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def poisoned(content: Any, keep: Callable[[str], bool] = lambda key: False, key: str = "") -> Any:
    """Plain data with every text replaced, but for those under a key to ``keep``."""
    if isinstance(content, dict):
        return {name: value if keep(name) else poisoned(value, keep, name) for name, value in content.items()}
    if isinstance(content, list):
        return [poisoned(value, keep, key) for value in content]
    return f"{NASTY} {key}" if isinstance(content, str) else content


def poison(path: Path, *keep: str) -> None:
    path.write_text(json.dumps(poisoned(json.loads(path.read_text()), lambda key: key in keep)))


IDENTITY = ("suite", "scale", "columns", "primary", "name", "baseline", "dataset", "run_id", "eval_id", "toggles")


@pytest.fixture(scope="module")
def hostile(shared_store: Path) -> Path:
    """The fixture store, poisoned; one run is called so too."""
    for path in shared_store.glob("suites/*.json"):
        record = json.loads(path.read_text()) | {"overrides": {"dataset.root": NASTY}}
        path.write_text(json.dumps(poisoned(record, lambda key: key in IDENTITY)))
    for run in shared_store.glob("runs/*"):
        record = json.loads((run / "run.json").read_text())
        record["config"]["extra_cfg"] = {"DATASETS.ROOT": f"/data/{NASTY}"}
        record["row"] = NASTY
        (run / "run.json").write_text(json.dumps(record))
        for attempt in run.glob("attempts/*"):
            poison(attempt / "provenance.json")
            poison(attempt / "stage.json", "outcome", "failure_class")
            (attempt / "log.txt").write_text(f"{NASTY}\n</pre>{NASTY}\n")
            events = [json.loads(line) for line in (attempt / "events.jsonl").read_text().splitlines()]
            lines = [json.dumps(event | {"detail": NASTY}) for event in events]
            (attempt / "events.jsonl").write_text("\n".join(lines))
        for path in [*run.glob("void.json"), *run.glob("evals/*/layer_masks/[0-9]*.json")]:
            poison(path, "rle", "image")
        server = {"mlflow_run": NASTY, "experiment": NASTY}
        (run / "mlflow.json").write_text(json.dumps({"servers": {f"http://{NASTY}": server, NASTY: server}}))
    rename(shared_store, next((shared_store / "runs").glob("shapes-panoptic-mp-every-n0.2-f0.2-s0-*")))
    return shared_store


STRUCTURE = {
    *("suite", "scale", "dataset", "columns", "primary", "run_id", "eval_id"),  # what files and columns are called
    *("stage", "outcome", "failure_class", "state", "kind"),  # one of a few words
    *("rle", "image", "record"),  # masks, and names of files
}
WORST = (
    NASTY, "=1+1", "</script><b onclick=alert(1)>", "5$ ^_{ %", r"\end{document}\input{x}", "a|b\n| c", "_hidden",
    "中文 한 ひ", "]]> --> &amp; ${x} `y` {{ 7*7 }}", "[x](javascript:alert(1))", "\x1b[31m\u2066", "",
)  # fmt: skip
DRAWN = ("effects", "layers", "jumps", "gallery")
"""Figures with every kind of text that figures have: rows, classes, runs, captions."""


def poison_everything(store: Path, texts: Sequence[str]) -> None:
    """Replace every text in every record by one of ``texts``; the names of rows stay different, and theirs."""
    turns, names = itertools.cycle(texts), dict[str, str]()

    def text(value: str, key: str) -> str:
        if key in ("name", "baseline"):
            return names.setdefault(value, f"{next(turns)} {len(names)}")
        return next(turns)

    def changed(content: Any, key: str = "") -> Any:
        if isinstance(content, dict):
            return {name: value if name in STRUCTURE else changed(value, name) for name, value in content.items()}
        if isinstance(content, list):
            return [changed(value, key) for value in content]
        return text(content, key) if isinstance(content, str) else content

    for path in sorted([*store.glob("**/*.json"), *store.glob("runs/*/claims/[0-9]")]):
        path.write_text(json.dumps(changed(json.loads(path.read_text()))))
    for path in sorted(store.glob("runs/*/attempts/*/events.jsonl")):
        lines = [json.dumps(changed(json.loads(line))) for line in path.read_text().splitlines()]
        path.write_text("\n".join(lines))
    for path in sorted(store.glob("runs/*/attempts/*/log.txt")):
        path.write_text("\n".join(texts))
    for run in store.glob("runs/*"):
        server = {"mlflow_run": next(turns), "experiment": next(turns)}
        (run / "mlflow.json").write_text(json.dumps({"servers": {f"http://{next(turns)}": server}}))


def written_from(store: Path, drawn: Sequence[str] = ()) -> dict[Path, str]:
    """The text files of the store's report; figures are blank but for those ``drawn`` of one suite."""
    draw = figures._draw
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw_blanks(monkeypatch)
        blank = figures._draw

        def some(plan: figures.Plan, stem: Path, kinds: Sequence[str]) -> dict[str, Any]:
            real = plan.name in drawn and stem.parts[-3] == "headline@mini"
            return (draw if real else blank)(plan, stem, kinds)

        monkeypatch.setattr(figures, "_draw", some)
        paths = build([], store, formats=(*TABLES, "html", "svg"))
    return {path.relative_to(store / "reports"): path.read_text() for path in paths}


class Markup(HTMLParser):
    """The elements of a page, and what of them could act."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.acting: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.acting += [name for name, _ in attrs if name.startswith("on")]
        self.acting += [value or "" for name, value in attrs if name in ("href", "src") and ":" in (value or "")[:12]]


def commands(source: str) -> set[str]:
    return set(re.findall(r"\\([a-zA-Z]+)", source))


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """The report of the fixture store as it is."""
    return written_from(copy_store(tmp_path_factory.mktemp("harmless") / "store"), DRAWN)


@settings(max_examples=2, deadline=None, phases=[Phase.generate])  # shrinking would take minutes
@given(texts=st.lists(st.one_of(st.sampled_from(WORST), HOSTILE), min_size=6, max_size=12))
def test_any_text_in_any_field_of_any_record_is_text_in_every_format(
    texts: list[str], harmless: dict[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = copy_store(tmp_path_factory.mktemp("any") / "store")
    poison_everything(store, texts)
    found = written_from(store, DRAWN)
    tags = {tag for path, page in harmless.items() if path.suffix == ".html" for tag in Markup(page).tags}
    known = {c for path, source in harmless.items() if path.suffix == ".tex" for c in commands(source)}
    known |= {"texttt", "mpfcjk"} | commands("".join(escape._LATEX.values()))
    for path, content in found.items():
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\u2066]", content), path
        if path.suffix == ".html":
            markup = Markup(content)
            assert markup.tags <= tags, path
            assert all(each.startswith(("data:", "http:")) for each in markup.acting), (path, markup.acting)
            assert content.count("<script>") == 1, path
            assert "cannot be shown" not in content, path
        elif path.suffix == ".svg":
            ElementTree.fromstring(content)
        elif path.suffix == ".tex":
            assert commands(content) <= known, path
            plain = re.sub(r"\\[{}]", "", content)
            assert plain.count("{") == plain.count("}"), path
        elif path.suffix == ".csv":
            lines = list(csv.DictReader(content.splitlines(keepends=True)))
            assert all(None not in line and None not in line.values() for line in lines), path
            assert not [value for line in lines for value in line.values() if re.match(r"\s*[=+@]", value)], path
        elif path.suffix == ".md":
            blocks = itertools.groupby(content.splitlines(), key=lambda line: line.startswith("|"))
            tables = [{len(re.findall(r"(?<!\\)\|", line)) for line in block} for table, block in blocks if table]
            assert tables, path
            assert all(len(columns) == 1 for columns in tables), path
        elif path.suffix == ".json":
            assert json.loads(content)["title"] in texts
    drawn = [
        path for path in found if path.suffix == ".svg" and path.stem in DRAWN and path.parts[0] == "headline@mini"
    ]
    assert len(drawn) == len(DRAWN)
    for report in gather([], store, "mini", None):
        said = "".join([*answer.lines(report.table, 100), answer.sentence(report.table)])
        assert not re.search("[\x00-\x1f\u202e]", said)


def rename(store: Path, run: Path) -> None:
    """Give a run a hostile name, everywhere."""
    for path in [*store.glob("suites/*.json"), run / "run.json", *run.glob("evals/*/result.json")]:
        path.write_text(path.read_text().replace(json.dumps(run.name), json.dumps(RUN)))
    os.rename(run, run.with_name(RUN))


@pytest.fixture(scope="module")
def written(hostile: Path, shared_blank_figures: None) -> dict[Path, str]:
    """Every text file of the report, by path."""
    paths = build([], hostile, formats=(*TABLES, "html"))
    return {path: path.read_text() for path in paths}


def of(written: dict[Path, str], name: str) -> list[str]:
    found = [content for path, content in written.items() if path.name == name]
    assert len(found) == 3
    return found


def test_no_control_character_reaches_any_file(written: dict[Path, str]) -> None:
    assert len(written) > 40
    for path, content in written.items():
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", content), path


def test_markdown(written: dict[Path, str]) -> None:
    for content in of(written, "table.md"):
        assert not re.search(r"<(script|img)", content)
        assert r"\$\{PATH\}" in content
        assert "&lt;script&gt;alert(1)" in content


def test_latex(written: dict[Path, str]) -> None:
    for name in ("table.tex", "macros.tex"):
        for content in of(written, name):
            assert not re.search(r"^[^%\n]*\\input", content, flags=re.MULTILINE)
    assert all(
        r"\textbackslash{}input\{/\allowbreak{}etc/\allowbreak{}passwd\} \$\{PATH\}" in content
        for content in of(written, "table.tex")
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_and_reads_nothing(written: dict[Path, str], tmp_path: Path) -> None:
    for number, content in enumerate(of(written, "table.tex")):
        (tmp_path / f"{number}.tex").write_text(content)
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", f"{number}.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=300)
        assert done.returncode == 0, done.stdout[-1500:]
        assert "(/etc/passwd" not in re.sub(r"\s", "", done.stdout)


def test_html(written: dict[Path, str]) -> None:
    pages = {path: content for path, content in written.items() if path.suffix == ".html"}
    assert len(pages) > 20
    for path, content in pages.items():
        assert not re.search(r"<script>alert|<img[^>]*onerror", content), path
        assert "javascript:" not in content
    shown = "&lt;script&gt;alert(1)&lt;/script&gt; \\input{/etc/passwd} ${PATH} $(id) \u241b[31mred"
    assert all(shown in content for path, content in pages.items() if path.parent.name == "runs")


def test_csv_and_json(written: dict[Path, str]) -> None:
    for content in of(written, "table.csv"):
        lines = list(csv.DictReader(content.splitlines()))
        assert all(line["label"].startswith("<script>alert(1)</script> \\input{/etc/passwd} ${PATH}") for line in lines)
        assert all(not value.startswith(("=", "+", "@")) for line in lines for value in line.values() if value)
    for content in of(written, "table.json"):
        assert NASTY in json.loads(content)["title"], "data is data: a reader of JSON gets the very text"


def test_terminal(hostile: Path) -> None:
    outside, others = check([], hostile, scale="mini")
    assert not re.search("[\x00-\x1f\u202e]", "".join([*outside, *others]))


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_browser_runs_nothing(written: dict[Path, str]) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    troubles: list[str] = []

    def dismissed(dialog: Any) -> None:
        troubles.append(dialog.message)
        dialog.dismiss()

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.set_default_timeout(60_000)
        page.on("dialog", dismissed)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else troubles.append(r.url))
        chosen = [path for path in written if path.suffix == ".html" and path.parent.name != "runs"]
        chosen += [path for path in written if "img-src-x" in path.name][:1]
        assert len(chosen) > 5
        for path in chosen:
            page.goto(path.as_uri())
            assert page.evaluate("[...document.scripts].filter((script) => !script.type).length") == 1
            assert page.evaluate("document.querySelectorAll('img[onerror]').length") == 0
            assert "<script>alert(1)</script> \\input{/etc/passwd} ${PATH}" in page.inner_text("body")
            assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        browser.close()
    assert troubles == []
