"""A set of one's own: registered, written whole and as tiles, read as every other dataset."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpformer.config import datasets
from mpformer.config.classes import class_table, tasks_of
from mpformer.config.mask2former_yaml import from_cfg, to_cfg
from mpformer.config.schema import Config, DatasetConfig, validate
from mpformer.data.catalog import records
from mpformer.data.coco_layout import id_to_rgb
from mpformer.data.own import registration
from mpformer.data.own.adding import Added, Asked, add, resize_for
from mpformer.data.own.annotations import read_split, stuff_by_size
from mpformer.data.own.painting import mask_of, paint
from mpformer.data.prepared import dataset_dir, resolve
from mpformer.data.scene import Thing
from mpformer.data.validation import validation_items
from mpformer.runtime.errors import UserError
from tests.support.own_set import HEIGHT, NAMES, WIDTH, OwnSet, rectangle, write_own_set


@pytest.fixture
def own(tmp_path: Path) -> OwnSet:
    return write_own_set(tmp_path / "export")


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    for name in [name for name, entry in datasets.DATASETS.items() if entry.added]:
        del datasets.DATASETS[name]


def asked(own: OwnSet, **changes: object) -> Asked:
    given = Asked(
        "plates",
        own.root / "train.json",
        own.root / "val.json",
        own.root / "train",
        own.root / "val",
        stuff=("wall",),
        panoptic="largest-first",
        crop=64,
        resize=96,
    )
    return replace(given, **changes)  # type: ignore[arg-type]


def added(own: OwnSet, root: Path, **changes: object) -> Added:
    return add(asked(own, **changes), root, workers=1)


def whole(root: Path, task: str = "panoptic") -> Config:
    return resolve(validate({"dataset": {"name": "plates", "task": task}}), root)


def test_instances_become_a_panoptic_set_and_tiles_of_it(own: OwnSet, tmp_path: Path) -> None:
    made = added(own, tmp_path)
    assert (made.registration.things, made.registration.stuff) == (("plate", "bolt"), ("wall",))
    assert tasks_of("plates") == ("instance", "panoptic", "semantic")
    mini = resolve(validate({"dataset": {"name": "plates", "task": "panoptic", "crop": 64}}), tmp_path)
    assert mini.dataset.fingerprint == made.registration.tiles != whole(tmp_path).dataset.fingerprint
    found = records(mini, tmp_path, "train", ["instance", "panoptic", "semantic"])
    assert len(found) == made.tiles["train"] == 6 * 2
    assert {a["category_id"] for r in found for a in r["annotations"]} == {0, 1}
    for item in validation_items(mini, tmp_path):
        assert item.inputs["image"].shape == (3, 64, 64)
    with Image.open(made.sample) as sheet:
        assert sheet.width > 64 * 4


def test_whole_images_stay_where_they_are_with_their_outlines(own: OwnSet, tmp_path: Path) -> None:
    added(own, tmp_path)
    found = records(whole(tmp_path), tmp_path, "val", ["instance", "panoptic", "semantic"])
    assert [Path(r["file_name"]).resolve() for r in found] == sorted((own.root / "val").glob("*.jpg"))
    given = [a for a in own.read("val")["annotations"] if a["category_id"] != 7]
    read = [a for r in found for a in r["annotations"]]
    assert [a["area"] for a in read] == [a["area"] for a in given]
    assert isinstance(read[-1]["segmentation"], list)
    ids = np.asarray(Image.open(found[0]["pan_seg_file_name"]))
    assert ids.shape[:2] == (HEIGHT, WIDTH)
    assert not ids[:24].any(), "what nothing covers is void"


def test_large_is_painted_before_small_and_the_uncovered_can_be_a_class(own: OwnSet, tmp_path: Path) -> None:
    added(own, tmp_path, uncovered="sky")
    assert class_table("plates", "panoptic").stuff == ("wall", "sky")
    items = list(validation_items(whole(tmp_path).replace({"evaluation.panoptic": True}), tmp_path))
    for item, image in zip(items, own.read("val")["images"], strict=True):
        ids, classes = item.truth.ids, {s.id: s.category for s in item.truth.segments}
        assert ids is not None
        assert {classes[i] for i in np.unique(ids[:20])} == {3}
        for bolt in (
            a for a in own.read("val")["annotations"] if a["image_id"] == image["id"] and a["category_id"] == 5
        ):
            x, y, w, h = bolt["bbox"]
            assert (np.vectorize(classes.get)(ids[y + 1 : y + h - 1, x + 1 : x + w - 1]) == 1).all()


def test_without_painting_it_has_instances_alone_that_may_overlap(own: OwnSet, tmp_path: Path) -> None:
    made = added(own, tmp_path, stuff=None, panoptic="")
    assert made.registration.things == NAMES
    assert tasks_of("plates") == ("instance",)
    mini = resolve(validate({"dataset": {"name": "plates", "task": "instance", "crop": 64}}), tmp_path)
    (first, *_) = records(mini, tmp_path, "train", ["instance"])
    masks = [mask_of(a["segmentation"], (64, 64), (64, 64)) for a in first["annotations"]]
    assert np.sum(masks, axis=0).max() > 1
    with pytest.raises(UserError, match="no task 'panoptic'"):
        class_table("plates", "panoptic")


def test_a_panoptic_file_and_semantic_maps_are_read_too(own: OwnSet, tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder = own.root / f"panoptic_{split}"
        folder.mkdir()
        (own.root / f"labels_{split}").mkdir()
        content = own.read(split)
        annotations = []
        for image in content["images"]:
            marks = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            ids = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
            for mark in sorted(marks, key=lambda a: -a["area"]):
                ids[mask_of(mark["segmentation"], ids.shape, ids.shape)] = 1000 + mark["id"]
            name = f"{Path(image['file_name']).stem}.png"
            Image.fromarray(id_to_rgb(ids)).save(folder / name)
            Image.fromarray(np.where(ids > 0, ids % 2, 255).astype(np.uint8)).save(own.root / f"labels_{split}" / name)
            info = [{"id": 1000 + a["id"], "category_id": a["category_id"], "iscrowd": 0} for a in marks]
            annotations.append({"image_id": image["id"], "file_name": name, "segments_info": info})
        categories = [{**c, "isthing": int(c["name"] != "wall")} for c in content["categories"]]
        panoptic = {"images": content["images"], "annotations": annotations, "categories": categories}
        (own.root / f"panoptic_{split}.json").write_text(json.dumps(panoptic))
    files = {"train": own.root / "panoptic_train.json", "val": own.root / "panoptic_val.json"}
    made = added(own, tmp_path, stuff=None, panoptic="", **files)
    assert (made.registration.things, made.registration.stuff) == (("plate", "bolt"), ("wall",))
    found = records(whole(tmp_path), tmp_path, "train", ["instance", "panoptic", "semantic"])
    assert all(sum(not s["isthing"] for s in r["segments_info"]) == 1 for r in found)

    folders = {"train": own.root / "labels_train", "val": own.root / "labels_val"}
    made = added(own, tmp_path, stuff=None, panoptic="", classes=("even", "odd"), **folders)
    assert tasks_of("plates") == ("semantic",)
    (first, *_) = records(whole(tmp_path, "semantic"), tmp_path, "train", ["semantic"])
    assert set(np.unique(np.asarray(Image.open(first["sem_seg_file_name"])))) == {0, 1, 255}


def test_its_identity_is_its_content(own: OwnSet, tmp_path: Path) -> None:
    first = added(own, tmp_path).registration
    assert added(own, tmp_path / "again").registration.fingerprint == first.fingerprint
    smaller = added(own, tmp_path, min_pixels=30).registration
    assert (smaller.fingerprint, smaller.tiles != first.tiles) == (first.fingerprint, True)
    content = own.read()
    content["annotations"][0]["segmentation"] = [rectangle(0, 30, WIDTH, 60)]
    own.write(content)
    assert added(own, tmp_path).registration.fingerprint != first.fingerprint
    kept = Config(dataset=DatasetConfig(name="plates", task="panoptic", crop=64, fingerprint=first.tiles))
    assert dataset_dir(kept, tmp_path).name == first.tiles[:12], "an earlier version stays"


def test_a_run_knows_its_classes_without_the_data_root(own: OwnSet, tmp_path: Path) -> None:
    added(own, tmp_path)
    tree = whole(tmp_path).model_dump(mode="json")
    del datasets.DATASETS["plates"]
    with pytest.raises(UserError, match="unknown dataset"):
        validate({"dataset": {"name": "plates", "task": "panoptic"}})
    config = validate(tree)
    assert class_table("plates", "panoptic").names == NAMES
    assert from_cfg(to_cfg(config)) == config
    with pytest.raises(UserError, match="nuclei' is a dataset of this project"):
        validate({**tree, "dataset": {**tree["dataset"], "name": "nuclei"}})


def test_categories_are_what_they_are_called(own: OwnSet, tmp_path: Path) -> None:
    content = own.read()
    content["categories"] += [{"id": 0, "name": "things"}, {"id": 20, "name": "plate"}]
    content["annotations"][1]["category_id"] = 20
    own.write(content)
    made = added(own, tmp_path)
    assert made.registration.things == ("plate", "bolt")
    assert any("'plate' stands 2 times" in note for note in made.registration.notes)
    assert any("left out" in note and "things" in note for note in made.registration.notes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"name": "coco"}, "dataset of this project"),
        ({"name": "a/b"}, "letters, digits"),
        ({"stuff": ("walls",)}, "unknown class in --stuff 'walls'; valid: plate, bolt, wall"),
        ({"panoptic": ""}, "--stuff needs --panoptic-from-instances largest-first"),
        ({"stuff": NAMES}, "has no things"),
        ({"images": Path("nowhere")}, "nowhere is not there"),
        ({"uncovered": "bolt"}, "bolt is a thing"),
        ({"things": ("bolt",)}, "give --things or --stuff"),
    ],
)
def test_mistakes_are_one_line(own: OwnSet, tmp_path: Path, changes: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        added(own, tmp_path, **changes)
    assert not list(tmp_path.glob("*/registration.json"))


def test_a_damaged_registration_names_its_file(own: OwnSet, tmp_path: Path) -> None:
    added(own, tmp_path)
    path = registration.path_of("plates", tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match=r"registration\.json is damaged"):
        registration.know_all(tmp_path)


def test_what_is_reckoned_from_the_set(own: OwnSet, tmp_path: Path) -> None:
    made = added(own, tmp_path, stuff=None, resize=None)
    assert made.registration.stuff == ("wall",), "a class that covers a tenth, in few regions"
    split = read_split(made.registration.sources, "train")
    assert stuff_by_size(split) == ["wall"]
    assert resize_for(split, {"plate"}, 32) == 64, "half of the plates (32 px across of 96) are 12 px there"
    assert resize_for(split, {"bolt"}, 32) == 96, "not larger than the images are"
    assert made.registration.settings.train_points == 16**2
    assert made.registration.settings.queries == 10


def test_stuff_of_one_class_is_one_segment() -> None:
    def thing(category: int, x: int, side: int) -> Thing:
        mask = np.zeros((20, 20), dtype=bool)
        mask[:side, x : x + side] = True
        return Thing(category, mask)

    painted = paint([thing(1, 0, 5), thing(1, 10, 5), thing(0, 0, 2), thing(0, 2, 2)], (True, False))
    assert sorted((s.category, int((painted.ids == s.id).sum())) for s in painted.segments) == [(0, 4), (0, 4), (1, 42)]
