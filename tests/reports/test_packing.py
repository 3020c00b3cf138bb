"""A report in one file, and as a zip: everything in it, working links, nothing fetched."""

import importlib.util
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mpformer.runtime.errors import UserError
from reports import packing
from reports.build import build
from reports.commands import report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def written(shared_store: Path, shared_blank_figures: None) -> list[Path]:
    return build(["headline"], shared_store, formats=["html", "md", "svg"])


def test_zip(written: list[Path], shared_store: Path) -> None:
    path = packing.zipped(written, shared_store / "reports")
    first = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == len(set(written))
        assert (
            archive.read("report/headline@mini/table.md")
            == (shared_store / "reports/headline@mini/table.md").read_bytes()
        )
    assert packing.zipped(written, shared_store / "reports").read_bytes() == first


def test_the_command_packs(store: Path, blank_figures: None) -> None:
    words = ["headline", "--dataset", "nuclei", "--root", str(store), "--single-file", "--zip", "--json"]
    done = CliRunner().invoke(report, words, catch_exceptions=False, standalone_mode=False)
    listed = [Path(path).name for path in json.loads(done.stdout)]
    assert listed[-2:] == ["headline@mini+nuclei.html", "report.zip"]
    with pytest.raises(UserError, match="--single-file packs pages"):
        CliRunner().invoke(report, [*words, "--format", "md"], catch_exceptions=False, standalone_mode=False)


@pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None, reason="needs chromium, playwright"
)
def test_one_file_works_without_the_others(written: list[Path], shared_store: Path, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    (made,) = packing.single_files(written, shared_store / "reports")
    alone = tmp_path / "alone.html"
    alone.write_bytes(made.read_bytes())
    troubles: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page: Any = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        page.set_default_timeout(60_000)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "request",
            lambda r: None if r.url.startswith(("file:", "data:", "about:", "blob:")) else troubles.append(r.url),
        )
        page.goto(alone.as_uri())
        page.wait_for_selector("body[data-ready='index.html']")
        inside = page.frame_locator("#page")
        inside.locator("#table[data-ready]").wait_for()
        inside.locator("td.cell a").nth(5).click()
        inside.locator("#cell a", has_text="seed 1").click()
        page.wait_for_selector("body[data-ready^='runs/']")
        assert inside.locator("h1").inner_text() == "MP-Former, seed 1"
        page.go_back()
        page.wait_for_selector("body[data-ready='index.html']")
        inside.locator("a", has_text="Explore these runs").click()
        page.wait_for_selector("body[data-ready='explorer.html']")
        inside.locator("body[data-ready='yes']").wait_for()
        inside.locator("a", has_text="The suite's page").click()
        page.wait_for_selector("body[data-ready='index.html']")
        with page.expect_download() as download:
            inside.locator("a", has_text="Markdown").click()
        assert download.value.suggested_filename == "table.md"
        browser.close()
    assert troubles == []
