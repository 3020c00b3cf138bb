"""``layer_masks/``: every query's mask, class and score at every layer of a few images, as RLE, for figures and the
explorer.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.matching import ImagePrediction, MatchWeights, ground_truth_cells, match_layers

SCHEMA = 1


@torch.no_grad()
def layer_mask_record(
    image_id: int,
    prediction: ImagePrediction,
    gt_masks: Tensor,
    gt_labels: Tensor,
    *,
    class_names: Sequence[str],
    things: Sequence[bool],
    file_name: str = "",
    weights: MatchWeights | None = None,
    assignment: np.ndarray | None = None,
    max_queries: int = 100,
) -> dict[str, Any]:
    """One image's record of ``layer_masks/<image_id>.json``, plain JSON data.

    gt_masks (n, H, W) bool covers the image at any resolution, gt_labels (n,). ``assignment`` is
    :func:`match_layers`' V (A, Q) if it is known already. At most ``max_queries`` queries are kept: those matched
    at the last layer, then those of the highest last score. RLEs are COCO's compressed strings at mask resolution
    (``height``, ``width`` of the record); an IoU that does not exist is None. Raises ValueError without a layer 0.
    """
    if prediction.first_layer:
        raise ValueError("layer 0 predicts nothing: these records hold every layer from 0 on")
    gt_masks = gt_masks.to(prediction.class_logits.device).bool()
    cells = ground_truth_cells(gt_masks, prediction.grid)
    if assignment is None:
        assignment = match_layers(prediction, cells, gt_labels, weights)
    probability = prediction.scores
    queries = _kept_queries(assignment[-1], probability[-1].max(-1).values.cpu().numpy(), max_queries)
    labels = gt_labels.tolist()
    return {
        "schema": SCHEMA,
        "image_id": image_id,
        "file": file_name,
        "image": f"{image_id}.png",
        "height": prediction.grid.cells[0],
        "width": prediction.grid.cells[1],
        "objects": _objects(cells, labels, class_names, things),
        "layers": _layers(prediction, cells, assignment, queries, class_names),
    }


def write_layer_masks(directory: Path, records: Sequence[Mapping[str, Any]], images: Mapping[int, np.ndarray]) -> None:
    """Write ``<image_id>.json`` and ``<image_id>.png`` of each record, then ``index.json`` listing them.

    ``images`` maps an image id to its RGB pixels (H, W, 3) uint8 without padding; a record without pixels gets
    ``image: null``.
    """
    from PIL import Image

    directory.mkdir(parents=True, exist_ok=True)
    index = []
    for record in records:
        identity = record["image_id"]
        name = record["image"] if identity in images else None
        if name is not None:
            Image.fromarray(images[identity]).save(directory / name, optimize=True)
        _dump(directory / f"{identity}.json", {**record, "image": name})
        entry = {key: record[key] for key in ("image_id", "file", "height", "width")}
        index.append({**entry, "image": name, "record": f"{identity}.json", "objects": len(record["objects"])})
    _dump(directory / "index.json", {"schema": SCHEMA, "images": index})


def read_layer_masks(directory: Path) -> list[dict[str, Any]]:
    """The records that ``index.json`` lists, in its order."""
    index = json.loads((directory / "index.json").read_text())
    return [json.loads((directory / entry["record"]).read_text()) for entry in index["images"]]


def _dump(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, separators=(",", ":"), allow_nan=False))


def _kept_queries(final: np.ndarray, score: np.ndarray, limit: int) -> np.ndarray:
    order = np.lexsort((np.arange(len(final)), -score, final < 0))
    return np.sort(order[:limit])


def _objects(
    cells: Tensor, labels: Sequence[int], class_names: Sequence[str], things: Sequence[bool]
) -> list[dict[str, Any]]:
    strings = _encode(cells.cpu().numpy())
    return [
        {"object": i, "class": label, "class_name": class_names[label], "thing": bool(things[label]), "rle": rle}
        for i, (label, rle) in enumerate(zip(labels, strings, strict=True))
    ]


def _layers(
    prediction: ImagePrediction, cells: Tensor, assignment: np.ndarray, queries: np.ndarray, class_names: Sequence[str]
) -> list[dict[str, Any]]:
    index = torch.from_numpy(queries)
    targets = cells.cpu().numpy()
    layers: list[dict[str, Any]] = []
    before: np.ndarray | None = None
    for layer in range(prediction.layers):
        masks = (prediction.logits(layer, layer + 1, index)[0] > 0).cpu().numpy()
        scores, classes = prediction.scores[layer, index].max(-1)
        objects = assignment[layer, queries]
        lines = zip(
            queries.tolist(),
            classes.tolist(),
            scores.tolist(),
            objects.tolist(),
            [None] * len(queries) if before is None else _pair_ious(before, masks),
            [_iou(mask, targets[m]) if m >= 0 else None for mask, m in zip(masks, objects, strict=True)],
            _encode(masks),
            strict=True,
        )
        layers.append({"layer": layer, "queries": [_query(line, class_names) for line in lines]})
        before = masks
    return layers


def _query(line: tuple[Any, ...], class_names: Sequence[str]) -> dict[str, Any]:
    query, label, score, matched, previous, truth, rle = line
    return {
        "query": query,
        "class": label,
        "class_name": class_names[label],
        "score": round(score, 4),
        "object": matched,
        "iou_previous": previous,
        "iou_gt": truth,
        "rle": rle,
    }


def _pair_ious(first: np.ndarray, second: np.ndarray) -> list[float | None]:
    return [_iou(a, b) for a, b in zip(first, second, strict=True)]


def _iou(first: np.ndarray, second: np.ndarray) -> float | None:
    union = np.logical_or(first, second).sum()
    return round(float(np.logical_and(first, second).sum() / union), 4) if union else None


def _encode(masks: np.ndarray) -> list[str]:
    """(k, h, w) bool → k COCO compressed run-length strings."""
    from pycocotools import mask as coco_mask

    if len(masks) == 0:
        return []
    codes = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
    return [code["counts"].decode("ascii") for code in codes]
