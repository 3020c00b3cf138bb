"""COCO, ADE20K and Cityscapes in miniature, in their true layouts: convert, register, train, validate, score."""

import contextlib
import inspect
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpformer.config.classes import class_table, num_classes
from mpformer.config.datasets import TASKS
from mpformer.config.schema import Config, validate
from mpformer.data import chunks
from mpformer.data import convert as conversion
from mpformer.data.check import check
from mpformer.data.convert import convert
from mpformer.data.loader import train_batches
from mpformer.data.sets import ade20k
from mpformer.data.validation import ValidationItem, validation_items
from mpformer.evaluation.scoring.scorer import SegmentationScorer
from mpformer.runtime.errors import RunFailure, UserError
from tests.support.miniature import write_miniature

RELEASES = ("coco", "ade20k", "cityscapes")
CROP = {"kind": "crop", "min_sizes": (64, 96), "crop_size": (64, 64), "category_max_area": 0.75, "color": True}
LSJ = {"kind": "lsj", "lsj_size": 96}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with all three, converted."""
    root = tmp_path_factory.mktemp("releases")
    for name in RELEASES:
        write_miniature(name, root, images=4, side=96)
        convert(name, root, workers=1)
    return root


def config_of(name: str, task: str, **augmentation: Any) -> Config:
    tasks = {"instance": task != "semantic", "panoptic": task == "panoptic", "semantic": task != "instance"}
    return validate(
        {
            "dataset": {"name": name, "task": task, "augmentation": augmentation},
            "schedule": {"batch_size": 4},
            "evaluation": {**tasks, "min_size_test": 64, "max_size_test": 200},
        }
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", RELEASES)
def test_every_task_trains(releases: Path, name: str, task: str) -> None:
    for augmentation in ({}, LSJ, CROP):
        batch = next(train_batches(config_of(name, task, **augmentation), releases))
        assert len(batch) == 4
        classes = torch.cat([item["instances"].gt_classes for item in batch])
        assert len(classes) > 4
        assert 0 <= classes.min() <= classes.max() < num_classes(name, task)
        for item in batch:
            assert item["image"].shape[1:] == item["instances"].gt_masks.shape[1:] == item["instances"].image_size
            assert isinstance(item["image_id"], int)


@pytest.mark.parametrize(
    ("name", "task", "augmentation"),
    [("coco", "instance", LSJ), ("ade20k", "panoptic", CROP), ("cityscapes", "semantic", CROP)],
)
def test_the_papers_augmentations_depend_on_seed_and_iteration_alone(
    releases: Path, name: str, task: str, augmentation: dict[str, Any]
) -> None:
    """The same batches from two worker processes, from an iteration on, and in a share of the devices."""
    config = config_of(name, task, **augmentation)

    def batches(start: int, count: int, rank: int = 0, size: int = 1, **changes: int) -> list[list[torch.Tensor]]:
        found = train_batches(config.replace({k.replace("__", "."): v for k, v in changes.items()}), releases, start,
                              rank, size)  # fmt: skip
        return [
            [part for item in next(found) for part in (item["image"], item["instances"].gt_masks)] for _ in range(count)
        ]

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    alone = batches(0, 3)
    assert all(same(a, b) for a, b in zip(alone, batches(0, 3, runtime__workers=2), strict=True))
    assert same(alone[2], batches(2, 1)[0])
    halves = [batches(0, 1, rank, 2)[0] for rank in (0, 1)]
    assert same(alone[0], halves[0][:2] + halves[1][:2] + halves[0][2:] + halves[1][2:])
    assert not same(alone[0], batches(0, 1, seed=1)[0])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", RELEASES)
def test_perfect_predictions_score_well(releases: Path, name: str, task: str) -> None:
    """The targets at the original size, handed back as predictions."""
    config = config_of(name, task).replace({"evaluation.min_size_test": 0})
    scorer = SegmentationScorer(config)
    for item in validation_items(config, releases):
        scorer.add(perfect(item, class_table(name, task).is_thing, task), item.truth)
    recorded = scorer.result()
    expected = {"instance": {"AP50"}, "panoptic": {"AP50", "PQ", "mIoU"}, "semantic": {"mIoU"}}[task]
    assert expected <= recorded.keys()
    # COCO's polygons have no holes, and the pixels of Cityscapes' groups are no panoptic targets but do have a class
    assert all(recorded[key] > (90 if key == "mIoU" else 99) for key in expected), recorded


def perfect(item: ValidationItem, is_thing: tuple[bool, ...], task: str) -> dict[str, Any]:
    found = item.inputs["instances"]
    h, w = item.truth.height, item.truth.width
    things = torch.tensor([is_thing[c] for c in found.gt_classes.tolist()], dtype=torch.bool)
    ids, semantic = torch.zeros(h, w, dtype=torch.int64), torch.full((h, w), -1, dtype=torch.int64)
    for number, (mask, category) in enumerate(zip(found.gt_masks, found.gt_classes, strict=True)):
        ids[mask], semantic[mask] = number + 1, category
    semantic[semantic < 0] = 0
    return {
        "instances": SimpleNamespace(
            pred_masks=found.gt_masks[things],
            scores=torch.ones(int(things.sum())),
            pred_classes=found.gt_classes[things],
        ),
        "panoptic_seg": (ids, [{"id": n + 1, "category_id": int(c)} for n, c in enumerate(found.gt_classes)]),
        "sem_seg": semantic,
    }


@pytest.mark.parametrize("name", RELEASES)
def test_test_images_are_resized(releases: Path, name: str) -> None:
    item = next(iter(validation_items(config_of(name, "panoptic"), releases)))
    assert min(item.inputs["image"].shape[1:]) == 64
    assert item.truth.ids is not None
    assert item.truth.ids.shape == (item.inputs["height"], item.inputs["width"])


def test_coco_semantic_is_the_panoptic_map(releases: Path) -> None:
    item = next(iter(validation_items(config_of("coco", "panoptic"), releases)))
    assert item.truth.ids is not None
    assert item.truth.semantic is not None
    for segment in item.truth.segments:
        assert (item.truth.semantic[item.truth.ids == segment.id] == segment.category).all()
    assert (item.truth.semantic[item.truth.ids == 0] == 255).all()


def test_cityscapes_files_are_those_of_its_own_scripts(releases: Path, tmp_path: Path) -> None:
    pytest.importorskip("cityscapesscripts")
    from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

    fine = releases / "cityscapes" / "gtFine"
    with contextlib.redirect_stdout(io.StringIO()):
        convert2panoptic(str(fine), str(tmp_path), False, ["train", "val"])
    for split in ("train", "val"):
        ours = json.loads((fine / f"cityscapes_panoptic_{split}.json").read_text())
        theirs = json.loads((tmp_path / f"cityscapes_panoptic_{split}.json").read_text())
        assert ours["images"] == theirs["images"]
        assert ours["annotations"] == theirs["annotations"]
        given = [{k: c[k] for k in ("id", "name", "isthing")} for c in theirs["categories"]]
        assert sorted(ours["categories"], key=str) == sorted(given, key=str)
        for file in (tmp_path / f"cityscapes_panoptic_{split}").glob("*.png"):
            mine = fine / f"cityscapes_panoptic_{split}" / file.name
            assert (np.asarray(Image.open(file)) == np.asarray(Image.open(mine))).all()


def test_detectron2s_head_may_import_what_only_its_company_has(releases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loaders as on HEAD (issue 5436): the scripts under an internal name; the same records come out."""
    pytest.importorskip("cityscapesscripts")
    from detectron2.data.datasets import cityscapes as loaders

    from mpformer.data.sets.cityscapes import _INTERNAL, read_split

    root = releases
    before = read_split(root, "val", frozenset(TASKS))
    source = inspect.getsource(loaders).replace("from cityscapesscripts", f"from {_INTERNAL}.cityscapesscripts")
    assert _INTERNAL in source
    for name in [name for name in sys.modules if name.startswith("deeplearning")]:
        monkeypatch.delitem(sys.modules, name)
    head = ModuleType(loaders.__name__)
    monkeypatch.setitem(sys.modules, loaders.__name__, head)
    exec(compile(source, "head", "exec"), head.__dict__)
    after = read_split(root, "val", frozenset(TASKS))
    assert [r["annotations"] for r in after] == [r["annotations"] for r in before]
    assert [r["segments_info"] for r in after] == [r["segments_info"] for r in before]


