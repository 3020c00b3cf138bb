"""per_image.parquet: what a bootstrap over images needs to re-accumulate AP, PQ and mIoU without the model.

One line an image. Detections are ordered by class, then by falling score; ``det_match`` and ``det_ignore`` are T x n
row-major for the T = 10 IoU thresholds 0.5, 0.55 ... 0.95. The columns of a task that was not scored are absent.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of :meth:`mpformer.evaluation.scoring.scorer.SegmentationScorer.per_image`, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    present = [key for key in _LISTS if any(key in row for row in rows)]
    types = {"bool": pa.bool_(), "float32": pa.float32(), "float64": pa.float64()}
    types |= {"int16": pa.int16(), "int32": pa.int32(), "int64": pa.int64()}
    schema = pa.schema([("image_id", pa.int64())] + [(key, pa.list_(types[_LISTS[key]])) for key in present])
    complete = [{"image_id": row["image_id"]} | {key: row.get(key, []) for key in present} for row in rows]
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.Table.from_pylist(complete, schema=schema), partial, compression="zstd")
    partial.replace(path)
