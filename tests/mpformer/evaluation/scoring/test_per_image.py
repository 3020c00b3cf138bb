"""per_image.parquet gives back the scores without model or scorer."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from analysis import scores
from mpformer.config.classes import class_table
from mpformer.config.schema import Config, validate
from mpformer.data.loader import train_batches
from mpformer.data.validation import ValidationItem, validation_items
from mpformer.evaluation.scoring import per_image
from mpformer.evaluation.scoring.scorer import SegmentationScorer


def imperfect(item: ValidationItem, rng: np.random.Generator) -> dict:
    """Predictions made of the ground truth: shifted by a pixel or two, a tenth of the classes wrong, noise objects."""
    instances, truth = item.inputs["instances"], item.truth
    shift = tuple(int(v) for v in rng.integers(-2, 3, 2))
    classes = instances.gt_classes.clone()
    wrong = torch.from_numpy(rng.random(len(classes)) < 0.1)
    classes[wrong] = torch.from_numpy(rng.integers(0, 12, int(wrong.sum())))
    masks = instances.gt_masks.roll(shift, (1, 2))
    info = [{"id": i + 1, "category_id": int(c)} for i, c in enumerate(classes)]
    ids = torch.zeros(masks.shape[1:], dtype=torch.int64)
    semantic = torch.zeros(masks.shape[1:], dtype=torch.int64)
    for number, (mask, category) in enumerate(zip(masks, classes, strict=True)):
        ids[mask], semantic[mask] = number + 1, category
    things = classes < 8
    found = SimpleNamespace(
        pred_masks=masks[things],
        scores=torch.from_numpy(rng.random(int(things.sum())).astype(np.float32)),
        pred_classes=classes[things],
    )
    assert truth.ids is not None
    return {"instances": found, "panoptic_seg": (ids, info), "sem_seg": semantic}


def scorer_on(config: Config, root: Path) -> SegmentationScorer:
    rng = np.random.default_rng(0)
    scorer = SegmentationScorer(config)
    for item in validation_items(config, root):
        scorer.add(imperfect(item, rng), item.truth)
    return scorer


def test_scores_come_back_from_the_file(shapes_config: Config, shapes_root: Path, tmp_path: Path) -> None:
    scorer = scorer_on(shapes_config, shapes_root)
    expected = scorer.result()
    per_image.write(tmp_path / "per_image.parquet", scorer.per_image())
    things = dict(enumerate(class_table("shapes", "panoptic").is_thing))
    again = scores.read(tmp_path / "per_image.parquet", things).scores()
    assert {"AP", "AP50", "AP75", "PQ", "SQ", "RQ", "PQ_th", "PQ_st", "mIoU"} == set(again)
    for key, value in again.items():
        assert value == pytest.approx(expected[key], abs=1e-6), key
    assert not list(tmp_path.glob(".*"))


def test_columns_of_the_contract(shapes_config: Config, shapes_root: Path, tmp_path: Path) -> None:
    scorer = scorer_on(shapes_config, shapes_root)
    scorer.result()
    per_image.write(tmp_path / "p.parquet", scorer.per_image())
    table = pq.read_table(tmp_path / "p.parquet")
    assert str(table.schema.field("image_id").type) == "int64"
    assert str(table.schema.field("det_score").type) == "list<element: float>"
    rows = table.to_pylist()
    assert [row["image_id"] for row in rows] == list(range(1, 7))
    for row in rows:
        assert len(row["det_match"]) == len(row["det_ignore"]) == 10 * len(row["det_score"])
        assert len(row["det_category"]) == len(row["det_score"])
        assert len(row["gt_category"]) == len(row["gt_ignore"])
        assert len(row["pq_category"]) == len(row["pq_tp"]) == len(row["pq_iou"])
        assert all(i <= u for i, u in zip(row["sem_intersection"], row["sem_union"], strict=True))


def test_tasks_that_are_not_scored_have_no_columns(shapes_config: Config, shapes_root: Path, tmp_path: Path) -> None:
    config = shapes_config.replace({"evaluation.panoptic": False, "evaluation.semantic": False})
    rng = np.random.default_rng(0)
    scorer = SegmentationScorer(config)
    full = validation_items(shapes_config, shapes_root)
    for item, rich in zip(validation_items(config, shapes_root), full, strict=True):
        scorer.add({"instances": imperfect(rich, rng)["instances"]}, item.truth)
    scorer.result()
    per_image.write(tmp_path / "p.parquet", scorer.per_image())
    assert not [c for c in pq.read_table(tmp_path / "p.parquet").column_names if c.startswith(("pq_", "sem_"))]


def test_an_instance_model_scores_the_same_objects(shapes_root: Path) -> None:
    """With task instance the classes are those of the things alone, and perfect masks reach AP 100."""
    config = validate(
        {
            "dataset": {
                "name": "shapes",
                "task": "instance",
                "shapes": {"side": 64, "train_images": 12, "val_images": 6},
            },
            "schedule": {"batch_size": 2},
        }
    )
    scorer = SegmentationScorer(config)
    for item in validation_items(config, shapes_root):
        found = item.inputs["instances"]
        perfect = SimpleNamespace(
            pred_masks=found.gt_masks, scores=torch.ones(len(found)), pred_classes=found.gt_classes
        )
        scorer.add({"instances": perfect}, item.truth)
    assert scorer.result()["AP"] == pytest.approx(100.0)
    assert next(train_batches(config, shapes_root))[0]["instances"].gt_classes.max() < 8
