"""Scores of counted pixels agree with the recorded ones, and these with other libraries' evaluators, to 1e-6."""

import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mpformer.config.schema import Config, validate
from mpformer.data.coco_layout import encode_mask
from mpformer.data.validation import GroundTruth, Segment
from mpformer.evaluation.scoring.coco import encode_masks
from mpformer.evaluation.scoring.from_counts import CountScorer
from mpformer.evaluation.scoring.panoptic import Parts, compare_by_files, predicted_segments
from mpformer.evaluation.scoring.scorer import SegmentationScorer, scorer_versions
from mpformer.evaluation.scoring.semantic import SemanticScorer
from tests.support.plain_counts import compared, counted
from tests.support.present import present

SIDE, THINGS, CLASSES = 40, 8, 12


def config(**evaluation: object) -> Config:
    scored = {"instance": True, "panoptic": True, "semantic": True, "size_areas": (60, 200), **evaluation}
    return validate({"dataset": {"name": "shapes", "task": "panoptic", "shapes": {}}, "evaluation": scored})


def random_truth(rng: np.random.Generator, image_id: int) -> GroundTruth:
    """Random rectangles over two stuff halves, with void, a crowd segment and a crowd object."""
    ids = np.where(np.arange(SIDE)[None] < rng.integers(8, 32), 1, 2) * np.ones((SIDE, 1), dtype=np.int64)
    classes = [8 + int(c) for c in rng.permutation(4)[:2]]
    for k in range(rng.integers(0, 7)):
        y, x = rng.integers(0, SIDE - 4, 2)
        h, w = rng.integers(3, 20, 2)
        ids[y : y + h, x : x + w] = k + 3
        classes.append(int(rng.integers(THINGS)))
    ids[: rng.integers(0, 8)] = 0
    segments = [Segment(i + 1, c, bool(c < THINGS and rng.random() < 0.15)) for i, c in enumerate(classes)]
    segments = [s for s in segments if (ids == s.id).any()]
    annotations = tuple(
        {
            "category_id": s.category,
            "iscrowd": int(s.crowd),
            "area": int((ids == s.id).sum()),
            "segmentation": encode_mask(ids == s.id),
        }
        for s in segments
        if s.category < THINGS
    )
    lookup = np.full(len(classes) + 1, 255, dtype=np.uint8)
    for s in segments:
        lookup[s.id] = s.category
    return GroundTruth(image_id, SIDE, SIDE, annotations, ids.astype(np.int32), tuple(segments), lookup[ids])


def random_prediction(rng: np.random.Generator, truth: GroundTruth) -> dict:
    """The truth, shifted and relabelled here and there, and some nonsense."""
    shift = tuple(rng.integers(-2, 3, 2))
    ids = np.roll(present(truth.ids), shift, (0, 1)).astype(np.int64)
    ids[rng.random((SIDE, SIDE)) < 0.05] = 77
    info = [
        {"id": s.id, "category_id": s.category if rng.random() < 0.8 else int(rng.integers(CLASSES))}
        for s in truth.segments
    ]
    info.append({"id": 77, "category_id": int(rng.integers(CLASSES))})
    info.append({"id": 99, "category_id": 3})  # listed, without a pixel
    masks = [np.roll(truth.ids == s.id, shift, (0, 1)) for s in truth.segments if s.category < THINGS]
    masks += [rng.random((SIDE, SIDE)) < 0.2 for _ in range(3)]
    classes = [s.category for s in truth.segments if s.category < THINGS]
    classes = [c if rng.random() < 0.8 else int(rng.integers(THINGS)) for c in classes] + [0, 1, 2]
    return {
        "instances": SimpleNamespace(
            pred_masks=torch.from_numpy(np.stack(masks)),
            scores=torch.from_numpy(rng.choice([0.3, 0.5, 0.9, 0.71], len(masks)).astype(np.float32)),
            pred_classes=torch.tensor(classes),
        ),
        "panoptic_seg": (torch.from_numpy(ids), info),
        "sem_seg": torch.from_numpy(rng.random((CLASSES, SIDE, SIDE)).astype(np.float32))
        + 2
        * torch.nn.functional.one_hot(torch.from_numpy(present(truth.semantic).astype(np.int64)) % CLASSES, CLASSES)
        .permute(2, 0, 1)
        .roll(shift, (1, 2)),
    }


def scored(seed: int, images: int) -> tuple[SegmentationScorer, dict[str, float]]:
    rng = np.random.default_rng(seed)
    scorer = SegmentationScorer(config())
    for i in range(images):
        truth = random_truth(rng, 10 + i)
        scorer.add(random_prediction(rng, truth), truth)
    return scorer, scorer.result()


