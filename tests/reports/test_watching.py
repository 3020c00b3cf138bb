"""``report --watch``: a server on the loopback address, and pages that load themselves again."""

import importlib.util
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mpformer.runtime.errors import UserError
from reports import watching
from reports.build import build
from tests.reports.conftest import LIVE

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def server(store: Path, blank_figures: None) -> Iterator[ThreadingHTTPServer]:
    build(["components"], store, formats=["html"])
    started = watching.start(store / "reports")
    yield started
    started.shutdown()


def address(server: ThreadingHTTPServer, path: str = "") -> str:
    return f"http://127.0.0.1:{server.server_port}/{path}"


def test_it_serves_this_machine_alone(server: ThreadingHTTPServer, store: Path) -> None:
    assert server.server_address[0] == "127.0.0.1"
    page = urllib.request.urlopen(address(server, "components@mini/")).read().decode()
    assert "setInterval" in page
    assert "connect-src 'self'" in page
    for path in ("../runs/", "%2e%2e/runs/", "..%2fsuites/components@mini.json"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address(server, path))
    other = urllib.request.Request(address(server), headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(other)
    with pytest.raises(UserError, match="choose another with --port"):
        watching.start(store, server.server_port)


def test_a_build_that_fails_is_said_and_the_next_one_tried() -> None:
    said: list[str] = []
    turns = iter((UserError("a record is half-written"), None, KeyboardInterrupt()))

    def rebuild() -> None:
        if (error := next(turns)) is not None:
            raise error

    watching.watch(rebuild, 0.0, said.append)
    assert said == ["a record is half-written"]


@pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None, reason="needs chromium, playwright"
)
def test_the_page_loads_itself_again(server: ThreadingHTTPServer, store: Path) -> None:
    from playwright.sync_api import sync_playwright

    metrics = next((store / "runs").glob(f"{LIVE}*")) / "metrics.jsonl"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page: Any = browser.new_page()
        troubles: list[str] = []
        page.on("console", lambda message: troubles.append(message.text))
        page.goto(address(server, "components@mini/index.html"))
        assert "updated" in page.locator("[data-at]").inner_text()
        before = page.locator("header").inner_text()
        time.sleep(1.5)
        line = next(each for each in map(json.loads, metrics.read_text().splitlines()) if each["kind"] == "train")
        with metrics.open("a") as file:
            file.write(json.dumps(line | {"iteration": 1100}) + "\n")
        build(["components"], store, formats=["html"])
        end = time.monotonic() + 60
        while page.locator("header").inner_text() == before or "1100" not in page.content():
            assert time.monotonic() < end
            time.sleep(0.2)
        assert troubles == []
        browser.close()
