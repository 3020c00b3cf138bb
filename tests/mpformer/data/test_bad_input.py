"""Broken datasets: one clear line, the right exception, and never silent damage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpformer.config.schema import Config
from mpformer.data.loader import train_batches
from mpformer.data.prepared import dataset_dir
from mpformer.data.validation import validation_items
from mpformer.runtime.errors import RunFailure, UserError

Edit = Callable[[Any], object]


@pytest.fixture
def broken(shapes_root: Path, shapes_config: Config, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the dataset to break: its data root and its directory."""
    directory = dataset_dir(shapes_config, shapes_root)
    copy = tmp_path / directory.relative_to(shapes_root)
    shutil.copytree(directory, copy)
    return tmp_path, copy


def edit(path: Path, change: Edit) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def user_error(config: Config, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        train_batches(config, root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def instance(config: Config) -> Config:
    return config.replace({"dataset.task": "instance"})


def test_missing_dataset(shapes_config: Config, tmp_path: Path) -> None:
    assert "run: mpformer data prepare shapes" in user_error(shapes_config, tmp_path)


@pytest.mark.parametrize("file", ["train/000003.png", "panoptic_train/000003.png"])
def test_half_extracted_dataset(shapes_config: Config, broken: tuple[Path, Path], file: str) -> None:
    root, directory = broken
    (directory / file).unlink()
    message = user_error(shapes_config, root)
    assert "1 of 24 files are missing" in message
    assert file in message
    assert "mpformer data prepare shapes" in message


def test_missing_folder_and_missing_json(shapes_config: Config, broken: tuple[Path, Path]) -> None:
    root, directory = broken
    shutil.rmtree(directory / "train")
    assert "12 of 24 files are missing" in user_error(shapes_config, root)
    (directory / "annotations/panoptic_train.json").unlink()
    assert "cannot read" in user_error(shapes_config, root)
    shutil.rmtree(directory / "semantic_train")
    assert "semantic_train is not there" in user_error(shapes_config.replace({"dataset.task": "semantic"}), root)


@pytest.mark.parametrize("content", ["", "{", '{"images": []}', "[]", "\x00\x01"])
def test_damaged_json(shapes_config: Config, broken: tuple[Path, Path], content: str) -> None:
    root, directory = broken
    for name, config in (("panoptic", shapes_config), ("instances", instance(shapes_config))):
        (directory / f"annotations/{name}_train.json").write_text(content)
        message = user_error(config, root)
        assert f"{name}_train.json" in message
        assert "mpformer data prepare shapes" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["categories"].pop(),
        lambda c: c["categories"][0].update(name="zebra"),
        lambda c: c["categories"].append({"id": 99, "name": "zebra"}),
    ],
)
def test_wrong_class_list(shapes_config: Config, broken: tuple[Path, Path], change: Edit) -> None:
    root, directory = broken
    edit(directory / "annotations/instances_train.json", change)
    edit(directory / "annotations/panoptic_train.json", change)
    assert "another class list than shapes" in user_error(shapes_config, root)
    assert "another class list than shapes" in user_error(instance(shapes_config), root)


def test_category_outside_the_list(shapes_config: Config, broken: tuple[Path, Path]) -> None:
    root, directory = broken
    edit(directory / "annotations/instances_train.json", lambda c: c["annotations"][3].update(category_id=77))
    edit(
        directory / "annotations/panoptic_train.json",
        lambda c: c["annotations"][3]["segments_info"][0].update(category_id=77),
    )
    assert "77 that is not in its class list" in user_error(shapes_config, root)
    assert "77 that is not in its class list" in user_error(instance(shapes_config), root)


def test_repeated_annotation_ids(shapes_config: Config, broken: tuple[Path, Path]) -> None:
    root, directory = broken
    edit(directory / "annotations/instances_train.json", lambda c: c["annotations"][3].update(id=1001))
    assert "not unique" in user_error(instance(shapes_config), root)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "other size", "labels"])
