"""layers.parquet and layer_masks/: written, read back, and turned into tables."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from analysis import layer_table
from analysis.layer_table import LayerTable
from analysis.masks import layer_mask_record, read_layer_masks, write_layer_masks
from analysis.matching import ImagePrediction
from analysis.recorder import LayerRecorder

LAYERS, QUERIES = 3, 5


def line(image: int, layer: int, obj: int, here: int, final: int, previous: float, truth: float, score: float) -> dict:
    return {
        "image_id": image,
        "layer": layer,
        "object": obj,
        "class": obj % 2,
        "thing": True,
        "area": 10 * (obj + 1),
        "query_here": here,
        "query_final": final,
        "iou_previous": previous,
        "iou_last": 1.0,
        "iou_gt": truth,
        "score": score,
        "predicted_class": 0,
        "both_empty_previous": False,
        "both_empty_last": False,
    }


def table_of(lines: list[dict]) -> LayerTable:
    columns: dict[str, np.ndarray] = {
        name: np.array([row[name] for row in lines], dtype=dtype) for name, dtype in layer_table.COLUMNS.items()
    }
    return LayerTable(columns, LAYERS, QUERIES)


@pytest.fixture
def table() -> LayerTable:
    nan = float("nan")
    return table_of(
        [
            line(1, 0, 0, 4, 2, nan, 0.1, 0.2),
            line(1, 0, 1, 3, 3, nan, 0.0, 0.2),
            line(1, 1, 0, 2, 2, 0.2, 0.5, 0.4),
            line(1, 1, 1, 3, 3, 0.1, 0.5, 0.4),
            line(1, 2, 0, 2, 2, 0.9, 0.8, 0.9),
            line(1, 2, 1, 3, 3, 0.8, 0.8, 0.3),
            line(2, 0, 0, 2, 2, nan, 0.9, 0.7),
            line(2, 1, 0, 2, 2, 0.7, 0.0, 0.8),
            line(2, 2, 0, 2, 2, 0.3, 0.8, 0.9),
        ]
    )


def random_recorder(images: int = 4) -> LayerRecorder:
    g = torch.Generator().manual_seed(0)
    recorder = LayerRecorder(things=[True, False])
    for image in range(images):
        logits = torch.randn(LAYERS, QUERIES, 8, 8, generator=g)
        masks = torch.rand(3, 32, 32, generator=g) > 0.5
        recorder.add(image, logits, torch.randn(LAYERS, QUERIES, 3, generator=g), masks, torch.tensor([0, 1, 1]))
    return recorder


def test_written_and_read_back_gives_the_summary(tmp_path: Path) -> None:
    recorder = random_recorder()
    recorder.write(tmp_path / "layers.parquet")
    table = layer_table.read(tmp_path / "layers.parquet")
    assert (table.layers, table.queries) == (LAYERS, QUERIES)
    assert layer_table.summarise(table) == recorder.summary()
    for name, column in recorder.rows().items():
        np.testing.assert_array_equal(table[name], column)
    assert table["thing"].tolist() == (table["class"] == 0).tolist()


def test_a_foreign_parquet_is_refused(tmp_path: Path, table: LayerTable) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "layers.parquet"
    layer_table.write(table, path)
    pq.write_table(pq.read_table(path).drop(["iou_gt"]), path)
    with pytest.raises(ValueError, match="lacks the columns iou_gt"):
        layer_table.read(path)
    layer_table.write(table, path)
    pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)
    with pytest.raises(ValueError, match="numbers of layers and queries"):
        layer_table.read(path)


def test_transitions(table: LayerTable) -> None:
    third = 100 / 3
    assert layer_table.transitions(table) == pytest.approx(
        np.array([[100, 2 * third, 2 * third], [2 * third, 100, 100], [2 * third, 100, 100]])
    )
    counts = layer_table.query_transitions(table, 0)
    assert counts.sum() == 3
    assert (counts[4, 2], counts[3, 3], counts[2, 2]) == (1, 1, 1)
    with pytest.raises(ValueError, match="layer must be in"):
        layer_table.query_transitions(table, LAYERS - 1)


def test_query_usage_and_drops(table: LayerTable) -> None:
    assert layer_table.query_usage(table).tolist() == [0, 0, 2, 1, 0]
    assert layer_table.iou_drops(table) == pytest.approx(np.array([[0.8, 0.9, 0.3], [0.1, 0.2, 0.7]]))


def test_a_layer_of_empty_pairs_is_left_out_of_the_mean(table: LayerTable) -> None:
    empty = table["layer"] == 1
    columns = dict(table.columns)
    columns["iou_previous"] = np.where(empty, np.nan, table["iou_previous"])
    columns["both_empty_previous"] = empty
    summary = layer_table.summarise(LayerTable(columns, LAYERS, QUERIES))
    assert summary["layers"]["mIoU-L"] == [None, None, pytest.approx(200 / 3)]
    assert summary["metrics"]["mIoU-L"] == pytest.approx(200 / 3)
    assert summary["layers"]["empty_pair_share"] == [None, 100, 0]


def test_worst_changes_follow_the_rule(table: LayerTable) -> None:
    worst = layer_table.worst_changes(table, n=5, min_score=0.5)
    # The drop of 0.9 belongs to a query whose last score is 0.3.
    assert worst[["image_id", "object", "query", "layer"]].to_numpy().tolist() == [[1, 0, 2, 1], [2, 0, 2, 2]]
    assert worst["drop"].tolist() == pytest.approx([0.8, 0.7])
    assert worst["iou_gt_before"].tolist() == pytest.approx([0.1, 0.0])
    assert worst["iou_gt_after"].tolist() == pytest.approx([0.5, 0.8])
    assert layer_table.worst_changes(table, n=1, min_score=0)["object"].tolist() == [1]
    assert len(layer_table.worst_changes(table, n=5, min_score=0)) == 2
    assert len(layer_table.worst_changes(table, n=5, min_score=0, per_image=2)) == 3
    assert layer_table.worst_changes(table, n=5, min_score=0.95).empty


def test_stability_between_checkpoints(table: LayerTable) -> None:
    moved = {**table.columns, "query_here": np.where(table["image_id"] == 2, 0, table["query_here"])}
    now = LayerTable(moved, LAYERS, QUERIES)
    assert layer_table.stability(table, now) == pytest.approx([2 / 3] * LAYERS)
    assert layer_table.stability(table, table).tolist() == [1] * LAYERS


def record_of(seed: int, objects: int = 2, max_queries: int = 100) -> tuple[dict, torch.Tensor, LayerRecorder]:
    g = torch.Generator().manual_seed(seed)
    logits, classes = torch.randn(LAYERS, QUERIES, 8, 8, generator=g), torch.randn(LAYERS, QUERIES, 3, generator=g)
    masks, labels = torch.rand(objects, 32, 32, generator=g) > 0.5, torch.arange(objects) % 2
    prediction = ImagePrediction.from_masks(logits, classes, (32, 32))
    record = layer_mask_record(
        seed,
        prediction,
        masks,
        labels,
        class_names=["disc", "grass"],
        things=[True, False],
        max_queries=max_queries,
        file_name="x.png",
    )
    recorder = LayerRecorder()
    recorder.add(seed, logits, classes, masks, labels, image_size=(32, 32))
    return record, logits, recorder


def test_layer_mask_record_holds_the_masks() -> None:
    record, logits, recorder = record_of(3)
    assert (record["height"], record["width"]) == (8, 8)
    assert [entry["class_name"] for entry in record["objects"]] == ["disc", "grass"]
    assert [entry["thing"] for entry in record["objects"]] == [True, False]
    for entry in record["layers"]:
        assert [query["query"] for query in entry["queries"]] == list(range(QUERIES))
        for query in entry["queries"]:
            mask = coco_mask.decode({"size": [8, 8], "counts": query["rle"]})
            np.testing.assert_array_equal(mask, logits[entry["layer"], query["query"]] > 0)
    rows = recorder.table().frame()
    for row in rows[rows["layer"] == LAYERS - 1].itertuples():
        query = record["layers"][-1]["queries"][row.query_final]
        assert query["object"] == row.object
        assert query["iou_gt"] == pytest.approx(row.iou_gt, abs=1e-4)
        assert query["iou_previous"] == pytest.approx(row.iou_previous, abs=1e-4)
    assert all(query["iou_previous"] is None for query in record["layers"][0]["queries"])


def test_matched_queries_are_kept_first() -> None:
    full, _, recorder = record_of(4)
    kept, _, _ = record_of(4, max_queries=3)
    matched = set(recorder.rows()["query_final"].tolist())
    chosen = {query["query"] for query in kept["layers"][0]["queries"]}
    assert len(chosen) == 3
    assert matched <= chosen
    assert len(full["layers"][0]["queries"]) == QUERIES


def test_layer_masks_directory(tmp_path: Path) -> None:
    records = [record_of(7)[0], record_of(8, objects=0)[0]]
    pixels = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    write_layer_masks(tmp_path / "layer_masks", records, {7: pixels})
    index = json.loads((tmp_path / "layer_masks" / "index.json").read_text())
    assert [(entry["image_id"], entry["image"]) for entry in index["images"]] == [(7, "7.png"), (8, None)]
    from PIL import Image

    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "layer_masks" / "7.png")), pixels)
    assert [record["objects"] for record in read_layer_masks(tmp_path / "layer_masks")] == [
        records[0]["objects"],
        [],
    ]


def test_a_barely_trained_run_shows_its_surest_tenth() -> None:
    assert layer_table.score_floor([0.9, 0.8, 0.1]) == 0.5
    assert layer_table.score_floor([]) == 0.5
    scores = np.linspace(0, 0.4, 101)
    assert layer_table.score_floor(scores) == pytest.approx(0.36)
    assert np.mean(scores >= layer_table.score_floor(scores)) == pytest.approx(0.1, abs=0.02)
