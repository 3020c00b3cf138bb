"""How long the layer explorer takes to open: `python -m benchmarks.explorer_speed`, with Chromium and playwright.

Targets, on one idle core: 500 images x 10 layers x 20 queries open in under 2 s and stay under 30 MB, for one run and
for two side by side. The masks are invented, by the test that holds the page to a looser limit; they have no pictures.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from reports.explorer import build_explorer
from tests.reports.test_in_browser import big_run

ROUNDS = 5


def main() -> None:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        made = {images: big_run(Path(folder) / f"run-{images}", images) for images in (100, 500)}
        for images, runs in ((images, [run] * n) for images, run in made.items() for n in (1, 2)):
            started = time.perf_counter()
            out = Path(folder) / f"{images}-{len(runs)}.html"
            built = build_explorer(runs, out, labels=["a", "b"][: len(runs)])
            seconds = time.perf_counter() - started
            opened = sorted(_open(browser, built) for _ in range(ROUNDS))
            size = built.stat().st_size / 2**20
            print(
                f"{images} images, {len(runs)} run(s): {size:.1f} MB, written in {seconds:.1f} s, "
                f"opened in {opened[ROUNDS // 2]:.2f} s (median), {opened[0]:.2f} s (least)"
            )
        browser.close()


def _open(browser: Any, path: Path) -> float:
    """Seconds until the first image's masks are drawn."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(600_000)  # a machine that does other things too takes longer, and says how long
    started = time.perf_counter()
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")
    seconds = time.perf_counter() - started
    page.close()
    return seconds


if __name__ == "__main__":
    main()
