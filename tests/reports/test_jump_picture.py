"""The picture that opens a page, from the fixture store: whose it is, what it says, and what it says it cannot show."""

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from analysis import film_strip
from reports import jump_picture, pages
from reports.collect import SuiteReport
from reports.explorer import build_explorer

Gather = Callable[..., SuiteReport]


def inflate(text: str) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(text), -15))


def of(report: SuiteReport) -> jump_picture.JumpPicture | None:
    gallery = pages.find_gallery(report)
    return jump_picture.of_suite(report, gallery.found if gallery else None, gallery.views if gallery else ())


def test_two_runs_of_one_seed_with_their_masks(gather: Gather) -> None:
    picture = of(gather("headline"))
    assert picture is not None
    assert [run.name for run in picture.runs] == ["Mask2Former", "MP-Former"]
    assert {run.seed for run in picture.runs} == {0}
    assert "Masks are stored of 4 of 10 images (evaluation.layer_mask_images)" in picture.caption()
    assert "things of at least 5 % of the image" in picture.caption()
    assert len(picture.cases) == 2
    found = jump_picture.view(picture, strips=True)
    assert found["title"].startswith("Of these two checkpoints, ")  # one seed has a layer table
    lines = inflate(found["index"])["lines"]
    assert [sorted((image, obj) for image, obj, _ in mine) for mine in lines] == [
        [(1 + k // 4, k % 4) for k in range(40)]
    ] * 2
    assert [image for image, _ in found["strips"]] == [1, 2, 3, 4]
    strip = inflate(found["strips"][0][1])["objects"]["0"]
    assert [len(run["steps"]) for run in strip["runs"]] == [7, 7]
    (first, _) = picture.cases
    assert [[jumped for _, jumped, _ in tiles] for tiles in found["cases"][0]["tiles"]] == [
        [step.jumps for step in track.steps] for track in first.tracks if track
    ]


def test_strips_that_do_not_fit_are_left_out(gather: Gather, monkeypatch: Any) -> None:
    monkeypatch.setattr(jump_picture, "PACKED", 0)
    picture = of(gather("headline"))
    assert picture is not None
    assert jump_picture.view(picture, strips=True)["strips"] == []


def test_barcodes_alone_without_masks(gather: Gather, store: Path) -> None:
    for index in store.glob("runs/*/evals/*/layer_masks/index.json"):
        index.unlink()
    picture = of(gather("headline"))
    assert picture is not None
    found = jump_picture.view(picture, strips=True)
    assert (found["cases"], found["strips"], found["unmet"]) == ([], [], False)
    assert inflate(found["index"])["kept"] == "0 of 10 images keep theirs"


def test_a_picture_without_an_object_that_meets_the_rule_says_so(gather: Gather, monkeypatch: Any) -> None:
    monkeypatch.setattr(film_strip, "GOOD", 1.1)
    picture = of(gather("headline"))
    assert picture is not None
    assert picture.cases == ()
    assert "None of these images has one, so that no strip is shown. Red: " in picture.caption()
    assert "On target" not in picture.caption()
    assert jump_picture.view(picture, strips=True)["unmet"]


def test_no_picture_without_layer_tables(gather: Gather, store: Path) -> None:
    for table in store.glob("runs/*/evals/*/layers.parquet"):
        table.unlink()
    assert of(gather("headline")) is None


def test_the_figure_and_its_numbers(gather: Gather) -> None:
    report = gather("headline")
    picture = of(report)
    figure, thresholds = jump_picture.plans(report, picture)
    rates = figure.data[figure.data["measure"] == "jump-rate"].set_index("row")["value"]
    patterns = figure.data[figure.data["measure"].str.startswith("objects that jump at")]
    assert patterns.groupby("row")["value"].sum().tolist() == [40, 40]
    jumped = patterns[patterns["measure"].str.contains("1")].groupby("row")["value"].sum() / 40 * 100
    assert rates["Mask2Former"] == jumped.get("Mask2Former", 0)
    at_half = thresholds.data[(thresholds.data["threshold"] == 0.5) & (thresholds.data["measure"] == "jump-rate")]
    assert at_half.set_index("row")["value"].to_dict() == rates.to_dict()


def test_the_explorer_opens_with_it(store: Path, tmp_path: Path) -> None:
    runs = [
        next(store.glob(f"runs/{name}-*"))
        for name in ("shapes-panoptic-m2f-s0", "shapes-panoptic-mp-every-n0.2-f0.2-s0")
    ]
    page = build_explorer(runs, tmp_path / "two.html").read_text()
    assert page.index('id="jumps"') < page.index('id="panes"')
    assert 'data-strip="' not in page  # the explorer has the masks already
    assert "jumps-case opposite" in page
    one = build_explorer(runs[:1], tmp_path / "one.html").read_text()
    assert "of the objects’ masks jump on the way" in one
    next(runs[0].glob("evals/*/layers.parquet")).unlink()
    assert 'id="jumps"' not in build_explorer(runs, tmp_path / "two.html").read_text()
