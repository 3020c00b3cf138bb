"""The study's photographs, made from a checkout of the public set: here one that is made up in its layout."""

import json
from pathlib import Path

import facades
import pytest
from PIL import Image


def write(checkout: Path, split: str, names: dict[str, str]) -> None:
    """A split with an image a file, each with a mark of both categories that are called window, and one without."""
    images = [{"id": k, "file_name": file} for k, file in enumerate(names)]
    marks = [
        {"image_id": image["id"], "category_id": category, "segmentation": [[0, 0, 640, 0, 640, 320]], "area": 64000.0}
        for image in images
        for category in (1, 7)
    ]
    marks += [{"image_id": 0, "category_id": 2, "segmentation": [[0, 0, 1, 1]], "area": 1.0}]
    categories = [{"id": 1, "name": "window"}, {"id": 2, "name": "car"}, {"id": 7, "name": "window"}]
    folder = checkout / split
    for file, below in names.items():
        (folder / below).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1280, 640), (200, 30, 30)).save(folder / below / file)
    content = {"images": images, "annotations": marks, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(content))


def test_a_photograph_is_in_one_part_and_a_category_stands_once(tmp_path: Path) -> None:
    crops = {f"house_scaled_{k}.jpg": "" for k in range(3)}
    write(tmp_path, "train", crops)
    write(tmp_path, "valid", {"house_scaled_9.jpg": "images"})
    write(tmp_path, "test", {f"street{k}.rf.1.jpg": "" for k in range(8)})
    facades.make(tmp_path, tmp_path / "out")
    parts = {file.parent.name: json.loads(file.read_text()) for file in tmp_path.glob("out/facades/*/*.json")}
    homes = [name for name, part in parts.items() for image in part["images"] if image["photo"] == "house"]
    assert homes == [facades.part("house")] * 4
    assert sum(len(part["images"]) for part in parts.values()) == 12
    for name, part in parts.items():
        assert {mark["category_id"] for mark in part["annotations"]} == {facades.IDS["window"]}
        assert len(part["annotations"]) == 2 * len(part["images"])
        for image in part["images"]:
            assert Image.open(tmp_path / "out" / "facades" / name / image["file_name"]).size == (320, 320)


def test_outlines_move_with_the_image() -> None:
    mark = {"segmentation": [[0, 0, 640, 0, 640, 320]], "area": 102400.0}
    found = facades.scaled(mark, 0.25, 0.5)
    assert found == {
        "segmentation": [[0, 0, 160, 0, 160, 160]],
        "bbox": [0, 0, 160, 160],
        "area": pytest.approx(12800.0),
        "iscrowd": 0,
    }
    assert facades.scaled({"segmentation": [[0, 0, 1, 1]], "area": 1.0}, 1, 1) is None
