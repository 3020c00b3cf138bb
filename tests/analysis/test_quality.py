"""Per-layer AP, PQ and mIoU on plain tensors: by hand, and against pycocotools on the same masks."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from analysis.matching import ImagePrediction
from analysis.quality import InferenceSettings as Settings
from analysis.quality import LayerQuality, instances, match_detections, panoptic_counts, panoptic_segments

THINGS = [True, True, False]


def boxes() -> tuple[torch.Tensor, torch.Tensor]:
    """Ground truth (3, 32, 32) in stride-4 blocks: a thing of class 0, one of class 1, and stuff of class 2 on all
    the rest.
    """
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    masks[0, :16, :16] = True
    masks[1, 16:24, 16:32] = True
    masks[2] = ~(masks[0] | masks[1])
    return masks, torch.tensor([0, 1, 2])


def perfect(layers: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that paint every object, one query each; the fourth query says nothing."""
    masks, labels = boxes()
    logits = torch.full((layers, 4, 8, 8), -20.0)
    classes = torch.zeros(layers, 4, 4)
    classes[:, 3, 3] = 20
    for query in range(3):
        logits[:, query] = masks[query, ::4, ::4] * 40.0 - 20
        classes[:, query, labels[query]] = 20
    return logits, classes


def quality_of(logits: torch.Tensor, classes: torch.Tensor) -> list[dict[str, float]]:
    quality = LayerQuality(THINGS)
    quality.add(ImagePrediction.from_masks(logits, classes, (32, 32)), *boxes())
    return quality.scores()


def test_a_perfect_layer_beside_a_bad_one() -> None:
    logits, classes = perfect()
    logits[0, 0], classes[0, 0] = -20, torch.tensor([0.0, 0, 0, 20])  # at layer 0 the first object is missed
    bad, good = quality_of(logits, classes)
    assert {name: round(value, 3) for name, value in good.items()} == dict.fromkeys(good, 100.0)
    assert bad["AP"] == pytest.approx(50)
    # Class 1 is perfect, class 0 missed; stuff is still found.
    assert bad["PQ"] == pytest.approx(100 * 2 / 3)


def test_mean_iou_by_hand() -> None:
    logits, classes = perfect(1)
    logits[0, 0, 0, :4] = -20  # a row of four of the object's sixteen cells goes to stuff
    logits[0, 2, 0, :4] = 20
    wanted = (12 / 16 + 1 + 40 / 44) / 3
    assert quality_of(logits, classes)[0]["mIoU"] == pytest.approx(100 * wanted)


def test_panoptic_counts_by_hand() -> None:
    canvas = np.array([[0, 0, 1, 1], [2, 2, -1, -1]])
    truth = np.zeros((2, 2, 4), dtype=bool)
    truth[0, 0, :3] = True  # class 0: segment 0 covers 2 of 3
    truth[1, 1, 2] = True  # class 1: nothing there
    got = panoptic_counts(canvas, np.array([0, 1, 1]), truth, np.array([0, 1]), 2)
    # Segment 1 lies half on the first object: a false positive; segment 2 lies on cells without ground truth: none.
    assert got.tolist() == [[1, 0, 0, pytest.approx(2 / 3)], [0, 1, 1, 0]]


def test_segments_of_one_stuff_class_are_one() -> None:
    logits = torch.full((3, 4, 4), -20.0)
    logits[0, :2], logits[1, 2:], logits[2, :1] = 20, 20, 20
    probability = torch.zeros(3, 4)
    probability[:2, 2], probability[2, 0] = 1, 0.9
    canvas, names = panoptic_segments(logits, probability, np.array(THINGS), Settings())
    # The thing loses its row to the more confident stuff and is dropped.
    assert (canvas == 0).all()
    assert names.tolist() == [2]
    assert panoptic_segments(logits, probability * 0.5, np.array(THINGS), Settings())[1].size == 0


def test_average_precision_is_pycocotools() -> None:
    g = torch.Generator().manual_seed(0)
    quality, truth, found = LayerQuality([True, True]), [], []
    for image in range(12):
        masks = torch.zeros(4, 64, 64, dtype=torch.bool)
        logits = torch.full((1, 8, 16, 16), -6.0)
        for number in range(4):
            y, x = torch.randint(0, 8, (2,), generator=g).tolist()
            masks[number, 4 * y : 4 * y + 24, 4 * x : 4 * x + 24] = True
            for query in (number, number + 4):
                dy, dx = (max(0, v + d) for v, d in zip((y, x), torch.randint(-1, 2, (2,), generator=g), strict=True))
                logits[0, query, dy : dy + 6, dx : dx + 6] = 3 * torch.rand((), generator=g)
        classes = torch.randn(1, 8, 3, generator=g)
        labels = torch.randint(2, (4,), generator=g)
        quality.add(ImagePrediction.from_masks(logits, classes, (64, 64)), masks, labels)
        probability = classes[0].softmax(-1)[:, :-1]
        predicted = instances(logits[0], probability, np.array([True, True]), 100)
        found += [line(image, *row) for row in zip(*predicted, strict=True)]
        truth += [line(image, masks[m, ::4, ::4].numpy(), 1.0, label) for m, label in enumerate(labels.tolist())]
    stats = pycocotools_stats(truth, found)
    got = quality.scores()[0]
    assert (got["AP"], got["AP50"], got["AP75"]) == pytest.approx(100 * stats[:3], rel=1e-12)
    assert 5 < got["AP"] < 95


def line(image: int, mask: np.ndarray, score: float, category: int) -> dict:
    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    area = float(coco_mask.area(code))
    return {"image_id": image, "category_id": int(category), "segmentation": code, "score": float(score), "area": area}


def pycocotools_stats(truth: list[dict], found: list[dict]) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        images = sorted({entry["image_id"] for entry in truth})
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "height": 16, "width": 16} for i in images],
            "annotations": [{**entry, "id": n, "iscrowd": 0} for n, entry in enumerate(truth, 1)],
            "categories": [{"id": c, "name": str(c)} for c in range(2)],
        }
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(found), "segm")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats


def test_a_detection_takes_the_best_free_object() -> None:
    masks = np.zeros((2, 1, 4), dtype=bool)
    masks[0, 0, :3], masks[1, 0, :4] = True, True
    truth = masks.copy()
    got = match_detections(masks[[1, 1]], np.array([0.5, 0.9]), np.zeros(2, int), truth, np.zeros(2, int))
    # The better one takes the exact object; what is left overlaps 3 of 4.
    assert got.sum(0).tolist() == [6, 10]


def test_images_without_objects_or_predictions() -> None:
    quality = LayerQuality(THINGS)
    empty = torch.zeros(0, 32, 32, dtype=torch.bool)
    quality.add(ImagePrediction.from_masks(*perfect(), (32, 32)), empty, torch.zeros(0, dtype=torch.int64))
    assert np.isnan(quality.scores()[0]["AP"])
    quality.add(ImagePrediction.from_masks(*perfect(), (32, 32)), *boxes())
    assert quality.scores()[1]["AP50"] > 0
    with pytest.raises(ValueError, match="4 class logits for 2 classes"):
        LayerQuality([True, False]).add(ImagePrediction.from_masks(*perfect(), (32, 32)), *boxes())