@pytest.mark.slow  # two processes import torch
def test_cityscapes_is_read_by_processes_where_it_is_large(releases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that handles SIGTERM, as every run does: detectron2's own pool would not end there."""
    from mpformer.data.sets import cityscapes

    root = releases
    alone = cityscapes.read_split(root, "train", frozenset(["instance"]))
    monkeypatch.setattr(cityscapes, "_FEW", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert cityscapes.read_split(root, "train", frozenset(["instance"])) == alone
    finally:
        signal.signal(signal.SIGTERM, before)
    assert any(record["annotations"] for record in alone)


def test_cityscapes_training_labels_are_those_of_its_own_scripts(releases: Path) -> None:
    labels = pytest.importorskip("cityscapesscripts.helpers.labels")
    for file in (releases / "cityscapes" / "gtFine").rglob("*_labelTrainIds.png"):
        ids = np.asarray(Image.open(str(file).replace("labelTrainIds", "labelIds")))
        expected = np.vectorize(lambda i: labels.id2label[i].trainId % 256)(ids)
        assert (np.asarray(Image.open(file)) == expected).all()


def test_ade20k_things_come_from_the_instances(releases: Path) -> None:
    ade = releases / "ADEChallengeData2016"
    panoptic = json.loads((ade / "ade20k_panoptic_train.json").read_text())
    instances = json.loads((ade / "ade20k_instance_train.json").read_text())
    table = class_table("ade20k", "panoptic")
    assert len(panoptic["categories"]) == 150
    assert [c["name"] for c in instances["categories"]] == list(table.things)
    things = [s for a in panoptic["annotations"] for s in a["segments_info"] if table.is_thing[s["category_id"]]]
    assert len(things) == len(instances["annotations"]) > 10
    names = sorted(table.names[s["category_id"]] for s in things)
    assert names == sorted(table.things[a["category_id"] - 1] for a in instances["annotations"])


def test_conversions_leave_a_manifest_and_go_on(
    releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_CHUNK", 5)
    write_miniature("ade20k", tmp_path, images=8, side=32)
    root = tmp_path / "ADEChallengeData2016"
    original, calls = ade20k._ade_segments, []

    def stop(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(ade20k, "_ade_segments", stop)
    with pytest.raises(KeyboardInterrupt):
        convert("ade20k", tmp_path, workers=1)
    assert not (root / conversion.MANIFEST).exists()
    monkeypatch.setattr(ade20k, "_ade_segments", original)
    seen: list[tuple[int, int]] = []
    convert("ade20k", tmp_path, lambda done, total: seen.append((done, total)), workers=1)
    assert seen[0] == (8, 12)  # the first five were done
    assert seen[-1] == (12, 12)
    manifest = json.loads((root / conversion.MANIFEST).read_text())
    assert "ade20k_panoptic_train.json" in manifest["files"]
    assert len(manifest["files"]) == 2 * 12 + 4
    assert not (root / ".convert").exists()


@pytest.mark.parametrize("name", RELEASES)
def test_check_counts_what_is_there(releases: Path, name: str) -> None:
    (report,) = check(name, releases)
    assert not report.ok  # a miniature is not the whole release
    assert "opens: " in report.sample
    assert any(name_ in report.sample for name_ in class_table(name, "semantic").names)
    assert any(item.ok for item in report.items)
    assert len(list(report.lines())) < 30  # one screen


@pytest.mark.parametrize("name", RELEASES)
def test_check_sees_what_changed_after_the_preparation(tmp_path: Path, name: str) -> None:
    def wrong(full: bool = False) -> dict[str, str]:
        (report,) = check(name, tmp_path, full)
        return {item.path: item.detail for item in report.items if not item.ok and " of " in item.detail
                and ("manifest" in item.path or "checksums" in item.path)}  # fmt: skip

    write_miniature(name, tmp_path, images=2, side=48)
    directory = convert(name, tmp_path, workers=1)
    assert wrong(full=True) == {}
    written = sorted(json.loads((directory / conversion.MANIFEST).read_text())["files"])
    png = next(path for path in written if path.endswith(".png"))
    (directory / png).write_bytes(b"changed")
    assert wrong() == {}
    assert png in wrong(full=True)["checksums of all files"]
    (directory / png).unlink()
    assert png in wrong()[f"{directory.name}/{conversion.MANIFEST}"]
    (directory / conversion.MANIFEST).write_text("{")
    (report,) = check(name, tmp_path)
    assert any(f"run: mpformer data prepare {name}" in item.detail for item in report.items)


def test_check_names_a_sample_that_does_not_fit(tmp_path: Path) -> None:
    write_miniature("coco", tmp_path, images=2, side=48)
    (report,) = check("coco", tmp_path)
    assert "semantic labels are not prepared" in report.sample
    convert("coco", tmp_path, workers=1)
    (labels,) = (tmp_path / "coco/panoptic_semseg_val2017").glob("*.png")
    for content, message in (
        (np.full((48, 48), 140, np.uint8), "holds class 140; valid: 0-132 and 255"),
        (np.zeros((10, 10), np.uint8), "is 10 x 10, its image is not"),
    ):
        Image.fromarray(content).save(labels)
        (report,) = check("coco", tmp_path)
        assert message in next(item.detail for item in report.items if item.path == "sample")
    labels.write_bytes(b"")
    (report,) = check("coco", tmp_path)
    assert "do not open" in report.sample


@pytest.mark.parametrize("name", RELEASES)
def test_missing_release_is_one_clear_line(tmp_path: Path, name: str) -> None:
    for task in TASKS:
        with pytest.raises(UserError, match=f"mpformer data check {name}"):
            train_batches(config_of(name, task), tmp_path)
    with pytest.raises(UserError, match=f"mpformer data check {name}"):
        convert(name, tmp_path)


@pytest.mark.parametrize("name", RELEASES)
def test_unconverted_release_is_one_clear_line(tmp_path: Path, name: str) -> None:
    write_miniature(name, tmp_path, images=2, side=48)
    task = "semantic" if name == "coco" else "panoptic"
    with pytest.raises(UserError, match=f"mpformer data check {name}"):
        train_batches(config_of(name, task), tmp_path)


def test_half_extracted_releases(tmp_path: Path) -> None:
    for name in RELEASES:
        write_miniature(name, tmp_path, images=3, side=48)
        convert(name, tmp_path, workers=1)
    next((tmp_path / "coco/train2017").glob("*.jpg")).unlink()
    next((tmp_path / "ADEChallengeData2016/annotations_detectron2/training").glob("*.png")).unlink()
    next((tmp_path / "cityscapes/gtFine").rglob("train*_labelTrainIds.png")).unlink()
    for name, task in (("coco", "panoptic"), ("ade20k", "semantic"), ("cityscapes", "semantic")):
        with pytest.raises(UserError, match=r"missing|incomplete"):
            train_batches(config_of(name, task), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.full((48, 48, 3), 101, np.uint8), "holds an instance of class 101; valid: 1-100"),
        (np.array([[[0, 7, 0]]], np.uint8).repeat(48, 0).repeat(48, 1), "instance of class 0; valid: 1-100"),
        (np.zeros((48, 48), np.uint8), "an RGB map of"),
        (np.zeros((20, 48, 3), np.uint8), "an RGB map of"),
    ],
)
def test_ade20k_with_impossible_instances(tmp_path: Path, content: np.ndarray, message: str) -> None:
    write_miniature("ade20k", tmp_path, images=1, side=48)
    (file,) = (tmp_path / "ADEChallengeData2016/annotations_instance/training").glob("*.png")
    Image.fromarray(content).save(file)
    with pytest.raises(UserError, match=message) as error:
        convert("ade20k", tmp_path, workers=1)
    assert file.name in str(error.value)


def test_coco_with_a_category_outside_the_list(tmp_path: Path) -> None:
    write_miniature("coco", tmp_path, images=2, side=48)
    path = tmp_path / "coco/annotations/panoptic_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segments_info"][0]["category_id"] = 12  # COCO leaves it out
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"panoptic_train2017.*category id 12 is not in COCO's list"):
        convert("coco", tmp_path, workers=1)


