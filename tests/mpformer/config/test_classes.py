"""Class tables: the right counts without torch, and names in the order of detectron2's metadata."""

import subprocess
import sys

import pytest

from mpformer.config.classes import category_ids, class_table, num_classes, tasks_of
from mpformer.config.datasets import DATASETS
from mpformer.runtime.errors import UserError


@pytest.mark.parametrize(
    ("dataset", "things", "classes"),
    [("shapes", 8, 12), ("nuclei", 1, 1), ("coco", 80, 133), ("ade20k", 100, 150), ("cityscapes", 8, 19)],
)
def test_counts(dataset: str, things: int, classes: int) -> None:
    assert num_classes(dataset, "instance") == things
    full = tasks_of(dataset)[-1]
    assert num_classes(dataset, full) == (classes if full != "instance" else things)
    for task in tasks_of(dataset):
        table = class_table(dataset, task)
        assert len(table) == num_classes(dataset, task) == len(set(table.names))
        assert len(table.things) == things
        assert len(category_ids(dataset, task)) == len(set(category_ids(dataset, task))) == len(table)
        assert [table.names[i] for i in table.thing_indices] == list(table.things)
        assert not table.stuff or task != "instance"


def test_counting_and_naming_need_no_torch() -> None:
    code = (
        "import sys; from mpformer.config.classes import class_table, tasks_of\n"
        "from mpformer.config.datasets import DATASETS\n"
        "for d in DATASETS: class_table(d, tasks_of(d)[-1])\n"
        "assert 'torch' not in sys.modules and 'detectron2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_coco_and_cityscapes_are_detectron2s() -> None:
    from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES, _get_builtin_metadata

    coco = _get_builtin_metadata("coco_panoptic_standard")
    assert list(class_table("coco", "panoptic").names) == coco["stuff_classes"]
    ids = {**coco["thing_dataset_id_to_contiguous_id"], **coco["stuff_dataset_id_to_contiguous_id"]}
    assert [ids[c] for c in category_ids("coco", "panoptic")] == list(range(133))
    instances = _get_builtin_metadata("coco")
    assert list(class_table("coco", "instance").names) == instances["thing_classes"]
    assert list(category_ids("coco", "instance")) == list(instances["thing_dataset_id_to_contiguous_id"])
    cityscapes = _get_builtin_metadata("cityscapes")
    assert list(class_table("cityscapes", "instance").names) == cityscapes["thing_classes"]
    assert list(class_table("cityscapes", "semantic").names) == cityscapes["stuff_classes"]
    assert len(class_table("ade20k", "semantic")) == len(ADE20K_SEM_SEG_CATEGORIES)


def test_ade20k_things_are_the_instance_challenges() -> None:
    table = class_table("ade20k", "panoptic")
    things, stuff = set(table.things), set(table.stuff)
    assert {"bed", "person", "car", "door", "table", "lamp", "flag", "bicycle"} <= things
    assert {"wall", "sky", "building", "tree", "sea", "shower", "crt screen", "tank, storage tank"} <= stuff


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(UserError, match=f"valid: {', '.join(DATASETS)}"):
        num_classes("imagenet", "instance")
    with pytest.raises(UserError, match="valid: instance, panoptic, semantic"):
        num_classes("coco", "keypoints")
    with pytest.raises(UserError, match="valid: instance"):
        class_table("nuclei", "semantic")
