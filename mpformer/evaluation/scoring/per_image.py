"""per_image.parquet: what a bootstrap over images needs to re-accumulate AP, PQ and mIoU without the model.

One line an image. Detections are ordered by class, then by falling score; ``det_match`` and ``det_ignore`` are T x n
row-major for the T = 10 IoU thresholds 0.5, 0.55 ... 0.95. The columns of a task that was not scored are absent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

_LISTS = {
    "det_category": "int16",
    "det_score": "float32",
    "det_match": "bool",
    "det_ignore": "bool",
    "gt_category": "int16",
    "gt_ignore": "bool",
    "pq_category": "int16",
    "pq_tp": "int32",
    "pq_fp": "int32",
    "pq_fn": "int32",
    "pq_iou": "float64",
    "sem_category": "int16",
    "sem_intersection": "int64",
    "sem_union": "int64",
    "sem_ground_truth": "int64",
}


def table(rows: Sequence[Mapping[str, Any]]) -> "pa.Table":
    """The rows of one image each, whose columns are lists or arrays, as a table."""
    import pyarrow as pa

    types = {"bool": pa.bool_(), "float32": pa.float32(), "float64": pa.float64()}
    types |= {"int16": pa.int16(), "int32": pa.int32(), "int64": pa.int64()}
    columns: dict[str, Any] = {"image_id": pa.array([row["image_id"] for row in rows], type=pa.int64())}
    for key, kind in _LISTS.items():
        if any(key in row for row in rows):
            parts = [np.asarray(row.get(key, ()), dtype=kind) for row in rows]
            ends = np.cumsum([0, *map(len, parts)], dtype=np.int32)
            values = pa.array(np.concatenate(parts), type=types[kind])
            columns[key] = pa.ListArray.from_arrays(pa.array(ends), values)
    return pa.table(columns)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of :meth:`mpformer.evaluation.scoring.scorer.SegmentationScorer.per_image`, atomically."""
    import pyarrow.parquet as pq

    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table(rows), partial, compression="zstd")
    partial.replace(path)