@pytest.mark.parametrize("kind", ["labelIds", "instanceIds"])
def test_cityscapes_with_a_label_outside_the_list(tmp_path: Path, kind: str) -> None:
    write_miniature("cityscapes", tmp_path, images=2, side=48)
    file = min((tmp_path / "cityscapes/gtFine/train").rglob(f"*_{kind}.png"))
    with Image.open(file) as image:
        changed = np.array(image)
    changed[:5] = 77
    Image.fromarray(changed).save(file)
    with pytest.raises(UserError, match="holds label id 77; valid: 0-33"):
        convert("cityscapes", tmp_path, workers=1)
    Image.fromarray(changed[:20]).save(file)
    with pytest.raises(UserError, match="extract gtFine again"):
        convert("cityscapes", tmp_path, workers=1)


@pytest.mark.parametrize(
    ("name", "file", "task"),
    [
        ("coco", "coco/annotations/instances_train2017.json", "instance"),
        ("coco", "coco/annotations/panoptic_train2017.json", "panoptic"),
        ("ade20k", "ADEChallengeData2016/ade20k_instance_train.json", "instance"),
    ],
)
def test_a_release_with_another_class_list(releases: Path, tmp_path: Path, name: str, file: str, task: str) -> None:
    """Somebody's subset of COCO in the place of COCO, or a category too many."""
    shutil.copytree(releases / Path(file).parts[0], tmp_path / Path(file).parts[0])
    content = json.loads((tmp_path / file).read_text())
    for categories in (content["categories"][:20], [*content["categories"], {"id": 999, "name": "zebra crossing"}]):
        (tmp_path / file).write_text(json.dumps({**content, "categories": categories}))
        with pytest.raises(UserError, match=f"has another class list than {name}") as error:
            train_batches(config_of(name, task), tmp_path)
        assert f"mpformer data check {name}" in str(error.value)


