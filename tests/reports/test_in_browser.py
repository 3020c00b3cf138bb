"""The pages in a real headless Chromium: no error, no request, no sideways scrolling; deep links, clicks, keys."""

import importlib.util
import json
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from reports.build import build
from reports.explorer import build_explorer
from tests.support.make_fixture_store import RowSpec, make_run, make_suite

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="needs chromium"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="needs playwright"),
]
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Open a file; the test fails on any console message, script error or request for something else."""
    troubles: list[str] = []
    pages = []

    def opened(path: Path, width: int = 1280, fragment: str = "", **options: Any) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        pages.append(page)
        page.set_default_timeout(60_000)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else troubles.append(r.url))
        page.goto(path.as_uri() + fragment)
        return page

    yield opened
    for page in pages:
        page.close()
    assert troubles == []


def until(page: Any, expression: str) -> None:
    """Wait for an expression; the page's security policy forbids Playwright's own polling, which evaluates strings."""
    end = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.02)


def overflow(page: Any) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.fixture(scope="module")
def site(shared_store: Path, shared_blank_figures: None) -> Path:
    """The overview and the pages of all suites, without drawing figures."""
    build([], shared_store, formats=["html", "md"])
    return shared_store / "reports"


def test_pages(site: Path, open_page: Any, tmp_path: Path) -> None:
    for width in WIDTHS:
        for name in ("index.html", "components@mini/index.html", "headline@mini/index.html"):
            page = open_page(site / name, width)
            assert overflow(page) == 0
            image = page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
            assert len(image) > 20_000
    hostile = open_page(site / "components@mini" / "index.html")
    assert hostile.locator("table.paper tbody th").nth(4).inner_text().startswith("<script>alert(1)</script> \\input")
    assert hostile.evaluate("[...document.scripts].filter((script) => !script.type).length") == 1  # the others are data

    # a number opens what is behind it, that leads to its row, the row to the pages of its runs, which can be linked to
    page = open_page(site / "headline@mini" / "index.html")
    page.locator("td.cell a").nth(5).click()
    page.locator("#cell a", has_text="The row's runs").click()
    assert page.url.endswith("#row-mp-former")
    page.locator("#row-mp-former a", has_text="seed 1").click()
    page.wait_for_load_state()
    assert "/runs/shapes-panoptic-mp-every-n0.2-f0.2-s1-" in page.url
    assert page.locator("h1").inner_text() == "MP-Former, seed 1"
    run = Path(unquote(urlsplit(page.url).path))
    for width in WIDTHS:
        page = open_page(run, width, "#configuration")
        assert overflow(page) == 0
        assert page.evaluate("document.getElementById('configuration').open") is True
        assert len(page.screenshot(path=tmp_path / f"run-{width}.png", full_page=True)) > 20_000
    assert "mpformer launch headline --scale mini" in page.locator(".copy pre").first.inner_text()
    page.locator("[data-copy]").first.click()
    until(page, "document.querySelector('[data-copy]').textContent != 'copy'")
    page.locator(".crumb a").nth(1).click()
    page.wait_for_load_state()
    assert unquote(page.url).endswith("headline@mini/index.html")

    page.locator("a[href='explorer.html']").first.click()
    page.wait_for_load_state()
    page.locator("header a", has_text="The suite's page").click()
    page.wait_for_load_state()
    assert unquote(page.url).endswith("headline@mini/index.html#gallery")

    # dark, and printed
    dark = open_page(site / "headline@mini" / "index.html", color_scheme="dark")
    assert dark.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    dark.emulate_media(media="print")
    assert dark.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not dark.locator("nav.sections").is_visible()
    assert len(dark.pdf()) > 50_000


@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="needs pdftotext")
def test_print_keeps_headings_with_their_figures(site: Path, open_page: Any, tmp_path: Path) -> None:
    page = open_page(site / "headline@mini" / "index.html")
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    read = subprocess.run(["pdftotext", tmp_path / "page.pdf", "-"], capture_output=True, check=True, timeout=120)
    sheets = [" ".join(sheet.split()) for sheet in read.stdout.decode().split("\f")]
    figures = page.locator("figure").all()
    assert len(figures) > 5
    for figure in figures:
        title, caption = (figure.locator(part).inner_text() for part in ("h3", "figcaption"))
        assert any(title in sheet and caption[:40] in sheet for sheet in sheets), title


def column(page: Any, k: int) -> list[str]:
    """The shown numbers of a column, from top to bottom."""
    cells = page.locator(f"tr[data-row]:not([hidden]) td.cell[data-column='{k}'] .num").all_inner_texts()
    return [str(each) for each in cells]


def test_sorting_filter_and_columns(site: Path, open_page: Any) -> None:
    page = open_page(site / "components@mini" / "index.html")
    page.wait_for_selector("#table[data-ready]")
    before = column(page, 0)
    score = page.locator("th[data-sort='0']")
    score.locator("button").click()
    assert score.get_attribute("aria-sort") == "descending"
    assert column(page, 0) == ["15.7†", "13.6", "13.3", "12.8", "15.9"], "what has no result comes last"
    score.locator("button").press("Enter")
    assert score.get_attribute("aria-sort") == "ascending"
    assert column(page, 0)[:3] == ["13.3", "13.6", "15.7†"]
    score.locator("button").click()
    assert (score.get_attribute("aria-sort"), column(page, 0)) == ("none", before)

    page.locator("#table-filter").fill("every guided")
    assert page.locator("#table-count").inner_text() == "1 of 5 rows"
    assert page.locator("tr[data-row]:not([hidden]) th").all_inner_texts() == ["+ every layer guided b"]
    page.locator("#table-filter").fill("")
    assert page.locator("tr[data-row]:not([hidden])").count() == 5

    consistency = page.locator("th.group", has_text="Consistency").locator("button")
    assert page.locator("th[data-column='4']").is_visible()
    consistency.click()
    assert consistency.get_attribute("aria-expanded") == "false"
    assert not page.locator("th[data-column='4']").is_visible()
    consistency.press("Enter")
    assert page.locator("th[data-column='4']").is_visible()
    page.locator(".choose summary").click()
    page.locator("[data-choose='1']").uncheck()
    assert not page.locator("td.cell[data-column='1']").first.is_visible()
    assert page.locator("th.group", has_text="Panoptic").count() == 1
    assert not page.locator("th.group", has_text="Panoptic").is_visible()


def test_a_seed_that_is_switched_off_leaves_every_mean(site: Path, open_page: Any) -> None:
    page = open_page(site / "headline@mini" / "index.html")
    page.wait_for_selector("#table[data-ready]")
    data = json.loads(page.locator("#table-data").text_content())
    values = [
        dict(row["cells"][0]["values"] and [(v[0], v[1]) for v in row["cells"][0]["values"]]) for row in data["rows"]
    ]
    before = page.locator("table.paper").inner_text()
    assert page.locator("svg.dots").count() == 10
    page.locator("[data-seed='1']").uncheck()
    cell = page.locator("tr[data-row='1'] td.cell").first
    assert cell.locator(".num").inner_text() == f"{(values[1][0] + values[1][2]) / 2:.1f}"
    difference = (values[1][0] + values[1][2] - values[0][0] - values[0][2]) / 2
    assert cell.locator(".delta").inner_text() == f"{difference:+.1f}"
    assert cell.locator(".number").get_attribute("class") == "number partial", "it is not the table's number"
    assert "2 of 3 seeds" in cell.inner_text()
    assert "Means without seed 1" in page.locator("#table-said").inner_text()
    page.locator("[data-seed='1']").check()
    assert page.locator("table.paper").inner_text() == before
    page.locator("#dots").uncheck()
    assert page.locator("svg.dots").count() == 0


def test_what_is_behind_a_number_by_keyboard_mouse_and_touch(site: Path, open_page: Any) -> None:
    path = site / "headline@mini" / "index.html"
    page = open_page(path)
    page.wait_for_selector("#table[data-ready]")
    number = page.locator("tr[data-row='1'] td.cell a").first
    number.focus()
    page.keyboard.press("Enter")
    box = page.locator("#cell")
    assert box.is_visible()
    assert page.evaluate("document.activeElement.className") == "close"
    for part in ("MP-Former: AP", "95 % interval", "difference +2.3*", "seed 0", "seed 2", "after Holm"):
        assert part in box.inner_text(), part
    page.keyboard.press("Escape")
    assert not box.is_visible()
    assert page.evaluate("document.activeElement.closest('td.cell') !== null"), "back to where it was opened"
    number.hover()
    until(page, "document.getElementById('cell').matches(':popover-open')")
    page.mouse.click(5, 5)
    assert not box.is_visible()
    finger = open_page(path, 390, has_touch=True, is_mobile=True)
    finger.wait_for_selector("#table[data-ready]")
    finger.locator("td.cell a").first.tap()
    assert finger.locator("#cell").is_visible()
    bounds = finger.locator("#cell").bounding_box()
    assert bounds["x"] >= 0
    assert bounds["x"] + bounds["width"] <= 390
    finger.locator("#cell a", has_text="seed 1").tap()
    finger.wait_for_url("**/runs/*")


def test_a_suite_of_171_rows(tmp_path: Path, blank_figures: None, open_page: Any) -> None:
    """Issue 14: it was 133,000 pixels high and had 36,574 nodes."""
    rows = [RowSpec("mask2former", "Mask2Former", {"mp_queries": False}, 0.0, ("done",) * 3)]
    for i in range(170):
        toggles = {"mp_queries": True, "point_noise": i % 34 / 100, "flip_noise": i // 34 / 10}
        label = f"point noise {i % 34 / 100:g}, flip noise {i // 34 / 10:g}"
        rows.append(RowSpec(f"row-{i}", label, toggles, i % 11 / 4, ("done",) * 3))
    for run in make_suite(tmp_path, "grid", "shapes", "A grid", "unknown", tuple(rows)):
        make_run(tmp_path / "runs", run)
    build(["grid"], tmp_path, formats=["html"])
    page = open_page(tmp_path / "reports" / "grid@mini" / "index.html", 1400, "#row-row-150")
    page.wait_for_selector("#table[data-ready]")
    assert page.evaluate("document.querySelectorAll('*').length") < 9_000
    assert page.evaluate("document.documentElement.scrollHeight") < 25_000
    group = page.locator("tr.rows button", has_text="170 rows")
    last = page.locator("tr[data-row='170']")
    assert last.is_visible()
    group.click()
    assert group.get_attribute("aria-expanded") == "false"
    assert not last.is_visible()
    assert page.locator("tr[data-row='0']").is_visible(), "the baseline is of another group"
    group.press("Enter")
    assert last.is_visible()
    until(page, "document.querySelector('#row-row-150 .inside a') !== null")  # made when it is opened
    page.locator("#row-row-150 a").first.click()
    assert "/runs/" in page.url


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's script, from the npm registry; nothing of it is kept here."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm, which fetches axe-core")
    folder = tmp_path_factory.mktemp("axe")
    fetched = subprocess.run(["npm", "pack", "axe-core@4", "--silent"], cwd=folder, capture_output=True, timeout=120)
    if fetched.returncode:
        pytest.skip(f"axe-core cannot be fetched from the npm registry: {fetched.stderr.decode()[-200:]}")
    with tarfile.open(next(folder.glob("axe-core-*.tgz"))) as archive:
        script = archive.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(site: Path, browser: Any, axe: str, scheme: str, width: int) -> None:
    run = next((site / "headline@mini" / "runs").glob("*.html"))
    pages: list[str | Path] = [
        "index.html",
        "headline@mini/index.html",
        "components@mini/index.html",
        "headline@mini/explorer.html",
        run,
    ]
    found = []
    for path in pages:
        # axe is a script of its own: the page's policy would not let it run
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
        page.set_default_timeout(60_000)
        page.goto((site / path).as_uri())
        page.wait_for_timeout(300)
        page.evaluate(axe)
        tell = "v => v.nodes.map(n => `${v.id}: ${n.html.slice(0, 160)} | ${n.failureSummary.slice(0, 240)}`)"
        violations = page.evaluate(f"axe.run().then(r => r.violations.flatMap({tell}))")
        found += [f"{path}: {violation}" for violation in violations]
        page.close()
    assert found == []


def test_the_opening_picture(site: Path, open_page: Any, tmp_path: Path) -> None:
    """Drag through the layers; click a line of a barcode to load its strip; other lines say that they cannot."""
    for width in WIDTHS:
        page = open_page(site / "headline@mini" / "index.html", width)
        page.wait_for_selector("#jumps[data-ready]")
        assert page.locator("main > section").first.get_attribute("id") == "jumps"
        page.locator("#jumps").screenshot(path=tmp_path / f"{width}.png")
    page.locator(
        "#jumps-layer"
    ).scroll_into_view_if_needed()  # the mouse knows no elements: what it is over has to be seen
    slider = page.locator("#jumps-layer").bounding_box()  # dragged, from one end to the other
    page.mouse.move(slider["x"] + 1, slider["y"] + slider["height"] / 2)
    page.mouse.down()
    assert page.locator("#jumps-name").inner_text() == "start"
    page.mouse.move(slider["x"] + slider["width"] - 1, slider["y"] + slider["height"] / 2, steps=12)
    page.mouse.up()
    assert page.locator("#jumps-name").inner_text() == "layer 6"
    page.locator("#jumps-case .q0 .jumps-step").nth(3).hover()  # and over the strip
    assert page.locator("#jumps-name").inner_text() == "layer 3"
    page.mouse.move(0, 0)  # away, or the page that scrolls below the mouse chooses a layer
    page.locator("#jumps-layer").fill("4")
    assert page.locator("#jumps-name").inner_text() == "layer 4"
    shown = "document.querySelectorAll('.jumps-large .mask')[{}].getAttribute('d')"
    fourth = page.locator("#jumps-case .q0 .jumps-step").nth(4).locator(".mask").get_attribute("d")
    assert page.evaluate(shown.format(0)) == fourth
    page.locator("#jumps-case .q1 .jumps-step").nth(2).click()
    assert page.locator("#jumps-name").inner_text() == "layer 2"

    # by keyboard: the next object whose masks are stored
    before = page.locator("#jumps-case [data-name]").inner_text()
    page.locator("[data-object='1']").focus()
    page.keyboard.press("Enter")
    until(page, f"document.querySelector('#jumps-case [data-name]').textContent != {json.dumps(before)}")
    assert "Mask2Former" in page.locator("#jumps-said").inner_text()

    # every line of the first barcode in turn: images 1 to 4 keep their masks, 5 to 10 do not
    bars = page.locator(".jumps-bars").first
    height = bars.bounding_box()["height"]
    told = set()
    for line in range(40):
        bars.click(position={"x": 20, "y": height * (line + 0.5) / 40})
        said = page.locator("#jumps-said").inner_text()
        image = int(said.split()[1].rstrip(","))
        assert ("not stored: 4 of 10 images keep theirs" in said) == (image > 4)
        assert ("mpformer visualize" in said) == (image > 4)
        told.add(image)
        if image <= 4:
            until(page, f"document.querySelector('#jumps-case [data-name]').textContent.endsWith('image {image}')")
    assert told == set(range(1, 11))


def explorer_page(store: Path, out: Path) -> Path:
    patterns = ("shapes-panoptic-m2f-s0-*", "shapes-panoptic-mp-every-n0.2-f0.2-s0-*")
    return build_explorer([next((store / "runs").glob(p)) for p in patterns], out)


def ready(page: Any) -> Any:
    page.wait_for_selector("body[data-ready]")
    return page


def test_explorer(store: Path, tmp_path: Path, open_page: Any) -> None:
    path = explorer_page(store, tmp_path / "explorer.html")
    page = ready(open_page(path))
    assert page.locator("#panes canvas").count() == 2
    assert page.locator("#films .film button").count() == 14
    assert page.locator("#list button").count() == 16

    # the browser decodes what was encoded: cells of the first run's mask, layer by layer
    (source,) = store.glob("runs/shapes-panoptic-m2f-s0-*/evals/*/layer_masks/1.json")
    record = json.loads(source.read_text())
    from analysis.failure_cases import mask_of

    for layer in (0, 3, 6):
        for number, entry in enumerate(record["layers"][layer]["queries"]):
            cells = mask_of(record, entry["rle"]).astype(int).ravel().tolist()
            code = f"load(1).then((item) => [...mask(item.runs[0], item.runs[0].layers[{layer}][{number}][5])])"
            assert page.evaluate(code) == cells

    # an object has one colour on both sides
    page.locator("#all").check()
    colours = page.evaluate(
        "current.runs.map((run, which) => Object.fromEntries(run.layers[6].filter((q) => q[3] >= 0).map("
        "(q, i) => [q[3], masksAt(run, which, 6)[i][1].join()])))"
    )
    assert colours[0] == colours[1]
    assert len(set(colours[0].values())) == 4
    page.locator("#all").uncheck()

    # slider, keyboard, filmstrip, list
    page.locator("#layer").fill("2")
    assert page.locator("#layer-name").inner_text() == "2 of 6"
    expected = record["layers"][2]["queries"][0]["iou_previous"]
    assert f"IoU to the layer before {expected:.2f}" in page.locator(".pane .facts").first.inner_text()
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    until(page, "document.getElementById('layer-name').textContent == '3 of 6'")
    before = page.locator("#panes canvas").first.evaluate("c => c.toDataURL()")
    page.locator("#films .film button").nth(6).click()
    until(page, "document.getElementById('layer-name').textContent == '6 of 6'")
    assert page.locator("#panes canvas").first.evaluate("c => c.toDataURL()") != before
    page.locator("#list button").first.click()
    until(page, "document.querySelectorAll('#list button')[0].getAttribute('aria-current') == 'true'")
    page.keyboard.press("ArrowDown")
    until(page, "document.querySelectorAll('#list button')[1].getAttribute('aria-current') == 'true'")
    page.locator("#list button").nth(9).click()
    until(page, "document.querySelectorAll('#list button')[9].getAttribute('aria-current') == 'true'")
    text = page.locator("#list button").nth(9).inner_text()
    assert f"image={text.split()[1].rstrip(',')}&" in page.url
    page.locator("#all").check()
    page.locator(".queries summary").click()
    page.locator("#queries button").first.click()
    assert "query" in page.locator(".pane .facts").first.inner_text()
    page.select_option("#class", "star")
    assert page.locator("#list button").count() == 4
    page.keyboard.press("]")

    # a deep link, at phone width
    page.locator(".jumps-bars").first.click(
        position={"x": 20, "y": 2}
    )  # the opening: an object of the list, or why not
    until(page, "document.getElementById('jumps-said').textContent.startsWith('Image ')")
    phone = ready(open_page(path, 390, "#image=3&object=2&layer=5"))
    assert phone.locator("#layer-name").inner_text() == "5 of 6"
    assert phone.locator("#image").input_value() == "3"
    assert phone.locator("#object").input_value() == "2"
    assert overflow(phone) == 0
    assert len(phone.screenshot(path=tmp_path / "phone.png")) > 20_000


def test_explorer_of_one_run(store: Path, tmp_path: Path, open_page: Any) -> None:
    run = next((store / "runs").glob("shapes-panoptic-m2f-s0-*"))
    page = ready(open_page(build_explorer([run], tmp_path / "one.html")))
    assert page.locator("#panes canvas").count() == 1


def test_explorer_of_its_promised_size(tmp_path: Path, open_page: Any) -> None:
    """100 images x 10 layers x 20 queries at 128 x 128 cells; `benchmarks/explorer_speed.py` says how fast it opens."""
    run = big_run(tmp_path / "run")
    path = build_explorer([run, run], tmp_path / "big.html", labels=["a", "b"])
    assert path.stat().st_size < 30 * 2**20
    page = ready(open_page(path))
    assert page.locator("#panes canvas").count() == 2
    assert page.locator("#list button").count() == 100  # of 1,000: the others are made as the list is scrolled
    page.evaluate("document.getElementById('list').scrollTop = 1e6")
    until(page, "document.querySelectorAll('#list button').length == 200")


def big_run(folder: Path, images: int = 100) -> Path:
    """Layer masks of the size that the explorer promises to open."""
    import numpy as np
    from pycocotools import mask as coco

    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:128, 0:128]
    places = rng.uniform(1, 127, (60, 4)) / (1, 1, 60, 60)
    discs = [(x - cx) ** 2 / rx + (y - cy) ** 2 / ry < 300 for cx, cy, rx, ry in places]
    shapes = [disc ^ (rng.random((128, 128)) < 0.004) for disc in discs]
    strings = [coco.encode(np.asfortranarray(shape.astype(np.uint8)))["counts"].decode() for shape in shapes]
    masks = folder / "layer_masks"
    masks.mkdir(parents=True)
    for image in range(images):
        layers = [
            {"layer": layer, "queries": [
                {"query": q, "class": 0, "class_name": "x", "score": 0.9, "object": q if q < 10 else -1, "iou_gt": 0.5,
                 "iou_previous": None if layer == 0 else float(rng.random()), "rle": strings[int(rng.integers(0, 60))]}
                for q in range(20)]}
            for layer in range(10)
        ]  # fmt: skip
        objects = [{"object": k, "class": 0, "class_name": "x", "thing": True, "rle": strings[k]} for k in range(10)]
        record = {
            "image_id": image,
            "file": "",
            "image": None,
            "height": 128,
            "width": 128,
            "objects": objects,
            "layers": layers,
        }
        (masks / f"{image}.json").write_text(json.dumps(record))
    listed = [{"image_id": image, "record": f"{image}.json"} for image in range(images)]
    (masks / "index.json").write_text(json.dumps({"images": listed}))
    return folder
