"""Scores accumulated again from per_image.parquet equal those of the scorers, and weights equal copies."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from analysis import scores


def scene(seed: int, images: int, categories: int = 3, empty_category: bool = True) -> tuple[dict, list[dict]]:
    """COCO ground truth and detections of noisy boxes, with crowds, ties of scores, empty images and a category
    without ground truth.
    """
    rng = np.random.default_rng(seed)
    annotations, detections = [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 6)):
            x, y, w, h = (*rng.integers(0, 50, 2), *rng.integers(4, 40, 2))
            crowd = int(rng.random() < 0.15)
            annotations.append(segment(image, int(rng.integers(1, categories + 1)), (x, y, w, h)) | {"iscrowd": crowd})
            for _ in range(rng.integers(0, 4)):
                dx, dy, dw, dh = rng.integers(-4, 5, 4)
                box = (max(0, x + dx), max(0, y + dy), max(1, w + dw), max(1, h + dh))
                category = (
                    annotations[-1]["category_id"] if rng.random() < 0.8 else int(rng.integers(1, categories + 2))
                )
                detections.append(segment(image, category, box) | {"score": round(float(rng.random()), 1)})
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
        annotation["area"] = float(coco_mask.area(annotation["segmentation"]))
    names = [{"id": c, "name": str(c)} for c in range(1, categories + 1 + empty_category)]
    size = {"height": 100, "width": 100}
    return {
        "info": {},
        "images": [{"id": i, **size} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": names,
    }, detections


def segment(image: int, category: int, box: tuple[int, ...]) -> dict:
    mask = np.zeros((100, 100), dtype=np.uint8, order="F")
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    return {"image_id": image, "category_id": int(category), "segmentation": coco_mask.encode(mask), "bbox": box}


def evaluate(truth: dict, detections: list[dict]) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(detections), "segm")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def per_image(evaluator: COCOeval) -> pa.Table:
    """per_image.parquet's detection columns, from pycocotools' own matches over all areas."""
    images = evaluator.params.imgIds
    rows: dict[int, dict[str, list]] = {i: {name: [] for name in LISTS} for i in images}
    everything = evaluator.params.areaRng[0]
    for entry in evaluator.evalImgs:
        if entry is None or entry["aRng"] != everything:
            continue
        row = rows[entry["image_id"]]
        row["det_category"] += [entry["category_id"]] * len(entry["dtScores"])
        row["det_score"] += entry["dtScores"]
        row["det_match"].append(entry["dtMatches"] > 0)
        row["det_ignore"].append(entry["dtIgnore"])
        row["gt_category"] += [entry["category_id"]] * len(entry["gtIgnore"])
        row["gt_ignore"] += [bool(flag) for flag in entry["gtIgnore"]]
    for row in rows.values():
        for name in ("det_match", "det_ignore"):
            joined = np.concatenate([np.zeros((10, 0)), *row[name]], axis=1).astype(bool)
            row[name] = joined.ravel().tolist()
    table = {"image_id": pa.array(images, pa.int64())}
    return pa.table(table | {name: pa.array([rows[i][name] for i in images], kind) for name, kind in LISTS.items()})


LISTS = {
    "det_category": pa.list_(pa.int16()),
    "det_score": pa.list_(pa.float32()),
    "det_match": pa.list_(pa.bool_()),
    "det_ignore": pa.list_(pa.bool_()),
    "gt_category": pa.list_(pa.int16()),
    "gt_ignore": pa.list_(pa.bool_()),
}


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_pycocotools_bit_for_bit(seed: int, tmp_path: Path) -> None:
    evaluator = evaluate(*scene(seed, images=40))
    pq.write_table(per_image(evaluator), tmp_path / "per_image.parquet")
    got = scores.read(tmp_path / "per_image.parquet").scores()
    assert got["AP"] == evaluator.stats[0] * 100
    assert got["AP50"] == evaluator.stats[1] * 100
    assert got["AP75"] == evaluator.stats[2] * 100
    assert 5 < got["AP"] < 95


@pytest.mark.parametrize("seed", range(4))
def test_a_weight_is_as_many_copies(seed: int) -> None:
    truth, detections = scene(seed, images=25)
    for number, detection in enumerate(detections):
        detection["score"] += number / 8192  # equal scores in one image have no order that copies could keep
    weights = np.random.default_rng(seed).multinomial(25, np.full(25, 1 / 25))
    got = scores.from_table(per_image(evaluate(truth, detections))).scores(weights)
    copied_truth, copied = copies(truth, detections, weights)
    stats = evaluate(copied_truth, copied).stats
    assert (got["AP"], got["AP50"], got["AP75"]) == pytest.approx(stats[:3] * 100, rel=1e-12)
    assert (weights == 0).any()


def copies(truth: dict, detections: list[dict], weights: np.ndarray) -> tuple[dict, list[dict]]:
    """The data set in which image i occurs weights[i] times, under new ids."""
    new: dict[int, list[int]] = {}
    images: list[dict] = []
    for image, weight in zip(truth["images"], weights, strict=True):
        new[image["id"]] = [len(images) + 1 + n for n in range(weight)]
        images += [{**image, "id": identity} for identity in new[image["id"]]]
    annotations = [{**a, "image_id": i} for a in truth["annotations"] for i in new[a["image_id"]]]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    found = [{**d, "image_id": i} for d in detections for i in new[d["image_id"]]]
    return {**truth, "images": images, "annotations": annotations}, found


def test_no_ground_truth_is_not_a_score() -> None:
    table = per_image(evaluate(*scene(0, images=10)))
    assert np.isnan(scores.from_table(table).scores(np.zeros(10))["AP"])
    nothing = pa.Table.from_pylist([{"image_id": i} | {name: [] for name in LISTS} for i in range(3)])
    nothing = nothing.cast(pa.schema([("image_id", pa.int64()), *LISTS.items()]))
    assert np.isnan(scores.from_table(nothing).scores()["AP50"])


def test_detections_alone_or_truth_alone() -> None:
    truth, detections = scene(1, images=10, empty_category=False)
    only = [d for d in detections if d["category_id"] == 1]
    evaluator = evaluate(truth, only)
    assert scores.from_table(per_image(evaluator)).scores()["AP"] == evaluator.stats[0] * 100


@pytest.mark.parametrize("weights", [[1.5] * 10, [-1] * 10, [1] * 9])
def test_weights_are_checked(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="10 integers"):
        scores.check_weights(np.array(weights), 10)


def test_malformed_files_are_refused() -> None:
    table = per_image(evaluate(*scene(0, images=5)))
    with pytest.raises(ValueError, match="occurs twice"):
        scores.from_table(pa.concat_tables([table, table]))
    short = table.set_column(3, "det_match", table["det_category"].cast(pa.list_(pa.bool_())))
    with pytest.raises(ValueError, match="10 flags"):
        scores.from_table(short)


def panoptic_table() -> pa.Table:
    return pa.table(
        {
            "image_id": [2, 1, 3],
            "pq_category": [[0, 1], [0], [2]],
            "pq_tp": [[2, 0], [1], [0]],
            "pq_fp": [[0, 1], [1], [0]],
            "pq_fn": [[1, 0], [0], [2]],
            "pq_iou": [[1.5, 0.0], [0.9], [0.0]],
            "sem_category": [[0, 1], [0], [2]],
            "sem_intersection": [[10, 5], [20], [0]],
            "sem_union": [[20, 5], [20], [7]],
        }
    )


def test_panoptic_quality_by_hand() -> None:
    got = scores.from_table(panoptic_table(), things={0: True, 1: True, 2: False}).scores()
    first = 2.4 / (3 + 0.5 + 0.5)
    assert got["PQ"] == pytest.approx(100 * first / 3)
    assert got["SQ"] == pytest.approx(100 * 0.8 / 3)
    assert got["RQ"] == pytest.approx(100 * 0.75 / 3)
    assert got["PQ_th"] == pytest.approx(100 * first / 2)
    assert got["PQ_st"] == 0
    # Image 2 alone, twice (images are ordered by id): class 2 is gone.
    got = scores.from_table(panoptic_table()).scores(np.array([0, 2, 0]))
    assert got["PQ"] == pytest.approx(100 * (1.5 / 2.5) / 2)


def test_panoptic_quality_is_panopticapis() -> None:
    panoptic = pytest.importorskip("panopticapi.evaluation")
    rng = np.random.default_rng(0)
    stat, rows = panoptic.PQStat(), []
    for image in range(20):
        row: dict[str, Any] = {"image_id": image, "pq_category": list(range(5))}
        for name, key in (("pq_tp", "tp"), ("pq_fp", "fp"), ("pq_fn", "fn")):
            row[name] = rng.integers(0, 3, 5).tolist()
            for category in range(4):
                setattr(stat[category], key, getattr(stat[category], key) + row[name][category])
            row[name][4] = 0
        row["pq_iou"] = [tp * float(rng.uniform(0.5, 1)) for tp in row["pq_tp"]]
        for category in range(5):
            stat[category].iou += row["pq_iou"][category]
        rows.append(row)
    categories = {c: {"isthing": int(c < 2)} for c in range(5)}
    got = scores.from_table(pa.Table.from_pylist(rows), things={c: c < 2 for c in range(5)}).scores()
    for isthing, name in ((None, "PQ"), (True, "PQ_th"), (False, "PQ_st")):
        wanted, _ = stat.pq_average(categories, isthing)
        assert got[name] == pytest.approx(100 * wanted["pq"], rel=1e-12)
    wanted, _ = stat.pq_average(categories, None)
    assert (got["SQ"], got["RQ"]) == pytest.approx((100 * wanted["sq"], 100 * wanted["rq"]), rel=1e-12)


def test_mean_iou_by_hand() -> None:
    table = panoptic_table()
    assert scores.from_table(table).scores()["mIoU"] == pytest.approx(100 * (30 / 40 + 1 + 0) / 3)
    assert scores.from_table(table).scores(np.array([3, 1, 0]))["mIoU"] == pytest.approx(100 * (70 / 80 + 1) / 2)
    # A class that is only predicted does not count where the ground truth is known.
    known = table.append_column("sem_ground_truth", pa.array([[20, 5], [20], [0]]))
    assert scores.from_table(known).scores()["mIoU"] == pytest.approx(100 * (30 / 40 + 1) / 2)