def test_a_corrupt_jpeg_fails_or_is_skipped_with_a_count(releases: Path, tmp_path: Path) -> None:
    """Half a JPEG, as a broken download leaves it, in training and in validation."""
    shutil.copytree(releases / "coco", tmp_path / "coco")
    for split in ("train", "val"):
        file = min((tmp_path / f"coco/{split}2017").glob("*.jpg"))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    config = config_of("coco", "instance", **LSJ)
    for read in (lambda: next(train_batches(config, tmp_path)), lambda: list(validation_items(config, tmp_path))):
        with pytest.raises(RunFailure, match=r"000139\.jpg cannot be read.*on_corrupt=skip") as error:
            read()
        assert error.value.failure_class == "data"
    skip = config.replace({"dataset.on_corrupt": "skip"})
    batches, items = train_batches(skip, tmp_path), validation_items(skip, tmp_path)
    assert all(len(next(batches)) == 4 for _ in range(2))
    assert len(batches.skipped) == 1
    assert len(list(items)) == len(items) - 1
    assert len(items.skipped) == 1


def test_ade20k_with_a_class_outside_the_list(tmp_path: Path) -> None:
    write_miniature("ade20k", tmp_path, images=2, side=48)
    file = next((tmp_path / "ADEChallengeData2016/annotations/training").glob("*.png"))
    Image.fromarray(np.full((48, 48), 151, np.uint8)).save(file)
    with pytest.raises(UserError, match="holds class 151; valid: 0-150"):
        convert("ade20k", tmp_path, workers=1)
