"""The explorer's data, limits and messages; the page itself is tried in test_in_browser.py."""

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest

from mpformer.runtime.errors import UserError
from reports import explorer
from reports.explorer import Entry, build_explorer, first_shown
from reports.mask_pictures import deflate


@pytest.fixture
def runs(store: Path) -> list[Path]:
    patterns = ("shapes-panoptic-m2f-s0-*", "shapes-panoptic-mp-every-n0.2-f0.2-s0-*")
    return [next((store / "runs").glob(pattern)) for pattern in patterns]


def index(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="index">(.*?)</script>', page.read_text(), flags=re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def entry(drop: list[float | None], score: list[float | None]) -> Entry:
    return Entry(1, 1, "x", [0] * len(drop), drop, [1] * len(drop), score)


def test_the_page_opens_with_the_strongest_difference_that_is_sure() -> None:
    weak = entry([0.9, 0.0], [0.9, 0.4])  # the largest, but one run is not sure of it
    unmatched = entry([0.9, None], [0.9, None])
    strong, equal = entry([0.8, 0.1], [0.9, 0.5]), entry([0.9, 0.9], [0.9, 0.9])
    assert first_shown([weak, unmatched, equal, strong]) == 3
    assert first_shown([weak, unmatched]) == 0
    assert first_shown([entry([0.2], [0.9]), entry([0.7], [0.6]), entry([0.9], [0.1])]) == 1
    assert first_shown([]) == 0


def test_an_explorer_that_is_too_large_is_packed_harder(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = sorted((store / "runs").glob("shapes-panoptic-m*-s0-*"))[:1]
    monkeypatch.setattr(explorer, "PACKINGS", ((512, True), (16, False)))
    full = build_explorer(runs, tmp_path / "full.html").read_text()
    monkeypatch.setattr(explorer, "LIMIT", len(full.encode()) - 1000)
    packed = build_explorer(runs, tmp_path / "packed.html").read_text()
    assert len(packed) < len(full)
    assert "Queries that end on no object are left out" in packed


def test_list_is_sorted_by_inconsistency_and_aligned_by_object(runs: list[Path], tmp_path: Path) -> None:
    found = index(build_explorer(runs, tmp_path / "x.html"))
    assert found["runs"] == ["mask2former, seed 0", "mp-former, seed 0"]
    assert len(found["entries"]) == 16
    worst = [max(d for d in entry["drop"] if d is not None) for entry in found["entries"]]
    assert worst == sorted(worst, reverse=True)
    assert all(a != b for a, b in (entry["query"] for entry in found["entries"]))


def test_masks_arrive_whole(runs: list[Path], tmp_path: Path) -> None:
    text = build_explorer(runs[:1], tmp_path / "x.html").read_text()
    block = re.search(r'data-masks="1">([^<]+)<', text)
    assert block is not None
    (packed,) = json.loads(zlib.decompress(base64.b64decode(block[1]), -15))
    (source,) = runs[0].glob("evals/*/layer_masks/1.json")
    record = json.loads(source.read_text())
    assert packed == explorer.pack(record)
    assert packed["layers"][2][1][5] == record["layers"][2]["queries"][1]["rle"]
    assert (packed["h"], packed["w"], len(packed["layers"])) == (32, 32, 7)


def test_images_worst_and_query_filter(runs: list[Path], tmp_path: Path) -> None:
    found = index(build_explorer(runs, tmp_path / "a.html", images=[2, 4]))
    assert [image["id"] for image in found["images"]] == [2, 4]
    found = index(build_explorer(runs, tmp_path / "b.html", worst=1))
    assert (len(found["entries"]), len(found["images"])) == (1, 1)
    found = index(build_explorer(runs, tmp_path / "c.html", query=3))
    assert {entry["query"][0] for entry in found["entries"]} == {3}


def test_mistakes_are_one_clear_line(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "x.html"
    with pytest.raises(UserError, match="unknown image 99; valid: 1, 2, 3, 4"):
        build_explorer(runs, out, images=[99])
    with pytest.raises(UserError, match="unknown query that is matched to an object 77; valid: 0, 1, 3"):
        build_explorer(runs, out, query=77)
    with pytest.raises(UserError, match=r"has no layer masks: evaluate the run with evaluation.layer_mask_images"):
        build_explorer([tmp_path], out)
    with pytest.raises(UserError, match="one run or two side by side, not 3"):
        build_explorer([runs[0]] * 3, out)
    assert not out.exists()


def test_too_large_a_page_is_refused_with_the_way_out(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explorer, "LIMIT", 1000)
    with pytest.raises(UserError, match="keep fewer images: --worst N or --images"):
        build_explorer(runs, tmp_path / "x.html")


def test_hostile_names_are_text(runs: list[Path], tmp_path: Path) -> None:
    for path in runs[0].glob("evals/*/layer_masks/1.json"):
        hostile = "</script><script>alert(1)</script>\x1b[31m"
        path.write_text(json.dumps(json.loads(path.read_text().replace('"disc"', json.dumps(hostile)))))
    page = build_explorer(runs, tmp_path / "x.html", labels=["<img onerror=alert(1)>"]).read_text()
    assert "<script>alert" not in page
    assert "<img onerror" not in page
    assert "\x1b" not in page


def test_a_run_that_lacks_an_image_is_no_crash(runs: list[Path], tmp_path: Path) -> None:
    (path,) = runs[1].glob("evals/*/layer_masks/index.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"images": content["images"][:2]}))
    found = index(build_explorer(runs, tmp_path / "x.html"))
    assert [image["id"] for image in found["images"]] == [1, 2, 3, 4]
    assert any(entry["query"][1] is None for entry in found["entries"])


def test_deflate_round_trip() -> None:
    assert json.loads(zlib.decompress(base64.b64decode(deflate({"a": [1, "é"]})), -15)) == {"a": [1, "é"]}