def scored_by_counts(seed: int, images: int) -> list[dict[str, float]]:
    """Three layers: the predictions, those of the next seed, the predictions again; instances and semantics."""
    rngs = [np.random.default_rng(s) for s in (seed, seed + 1)]
    scorer = CountScorer(config(panoptic=False), 3)
    for i in range(images):
        truth, _ = (random_truth(rng, 10 + i) for rng in rngs)
        maps = scorer.maps(truth)
        first, second = (counted(random_prediction(rng, truth), maps, CLASSES) for rng in rngs)
        scorer.add(truth, maps, [first, second, first])
    return scorer.results()


@pytest.mark.parametrize(("seed", "images"), [(0, 70), (1, 12), (2, 12), (3, 12), (4, 33)])
def test_scores_of_counts_agree_with_the_recorded(seed: int, images: int) -> None:
    _, recorded = scored(seed, images)
    first, second, again = scored_by_counts(seed, images)
    assert {"AP", "AP50", "AP75", "APs", "APm", "PQ", "SQ", "RQ", "PQ_th", "PQ_st", "mIoU"} <= recorded.keys()
    assert {"AP", "AP50", "AP75", "mIoU"} == first.keys()
    for key, value in first.items():
        assert value == pytest.approx(recorded[key], abs=1e-9), key
    assert first == again != second
    assert 1 < recorded["AP"] < 95
    assert 5 < recorded["PQ"] < 95
    assert 5 < recorded["mIoU"] < 95


def test_ap_is_what_coco_summarizes() -> None:
    """Our reading of the precision array is pycocotools' own summary."""
    scorer = SegmentationScorer(config(size_areas=None, panoptic=False, semantic=False))
    rng = np.random.default_rng(3)
    for i in range(8):
        truth = random_truth(rng, i)
        scorer.add(random_prediction(rng, truth), truth)
    assert scorer.instance is not None
    evaluation = scorer.instance.evaluate()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluator.summarize()
    stats = 100 * evaluation.evaluator.stats[:6]
    expected = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), stats, strict=True))
    expected = {k: v for k, v in expected.items() if v >= 0}
    assert evaluation.result() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_panoptic_parts_agree_image_by_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, 1)
    ids, segments = predicted_segments(random_prediction(rng, truth)["panoptic_seg"])
    ours, theirs = compared(ids, segments, truth), compare_by_files(ids, segments, truth)
    assert {c: p for c, p in ours.items() if p.touched} == {c: p for c, p in theirs.items() if p.touched}


def test_panoptic_quality_of_hotcoco_agrees() -> None:
    """A third implementation, on the sum over images."""
    import hotcoco
    from hotcoco.panoptic import PanopticEval

    scorer, result = scored(5, 10)
    rng = np.random.default_rng(5)
    truth_rows, found_rows, images = [], [], []
    for i in range(10):
        truth = random_truth(rng, 10 + i)
        ids, segments = predicted_segments(random_prediction(rng, truth)["panoptic_seg"])
        images.append({"id": 10 + i, "height": SIDE, "width": SIDE})
        truth_rows += [_row(10 + i, s.id, s.category, int(s.crowd), present(truth.ids) == s.id) for s in truth.segments]
        found_rows += [_row(10 + i, k, c, 0, ids == k) for k, c in segments.items()]
    categories = [{"id": c + 1, "name": str(c), "isthing": int(c < THINGS)} for c in range(CLASSES)]
    dataset = {"images": images, "categories": categories}
    for rows in (truth_rows, found_rows):
        for number, row in enumerate(rows):
            row["id"] = number + 1
    gt = hotcoco.COCO({**dataset, "annotations": truth_rows})
    dt = hotcoco.COCO({**dataset, "annotations": found_rows})
    evaluation = PanopticEval(gt, dt)
    evaluation.evaluate()
    assert 100 * evaluation.results()["All"]["pq"] == pytest.approx(result["PQ"], abs=1e-6)
    assert scorer.panoptic is not None


def _row(image_id: int, number: int, category: int, crowd: int, mask: np.ndarray) -> dict:
    rle = encode_mask(mask)
    return {
        "image_id": image_id,
        "category_id": category + 1,
        "iscrowd": crowd,
        "area": float(mask.sum()),
        "bbox": [0.0, 0.0, float(SIDE), float(SIDE)],
        "segmentation": rle,
    }


