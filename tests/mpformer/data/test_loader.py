"""The batch of an iteration is a function of (configuration, iteration) alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mpformer.config.schema import Config
from mpformer.data.loader import TrainSet, train_batches
from mpformer.data.sets.shapes_set import prepare_shapes
from mpformer.data.validation import validation_items

Batch = list[dict]


def same(a: Batch, b: Batch) -> bool:
    return len(a) == len(b) and all(
        x["image_id"] == y["image_id"]
        and torch.equal(x["image"], y["image"])
        and torch.equal(x["instances"].gt_classes, y["instances"].gt_classes)
        and torch.equal(x["instances"].gt_masks, y["instances"].gt_masks)
        for x, y in zip(a, b, strict=True)
    )


def flat(found: list[Batch]) -> Batch:
    return [item for batch in found for item in batch]


def batches(config: Config, root: Path, count: int, start: int = 0, rank: int = 0, size: int = 1) -> list[Batch]:
    found = train_batches(config, root, start, rank, size)
    return [next(found) for _ in range(count)]


def test_a_batch_item_is_what_the_model_expects(shapes_config: Config, shapes_root: Path) -> None:
    item = batches(shapes_config, shapes_root, 1)[0][0]
    assert item["image"].shape == (3, 64, 64)
    assert item["image"].dtype == torch.uint8
    found = item["instances"]
    assert found.image_size == (64, 64)
    assert found.gt_masks.dtype == torch.bool
    assert found.gt_masks.shape == (len(found.gt_classes), 64, 64)
    assert found.gt_classes.dtype == torch.int64
    assert found.gt_masks.flatten(1).any(1).all()
    assert (item["height"], item["width"]) == (64, 64)
    assert Path(item["file_name"]).exists()


def test_starting_later_gives_the_same_batches(shapes_config: Config, shapes_root: Path) -> None:
    whole = batches(shapes_config, shapes_root, 8)
    late = batches(shapes_config, shapes_root, 3, start=5)
    assert all(same(a, b) for a, b in zip(whole[5:], late, strict=True))
    assert not same(whole[0], whole[1])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shapes_config: Config, shapes_root: Path, workers: int) -> None:
    alone = batches(shapes_config, shapes_root, 4)
    helped = batches(shapes_config.replace({"runtime.workers": workers}), shapes_root, 4)
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_workers_read_the_same_validation_items(shapes_config: Config, shapes_root: Path) -> None:
    alone = list(validation_items(shapes_config, shapes_root))
    helped = list(validation_items(shapes_config.replace({"runtime.workers": 2}), shapes_root))
    assert same([item.inputs for item in alone], [item.inputs for item in helped])
    for one, other in zip(alone, helped, strict=True):
        assert (one.truth.image_id, one.truth.annotations) == (other.truth.image_id, other.truth.annotations)
        assert one.truth.ids is not None
        assert other.truth.ids is not None
        assert np.array_equal(one.truth.ids, other.truth.ids)


def test_processes_share_the_effective_batch(shapes_config: Config, shapes_root: Path) -> None:
    whole = batches(shapes_config, shapes_root, 3)
    halves = [batches(shapes_config, shapes_root, 3, rank=r, size=2) for r in range(2)]
    for t, batch in enumerate(whole):
        assert same(batch, [halves[slot % 2][t][slot // 2] for slot in range(4)])


def test_an_epoch_shows_every_image_once(shapes_config: Config, shapes_root: Path) -> None:
    ids = [[item["image_id"] for item in b] for b in batches(shapes_config, shapes_root, 9)]
    epochs = [[i for batch in ids[k : k + 3] for i in batch] for k in (0, 3, 6)]
    assert all(sorted(e) == list(range(1, 13)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_seed_changes_the_order_and_the_global_state_does_not(shapes_config: Config, shapes_root: Path) -> None:
    before = torch.random.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist()
    first = batches(shapes_config, shapes_root, 2)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before[1]
    torch.manual_seed(99)
    np.random.seed(99)
    again = batches(shapes_config, shapes_root, 2)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    other = batches(shapes_config.replace({"seed": 1}), shapes_root, 2)
    assert not same(first[0], other[0])


def test_images_are_flipped_with_their_masks(shapes_config: Config, shapes_root: Path) -> None:
    still = batches(shapes_config.replace({"dataset.augmentation.flip": False}), shapes_root, 6)
    moved = batches(shapes_config, shapes_root, 6)
    flipped = 0
    for a, b in zip(flat(still), flat(moved), strict=True):
        if torch.equal(a["image"], b["image"]):
            continue
        flipped += 1
        assert torch.equal(a["image"].flip(2), b["image"])
        assert torch.equal(a["instances"].gt_masks.flip(2), b["instances"].gt_masks)
    assert 4 <= flipped <= 20


def test_tasks_give_their_targets(shapes_config: Config, shapes_root: Path) -> None:
    by_task = {
        task: {i["image_id"]: i["instances"] for i in flat(batches(_task(shapes_config, task), shapes_root, 3))}
        for task in ("instance", "panoptic", "semantic")
    }
    for image_id, panoptic in by_task["panoptic"].items():
        things = panoptic.gt_classes < 8
        instance, semantic = by_task["instance"][image_id], by_task["semantic"][image_id]
        assert sorted(panoptic.gt_classes[things].tolist()) == sorted(instance.gt_classes.tolist())
        assert torch.equal(panoptic.gt_masks[things].sum((0, 1)), instance.gt_masks.sum((0, 1)))
        assert semantic.gt_classes.tolist() == sorted(set(panoptic.gt_classes.tolist()))
        assert semantic.gt_masks.sum(0).max() == 1
        assert torch.equal(semantic.gt_masks.any(0), panoptic.gt_masks.any(0))


def _task(config: Config, task: str) -> Config:
    return config.replace({"dataset.task": task, "dataset.augmentation.flip": False})


def test_fewer_training_images(shapes_config: Config, shapes_root: Path) -> None:
    few = shapes_config.replace({"dataset.train_images": 5})
    seen = {item["image_id"] for b in batches(few, shapes_root, 5) for item in b}
    assert seen == {1, 2, 3, 4, 5}


def test_images_without_an_object_do_not_train_instances(shapes_config: Config, tmp_path: Path) -> None:
    assert shapes_config.dataset.shapes is not None
    root = prepare_shapes(shapes_config.dataset.shapes, tmp_path, workers=1)
    file = root / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3]
    for a in content["annotations"]:
        a["iscrowd"] = int(a["image_id"] == 4)
    file.write_text(json.dumps(content))
    assert {r["image_id"] for r in TrainSet(_task(shapes_config, "instance"), tmp_path).records} == {*range(1, 13)} - {
        3,
        4,
    }
    assert len(TrainSet(shapes_config, tmp_path).records) == 12


def test_validation_items_come_in_order_with_their_truth(shapes_config: Config, shapes_root: Path) -> None:
    items = validation_items(shapes_config, shapes_root)
    assert len(items) == 6
    listed = list(items)
    assert [i.truth.image_id for i in listed] == [1, 2, 3, 4, 5, 6]
    for item in listed:
        truth, found = item.truth, item.inputs["instances"]
        assert truth.ids is not None
        assert truth.semantic is not None
        assert [s.category for s in truth.segments] == found.gt_classes.tolist()
        for segment, mask in zip(truth.segments, found.gt_masks, strict=True):
            assert (truth.ids == segment.id).tolist() == mask.tolist()
            assert (truth.semantic[mask.numpy()] == segment.category).all()
        crowd = [a for a in truth.annotations or () if a["iscrowd"]]
        assert len(truth.annotations or ()) - len(crowd) == sum(s.category < 8 for s in truth.segments)
    assert len(list(validation_items(shapes_config, shapes_root, limit=2))) == 2
    fewer = shapes_config.replace({"evaluation.val_images": 3})
    assert len(validation_items(fewer, shapes_root)) == 3


def test_validation_images_are_resized_and_the_truth_is_not(shapes_config: Config, shapes_root: Path) -> None:
    config = shapes_config.replace({"evaluation.min_size_test": 96, "evaluation.max_size_test": 2000})
    item = next(iter(validation_items(config, shapes_root)))
    assert item.inputs["image"].shape == (3, 96, 96)
    assert item.inputs["instances"].gt_masks.shape[1:] == (96, 96)
    assert (item.inputs["height"], item.inputs["width"]) == (64, 64)
    assert item.truth.ids is not None
    assert item.truth.ids.shape == (64, 64)


def test_only_what_is_scored_is_read(shapes_config: Config, shapes_root: Path) -> None:
    config = shapes_config.replace({"evaluation.panoptic": False, "evaluation.semantic": False})
    truth = next(iter(validation_items(config, shapes_root))).truth
    assert truth.annotations is not None
    assert truth.ids is None
    assert truth.semantic is None


def test_batches_for_a_gpu_are_pinned_and_others_are_not(
    shapes_config: Config, shapes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor, those of the instances too, as torch's loader asks for it where there is an accelerator."""
    pinned: set[int] = set()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pinned.add(copy.data_ptr())
        return copy

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    for wanted in (True, False):
        items = next(train_batches(shapes_config, shapes_root, pinned=wanted))
        tensors = [t for i in items for t in (i["image"], i["instances"].gt_classes, i["instances"].gt_masks)]
        assert len(tensors) == 3 * shapes_config.schedule.batch_size
        assert all((t.data_ptr() in pinned) is wanted for t in tensors)
        assert items[0]["file_name"]
        pinned.clear()
