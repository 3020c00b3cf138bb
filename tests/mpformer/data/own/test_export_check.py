"""What real exports get wrong is found, each on a set with that one mistake."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpformer.config import datasets
from mpformer.data.check import check
from mpformer.data.own import export_check
from mpformer.data.own.adding import Asked, add
from mpformer.data.own.export_check import photo_of
from mpformer.data.own.registration import Sources
from mpformer.runtime.errors import UserError
from tests.support.own_set import OwnSet, write_own_set


@pytest.fixture
def own(tmp_path: Path) -> OwnSet:
    return write_own_set(tmp_path / "export", train=3, val=2)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    for name in [name for name, entry in datasets.DATASETS.items() if entry.added]:
        del datasets.DATASETS[name]


def sources(own: OwnSet) -> Sources:
    return Sources(*(str(own.root / name) for name in ("train.json", "val.json", "train", "val")))


def texts(own: OwnSet) -> list[str]:
    return [f"{'wrong' if f.wrong else 'look'} {f.where}: {f.text}" for f in export_check.look(sources(own))]


def test_nothing_is_found_where_nothing_is_wrong(own: OwnSet) -> None:
    assert texts(own) == []


def _two_categories(content: dict[str, Any]) -> None:
    content["categories"].append({"id": 50, "name": "plate"})


def _unused(content: dict[str, Any]) -> None:
    content["categories"].append({"id": 50, "name": "door"})


def _from_zero(content: dict[str, Any]) -> None:
    content["categories"][0]["id"] = 0
    for annotation in content["annotations"]:
        annotation["category_id"] *= annotation["category_id"] != 3


def _two_corners(content: dict[str, Any]) -> None:
    content["annotations"][0]["segmentation"] = [[1, 1, 2, 2]]


def _no_area(content: dict[str, Any]) -> None:
    content["annotations"][0]["segmentation"] = [[1, 1, 9, 9, 5, 5]]


def _a_part_without_area(content: dict[str, Any]) -> None:
    content["annotations"][0]["segmentation"].append([1, 1, 9, 9, 5, 5])


def _outside(content: dict[str, Any]) -> None:
    content["annotations"][0]["bbox"] = [100, 20, 90, 10]


def _empty(content: dict[str, Any]) -> None:
    first = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]


def _other_mask(content: dict[str, Any]) -> None:
    next(a for a in content["annotations"] if isinstance(a["segmentation"], dict))["segmentation"]["size"] = [9, 9]


def _other_size(content: dict[str, Any]) -> None:
    content["images"][0] |= {"width": 96, "height": 128}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != content["images"][0]["id"]]


def _missing(content: dict[str, Any]) -> None:
    content["images"][0]["file_name"] = "nobody.jpg"


def _two_meanings(content: dict[str, Any]) -> None:
    content["categories"].append({"id": 3, "name": "door"})


def _same_annotation(content: dict[str, Any]) -> None:
    content["annotations"][1]["id"] = content["annotations"][0]["id"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_two_categories, "look train.json: 1 categories stand several times and count as one: plate"),
        (_unused, "look train: 1 categories that nothing is of are left out: door"),
        (_from_zero, "look train.json: category ids count from 0"),
        (_two_corners, "look train.json: 1 annotations have no outline, or one without area, and are left out: 1 in"),
        (_no_area, "look train.json: 1 annotations have no outline, or one without area"),
        (_a_part_without_area, "look train.json: 1 annotations have parts without area"),
        (_outside, "look train.json: 1 boxes are empty or leave their image"),
        (_empty, "look train.json: 1 images without an annotation: photo_train_1.jpg"),
        (_other_mask, "wrong train.json: 1 masks have another size than their image"),
        (
            _other_size,
            "wrong train.json: 1 images have another size: photo_train_1.jpg is 128 x 96, annotated as 96 x 128",
        ),
        (_missing, "wrong train.json: 1 images are not in"),
        (_two_meanings, "wrong train.json: 1 category ids mean several things: 3"),
        (_same_annotation, "look train.json: 1 annotation ids stand several times"),
    ],
)
def test_a_mistake_of_the_annotations(own: OwnSet, change: Callable[[dict[str, Any]], None], line: str) -> None:
    content = own.read()
    change(content)
    own.write(content)
    assert any(text.startswith(line) for text in texts(own)), texts(own)


def test_an_image_that_was_moved_or_is_broken(own: OwnSet) -> None:
    (own.root / "train" / "deep").mkdir()
    shutil.move(own.root / "train/photo_train_1.jpg", own.root / "train/deep/photo_train_1.jpg")
    (own.root / "train/photo_train_2.jpg").write_bytes(b"no image")
    found = texts(own)
    assert any("photo_train_1.jpg is at deep/photo_train_1.jpg" in text for text in found)
    assert any("1 images cannot be read: photo_train_2.jpg" in text for text in found)


def test_the_same_photo_on_both_sides_by_its_look(own: OwnSet) -> None:
    """Saved again, smaller in bytes and a little brighter, under another name."""
    with Image.open(own.root / "train/photo_train_2.jpg") as file:
        brighter = np.clip(np.asarray(file).astype(int) + 6, 0, 255).astype(np.uint8)
    Image.fromarray(brighter).save(own.root / "val/photo_val_1.jpg", quality=70)
    (line,) = texts(own)
    assert line == "look train and val: 1 pairs of images look the same: photo_train_2.jpg and photo_val_1.jpg"


def test_the_same_photo_on_both_sides_by_its_name(own: OwnSet) -> None:
    for split, name in (("train", "IMG_7_jpg.rf.0a1b2c.jpg"), ("val", "IMG_7_jpg.rf.ffee11.jpg")):
        content = own.read(split)
        (own.root / split / content["images"][0]["file_name"]).rename(own.root / split / name)
        content["images"][0]["file_name"] = name
        own.write(content, split)
    assert any("1 pairs of images are of one photo by their names" in text for text in texts(own))


@pytest.mark.parametrize(
    ("file", "photo"),
    [
        ("a/IMG_0773_scaled_2.jpg", "IMG_0773"),
        ("IMG_1_png.rf.abc123.jpg", "IMG_1"),
        ("house (2).png", "house"),
        ("x_crop_12.png", "x"),
        ("frame-flip.jpg", "frame"),
        ("000001.jpg", "000001"),
        ("crop.png", "crop"),
    ],
)
def test_the_photo_that_a_name_tells(file: str, photo: str) -> None:
    assert photo_of(file) == photo


def test_adding_refuses_what_is_wrong_and_says_what_is_doubtful(own: OwnSet, tmp_path: Path) -> None:
    content = own.read()
    _empty(content)
    own.write(content)
    given = Asked(
        "plates", own.root / "train.json", own.root / "val.json", own.root / "train", own.root / "val", crop=64
    )
    assert any("1 images without an annotation" in line for line in add(given, tmp_path, workers=1).lines())
    export, whole, tiles = check("plates", tmp_path, full=True)
    assert all(report.ok for report in (export, whole, tiles)), [*whole.lines(), *tiles.lines()]
    assert "  look  train.json: 1 images without an annotation: photo_train_1.jpg" in list(export.lines())
    (own.root / "val/photo_val_1.jpg").unlink()
    export, whole, tiles = check("plates", tmp_path)
    assert (export.ok, whole.ok, tiles.ok) == (False, False, True)
    with pytest.raises(UserError, match=r"not added before this is mended: val\.json: 1 images are not in"):
        add(given, tmp_path, workers=1)