def test_miou_is_detectron2s(monkeypatch: pytest.MonkeyPatch) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.evaluation import SemSegEvaluator

    rng = np.random.default_rng(0)
    truths = {f"{i}.png": random_truth(rng, i) for i in range(6)}
    name = "test_miou_is_detectron2s"
    DatasetCatalog.register(name, lambda: [{"file_name": f, "sem_seg_file_name": f} for f in truths])
    MetadataCatalog.get(name).set(stuff_classes=[str(c) for c in range(CLASSES)], ignore_label=255)
    # numpy 2 refuses the default loading function's copy=False; ours also spares the files
    theirs = SemSegEvaluator(name, False, sem_seg_loading_fn=lambda f, dtype: present(truths[f].semantic).astype(dtype))
    theirs.reset()
    ours = SemanticScorer(CLASSES)
    for file, truth in truths.items():
        prediction = random_prediction(rng, truth)
        theirs.process([{"file_name": file}], [prediction])
        ours.add(prediction["sem_seg"], truth)
    assert ours.result()["mIoU"] == pytest.approx(theirs.evaluate()["sem_seg"]["mIoU"], abs=1e-6)
    DatasetCatalog.remove(name)


def test_no_detection_at_all_scores_zero() -> None:
    truth = random_truth(np.random.default_rng(2), 4)
    assert truth.annotations
    nothing = SimpleNamespace(
        pred_masks=torch.zeros(0, SIDE, SIDE), scores=torch.zeros(0), pred_classes=torch.zeros(0, dtype=torch.int64)
    )
    wanted = config(panoptic=False, semantic=False)
    scorer, counts = SegmentationScorer(wanted), CountScorer(wanted, 1)
    scorer.add({"instances": nothing}, truth)
    maps = counts.maps(truth)
    counts.add(truth, maps, [counted({"instances": nothing}, maps, CLASSES)])
    assert scorer.result()["AP"] == counts.results()[0]["AP"] == 0.0


def test_encoded_detections_are_the_same() -> None:
    """Detections may come as COCO results, so that one encoded mask serves several of them."""
    rng = np.random.default_rng(7)
    plain, encoded = (SegmentationScorer(config(panoptic=False, semantic=False)) for _ in range(2))
    for i in range(5):
        truth = random_truth(rng, i + 1)
        found = random_prediction(rng, truth)["instances"]
        plain.add({"instances": found}, truth)
        masks = encode_masks(found.pred_masks.numpy())
        rows = zip(found.pred_classes.tolist(), found.scores.tolist(), masks, strict=True)
        results = [{"image_id": i + 1, "category_id": c + 1, "score": s, "segmentation": rle} for c, s, rle in rows]
        encoded.add({"instances": results}, truth)
    assert plain.result() == encoded.result()
    assert plain.result() == plain.result()


def test_no_ground_truth_leaves_the_score_out() -> None:
    truth = GroundTruth(1, SIDE, SIDE, (), np.zeros((SIDE, SIDE), np.int32), (), np.full((SIDE, SIDE), 255, np.uint8))
    prediction = random_prediction(np.random.default_rng(1), truth)
    scorer, counts = SegmentationScorer(config()), CountScorer(config(panoptic=False), 1)
    scorer.add({**prediction, "panoptic_seg": (torch.zeros(SIDE, SIDE), [])}, truth)
    maps = counts.maps(truth)
    counts.add(truth, maps, [counted(prediction, maps, CLASSES)])
    assert scorer.result() == counts.results()[0] == {}


def test_perfect_prediction_scores_hundred() -> None:
    truth = random_truth(np.random.default_rng(2), 4)
    truth = GroundTruth(
        4, SIDE, SIDE, tuple({**a, "iscrowd": 0} for a in present(truth.annotations)), truth.ids,
        tuple(Segment(s.id, s.category, False) for s in truth.segments), truth.semantic,
    )  # fmt: skip
    things = [s for s in truth.segments if s.category < THINGS]
    prediction = {
        "instances": SimpleNamespace(
            pred_masks=torch.from_numpy(np.stack([truth.ids == s.id for s in things])),
            scores=torch.ones(len(things)),
            pred_classes=torch.tensor([s.category for s in things]),
        ),
        "panoptic_seg": (
            torch.from_numpy(truth.ids),
            [{"id": s.id, "category_id": s.category} for s in truth.segments],
        ),
        "sem_seg": torch.from_numpy(present(truth.semantic).astype(np.int64)),
    }
    scorer = SegmentationScorer(config())
    scorer.add(prediction, truth)
    assert {k: round(v, 9) for k, v in scorer.result().items() if k in ("AP", "PQ", "mIoU")} == {
        "AP": 100.0,
        "PQ": 100.0,
        "mIoU": 100.0,
    }


def test_parts_add_up() -> None:
    total = Parts(1, 2, 3, 0.5)
    total.add(Parts(1, 1, 1, 0.25))
    assert total == Parts(2, 3, 4, 0.75)


def test_versions_of_the_recorded_scorers() -> None:
    assert {"pycocotools", "panopticapi", "cityscapesscripts"} == set(scorer_versions())
