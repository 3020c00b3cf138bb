"""Records as bytes are the records; JSON read piece by piece is JSON."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data.datasets.coco import load_coco_json

from mpformer.config.datasets import DATASETS, added
from mpformer.data import json_stream
from mpformer.data.coco_reader import SplitFiles, read_coco_like
from mpformer.data.json_stream import ARRAY, elements
from mpformer.data.packed import Packer, Records, grouped, pack
from tests.support.own_set import NAMES, write_own_set

CONTENT = {
    "": 0.0,
    "info": {"year": 2017, "of": [1, -2.5e-3, 1e300, 10**20], "é": '\\ " \u2028 ] } ,'},
    "empty": [],
    "images": [{"id": 1, "file_name": "a, ]b.jpg"}, {}, [], [[0.5], None, True]],
    "last": -12345.678,
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50, 1000])
def test_a_stream_gives_what_the_whole_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    """Wherever the pieces are cut, also within a number."""
    path = tmp_path / "file.json"
    path.write_text(json.dumps(CONTENT, indent=indent, ensure_ascii=False), encoding="utf-8")
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    found: dict[str, Any] = {}
    for key, element in elements(path):
        if element is ARRAY:
            found[key] = []
        elif isinstance(found.get(key), list):
            found[key].append(element)
        else:
            found[key] = element
    assert found == CONTENT


@pytest.mark.parametrize("text", ["", "[1]", '{"a": [1, 2', '{"a": [1 2]}', '{"a" 1}', '{"a": tru}'])
def test_what_is_no_json_object_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match="xpect"):
        list(elements(tmp_path / "file.json"))


@pytest.mark.parametrize("seed", range(5))
def test_annotations_are_with_their_image_in_the_order_of_the_file(seed: int) -> None:
    images = np.random.default_rng(seed).integers(-1, 5, 4 * seed).tolist()
    heads, marks = Packer(), Packer()
    for image in range(5):
        heads.add({"image_id": image})
    for number in range(len(images)):
        marks.add((0, None, None, number, None))
    records = grouped(heads.packed(), marks.packed(), images)
    for image in range(5):
        expected = [{"iscrowd": 0, "category_id": number} for number, of in enumerate(images) if of == image]
        assert records[image] == {"image_id": image, "annotations": expected}
    assert records.only([3, 1])[1] == records[1]
    assert [r["image_id"] for r in records[1:4].heads()] == [1, 2, 3]


def test_records_are_those_of_detectron2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Polygons, RLE, polygons that are none, an annotation of an image that is not listed."""
    own = write_own_set(tmp_path / "export")
    content = own.read()
    content["categories"] = [{"id": n, "name": name} for n, name in enumerate(NAMES, start=1)]
    for mark in content["annotations"]:
        mark["category_id"] = (mark["category_id"] - 1) // 2
    content["annotations"][1]["segmentation"] = [[1, 2, 3, 4]]
    content["annotations"][4]["segmentation"] = [[1, 2, 3, 4], *content["annotations"][4]["segmentation"]]
    content["annotations"][5]["image_id"] = 9999
    content["images"].reverse()
    own.write(content)
    monkeypatch.setitem(DATASETS, "plates", added("plates", NAMES, []))
    files = SplitFiles("plates", own.root / "train", own.root / "train.json", suffix=".jpg", exact_names=True)
    expected = load_coco_json(str(own.root / "train.json"), str(own.root / "train"), None, ["area"])
    for record in expected:
        for mark in record["annotations"]:
            del mark["bbox_mode"]
            mark["category_id"] -= 1
    assert list(read_coco_like(files, frozenset({"instance"}))) == expected


def _touch(records: Records, out: Any) -> None:
    def private() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

    before = private()
    for index in range(len(records)):
        records[index]
    out.put(private() - before)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux says which pages are shared")
def test_a_forked_worker_has_no_copy() -> None:
    """20 MB of records: a worker that has read all of them has less than a tenth of that for itself."""
    rng = np.random.default_rng(0)
    records = pack({"image_id": n, "annotations": [rng.random(250).tolist() for _ in range(10)]} for n in range(1000))
    assert records.nbytes > 20_000_000
    context = multiprocessing.get_context("fork")
    out: Any = context.Queue()
    worker = context.Process(target=_touch, args=(records, out))
    worker.start()
    own = out.get(timeout=120)
    worker.join()
    assert 1024 * own < records.nbytes / 10