def test_corrupt_image_fails_or_is_skipped(shapes_config: Config, broken: tuple[Path, Path], damage: str) -> None:
    root, directory = broken
    file = directory / ("panoptic_train/000005.png" if damage == "labels" else "train/000005.png")
    if damage == "other size":
        Image.new("RGB", (10, 10)).save(file)
    else:
        content = {"text": b"not an image", "empty": b""}.get(damage, file.read_bytes()[: file.stat().st_size // 2])
        file.write_bytes(content)
    with pytest.raises(RunFailure, match=r"000005\.png.*on_corrupt=skip") as caught:
        _epoch(shapes_config, root)
    assert caught.value.failure_class == "data"
    for workers in (0, 2):
        skip = shapes_config.replace({"dataset.on_corrupt": "skip", "runtime.workers": workers})
        ids, skipped = _epoch(skip, root)
        assert len(ids) == 12
        assert set(ids) == set(range(1, 13)) - {5}
        assert skipped == 1


def _epoch(config: Config, root: Path) -> tuple[list[int], int]:
    batches = train_batches(config, root)
    ids = [item["image_id"] for _ in range(3) for item in next(batches)]
    return ids, len(batches.skipped)


def test_a_corrupt_image_fails_in_a_worker_too(shapes_config: Config, broken: tuple[Path, Path]) -> None:
    root, directory = broken
    (directory / "train/000005.png").write_bytes(b"")
    with pytest.raises(RunFailure, match="000005"):
        _epoch(shapes_config.replace({"runtime.workers": 1}), root)


def test_nothing_but_corrupt_images(shapes_config: Config, broken: tuple[Path, Path]) -> None:
    root, directory = broken
    for file in (directory / "panoptic_train").glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(RunFailure, match="no training image can be read"):
        _epoch(shapes_config.replace({"dataset.on_corrupt": "skip"}), root)


def test_corrupt_validation_image(shapes_config: Config, broken: tuple[Path, Path]) -> None:
    root, directory = broken
    (directory / "val/000002.png").write_bytes(b"")
    with pytest.raises(RunFailure, match="000002") as caught:
        list(validation_items(shapes_config, root))
    assert caught.value.failure_class == "data"
    for workers in (0, 2):
        skip = shapes_config.replace({"dataset.on_corrupt": "skip", "runtime.workers": workers})
        items = validation_items(skip, root)
        assert [i.truth.image_id for i in items] == [1, 3, 4, 5, 6]
        assert len(items.skipped) == 1


def _replace_image(directory: Path, make: Callable[[Image.Image], Image.Image]) -> None:
    for file in (directory / "train").glob("*.png"):
        with Image.open(file) as image:
            made = make(image.convert("RGB"))
        made.save(file)


def _first(config: Config, root: Path) -> dict:
    return next(train_batches(config, root))[0]


def test_grey_palette_and_alpha_images(shapes_config: Config, shapes_root: Path, broken: tuple[Path, Path]) -> None:
    root, directory = broken
    expected = _first(shapes_config, shapes_root)["image"]
    _replace_image(directory, lambda i: i.convert("RGBA"))
    assert torch.equal(_first(shapes_config, root)["image"], expected)
    _replace_image(directory, lambda i: i.convert("P"))
    assert _first(shapes_config, root)["image"].shape == expected.shape
    _replace_image(directory, lambda i: i.convert("L"))
    grey = _first(shapes_config, root)["image"]
    assert grey.shape == expected.shape
    assert torch.equal(grey[0], grey[1])


def test_16_bit_images_are_scaled_not_clipped(shapes_config: Config, broken: tuple[Path, Path]) -> None:
    root, directory = broken
    _replace_image(directory, lambda i: i.convert("L"))
    expected = _first(shapes_config, root)["image"]
    deep = lambda i: Image.fromarray(np.asarray(i.convert("L")).astype(np.uint16) * 257)  # noqa: E731
    _replace_image(directory, deep)
    assert torch.equal(_first(shapes_config, root)["image"], expected)


def test_images_without_annotation(shapes_config: Config, broken: tuple[Path, Path]) -> None:
    root, directory = broken
    edit(directory / "annotations/instances_train.json", lambda c: c.update(annotations=[]))
    with pytest.raises(RunFailure, match="no training image with an annotation"):
        train_batches(instance(shapes_config), root)
    empty = lambda c: [a.update(segments_info=[]) for a in c["annotations"]]  # noqa: E731
    edit(directory / "annotations/panoptic_train.json", empty)
    edit(directory / "annotations/panoptic_val.json", empty)
    edit(directory / "annotations/instances_val.json", lambda c: c.update(annotations=[]))
    assert all(len(i["instances"]) == 0 for i in next(train_batches(shapes_config, root)))
    for item in validation_items(shapes_config, root):
        assert len(item.inputs["instances"]) == 0
        assert item.truth.annotations == ()
        assert item.truth.segments == ()


def test_crowds_and_empty_masks_are_no_targets(shapes_config: Config, broken: tuple[Path, Path]) -> None:
    root, directory = broken
    from mpformer.data.coco_layout import encode_mask

    def spoil(content: Any) -> None:
        for number, annotation in enumerate(content["annotations"]):
            if number % 3 == 0:
                annotation["iscrowd"] = 1
            if number % 3 == 1:
                annotation["segmentation"], annotation["area"] = encode_mask(np.zeros((64, 64), bool)), 0

    edit(directory / "annotations/instances_train.json", spoil)
    content = json.loads((directory / "annotations/instances_train.json").read_text())
    good = sum(1 for n, a in enumerate(content["annotations"]) if n % 3 == 2 and not a["iscrowd"])
    config = instance(shapes_config).replace({"schedule.batch_size": 1})
    from mpformer.data.loader import TrainSet

    dataset = TrainSet(config, root)
    found = [dataset[t].batch[0]["instances"] for t in range(len(dataset.records))]
    assert sum(len(i) for i in found) == good
    assert all(i.gt_masks.flatten(1).any(1).all() for i in found)

    def crowd(content: Any) -> None:
        for row in content["annotations"]:
            row["segments_info"][0]["iscrowd"] = 1
            row["segments_info"].append({"id": 200, "category_id": 1, "iscrowd": 0, "area": 0, "bbox": [0, 0, 0, 0]})

    edit(directory / "annotations/panoptic_train.json", crowd)
    rows = json.loads((directory / "annotations/panoptic_train.json").read_text())["annotations"]
    expected = {row["image_id"]: len(row["segments_info"]) - 2 for row in rows}
    for item in next(train_batches(shapes_config, root)):
        assert len(item["instances"]) == expected[item["image_id"]]


def test_masks_of_another_size(shapes_config: Config, broken: tuple[Path, Path]) -> None:
    root, directory = broken
    shrink = lambda c: [a["segmentation"].update(size=[32, 32]) for a in c["annotations"]]  # noqa: E731
    edit(directory / "annotations/instances_train.json", shrink)
    with pytest.raises(RunFailure, match=r"a mask of size \(32, 32\)"):
        next(train_batches(instance(shapes_config), root))


def test_semantic_class_outside_the_list(shapes_config: Config, broken: tuple[Path, Path]) -> None:
    root, directory = broken
    for file in (directory / "semantic_train").glob("*.png"):
        Image.fromarray(np.full((64, 64), 40, np.uint8)).save(file)
    config = shapes_config.replace({"dataset.task": "semantic"})
    with pytest.raises(RunFailure, match="holds class 40; valid: 0-11 and 255"):
        next(train_batches(config, root))


def test_label_maps_of_the_wrong_kind(shapes_config: Config, broken: tuple[Path, Path]) -> None:
    root, directory = broken
    for split in ("train", "val"):
        for file in (directory / f"panoptic_{split}").glob("*.png"):
            Image.new("L", (64, 64)).save(file)
        for file in (directory / f"semantic_{split}").glob("*.png"):
            Image.new("RGB", (64, 64)).save(file)
    with pytest.raises(RunFailure, match="not an RGB panoptic map"):
        next(train_batches(shapes_config, root))
    with pytest.raises(RunFailure, match="not a single-channel label map"):
        next(train_batches(shapes_config.replace({"dataset.task": "semantic"}), root))


def test_label_maps_of_another_size(shapes_config: Config, broken: tuple[Path, Path]) -> None:
    root, directory = broken
    for file in (directory / "panoptic_train").glob("*.png"):
        Image.new("RGB", (32, 32)).save(file)
    with pytest.raises(RunFailure, match=r"labels \(32, 32\)"):
        next(train_batches(shapes_config, root))
