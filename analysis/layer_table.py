"""``layers.parquet``: one line per image × layer × object matched at the last layer. No torch.

Everything that the report and the figures say about layers is computed from these lines; the definitions are those of
:mod:`analysis.layers` (a test holds the two equal). Shares and IoUs are given in percent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.jumps import jump_rates

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike

#: Column → dtype. ``query_here`` is −1 where no query was matched; IoUs are NaN where both masks are empty (and
#: ``iou_previous`` at layer 0).
COLUMNS = {
    "image_id": np.int64,
    "layer": np.int16,
    "object": np.int32,
    "class": np.int16,
    "thing": np.bool_,
    "area": np.int32,
    "query_here": np.int32,
    "query_final": np.int32,
    "iou_previous": np.float32,
    "iou_last": np.float32,
    "iou_gt": np.float32,
    "score": np.float32,
    "predicted_class": np.int16,
    "both_empty_previous": np.bool_,
    "both_empty_last": np.bool_,
}


@dataclass(frozen=True)
class LayerTable:
    """The lines of ``layers.parquet`` by column, and the model's numbers of prediction layers (A = L + 1) and
    queries (Q).

    ``first_layer`` is 1 for a model that predicts nothing from its bare queries: its lines of layer 0 hold no query,
    IoU or score, and what is computed from them does not exist.
    """

    columns: Mapping[str, np.ndarray]
    layers: int
    queries: int
    first_layer: int = 0

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    def __len__(self) -> int:
        return len(self.columns["layer"])

    def frame(self) -> "pd.DataFrame":
        """The lines as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(dict(self.columns))

    def grid(self, column: str) -> np.ndarray:
        """A column as (A, pairs): one row per layer, one column per (image, object) matched at the last layer."""
        order = np.lexsort((self["object"], self["image_id"], self["layer"]))
        return self[column][order].reshape(self.layers, len(self) // max(1, self.layers))


def empty_columns() -> dict[str, np.ndarray]:
    """The columns without a line."""
    return {name: np.zeros(0, dtype=dtype) for name, dtype in COLUMNS.items()}


def write(table: LayerTable, path: Path) -> None:
    """Write ``layers.parquet`` with the numbers of layers and queries in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {"mpformer.layers": str(table.layers), "mpformer.queries": str(table.queries)}
    if table.first_layer:
        metadata["mpformer.first_layer"] = str(table.first_layer)
    arrow = pa.table({name: table[name].astype(dtype) for name, dtype in COLUMNS.items()})
    pq.write_table(arrow.replace_schema_metadata(metadata), path, compression="zstd")


def read(path: Path) -> LayerTable:
    """Read ``layers.parquet``; raises ValueError if a column or the metadata is missing."""
    import pyarrow.parquet as pq

    arrow = pq.read_table(path)
    metadata = arrow.schema.metadata or {}
    if missing := [name for name in COLUMNS if name not in arrow.column_names]:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
    try:
        layers, queries = int(metadata[b"mpformer.layers"]), int(metadata[b"mpformer.queries"])
    except KeyError:
        raise ValueError(f"{path} does not tell its numbers of layers and queries") from None
    columns = {name: arrow[name].to_numpy().astype(dtype) for name, dtype in COLUMNS.items()}
    return LayerTable(columns, layers, queries, int(metadata.get(b"mpformer.first_layer", 0)))


def summarise(table: LayerTable) -> dict[str, Any]:
    """The layer analysis' part of ``result.json``, in percent; None stands for "does not exist".

    ``metrics`` holds the means: mIoU-L over i = 1 … L, mIoU-L-last, Util over i = 0 … L − 1, Util-consecutive over
    its L values; a layer in which every pair is of two empty masks is left out; jump-rate and jump-rate-late are those
    of :mod:`analysis.jumps`. ``layers`` holds the L + 1 values of each of the others. ``effective_queries`` is a number
    of queries. A table without a line gives None everywhere. A model without layer 0 gives None there, and for its
    jump-rate, since a jump at step 1 is not seen.
    """
    layers = {
        "mIoU-L": layer_means(table, "iou_previous"),
        "mIoU-L-last": layer_means(table, "iou_last"),
        "Util": 100 * utilization(table),
        "Util-consecutive": 100 * utilization_consecutive(table),
        "IoU-gt": layer_means(table, "iou_gt"),
        "empty_pair_share": empty_pair_share(table),
    }
    metrics = {
        "mIoU-L": layers["mIoU-L"][1:],
        "mIoU-L-last": layers["mIoU-L-last"][:-1],
        "Util": layers["Util"][:-1],
        "Util-consecutive": layers["Util-consecutive"][:-1],
    }
    counts, rates = query_usage(table), jump_rates(table)
    jumping = {"jump-rate": rates.once, "jump-rate-late": rates.late}
    return {
        "metrics": {name: _number(value) for name, value in (_means_known(metrics) | jumping).items()},
        "layers": {name: [_number(value) for value in values] for name, values in layers.items()},
        "used_query_share": _number(100 * (counts > 0).mean()) if counts.sum() else None,
        "effective_queries": _number(effective_queries(counts)),
    }


def layer_means(table: LayerTable, column: str) -> np.ndarray:
    """Mean of an IoU column per layer, NaN left out: (A,) percent, NaN where nothing is left."""
    values = table.grid(column).astype(np.float64)
    known = ~np.isnan(values)
    return 100 * _divide(np.where(known, values, 0).sum(1), known.sum(1))


def utilization(table: LayerTable) -> np.ndarray:
    """Util^i: share of the (image, object) pairs whose query at layer i is their query at the last layer; (A,) in
    [0, 1].
    """
    here = table.grid("query_here")
    shares = _divide((here == table.grid("query_final")).sum(1), np.full(len(here), here.shape[1]))
    shares[: table.first_layer] = np.nan
    return shares


def utilization_consecutive(table: LayerTable) -> np.ndarray:
    """Share of the pairs whose query at layer i is their query at layer i + 1; (A,) in [0, 1], NaN at layer L."""
    here = table.grid("query_here")
    kept = ((here[:-1] == here[1:]) & (here[:-1] >= 0)).sum(1)
    shares = np.append(_divide(kept, np.full(len(kept), here.shape[1])), np.nan)
    shares[: table.first_layer] = np.nan
    return shares


def empty_pair_share(table: LayerTable) -> np.ndarray:
    """Share of the mask pairs (layer i − 1, layer i) of two empty masks: (A,) percent, NaN at layer 0."""
    flags = table.grid("both_empty_previous")
    share = 100 * _divide(flags.sum(1), np.full(len(flags), flags.shape[1]))
    share[: table.first_layer + 1] = np.nan
    return share


def query_usage(table: LayerTable) -> np.ndarray:
    """How often each query is matched at the last layer: (Q,) int64."""
    last = table["layer"] == table.layers - 1
    return np.bincount(table["query_final"][last], minlength=table.queries)


def effective_queries(counts: np.ndarray) -> float:
    """``exp(− Σ p log p)`` of the shares p = counts / Σ counts; NaN if nothing was counted."""
    share = counts[counts > 0] / max(1, counts.sum())
    return float(np.exp(-(share * np.log(share)).sum())) if share.size else float("nan")


def transitions(table: LayerTable) -> np.ndarray:
    """Which layer's query an object ends with: (A, A), entry [i, j] the percentage of pairs with the same query at
    layers i and j.
    """
    here = table.grid("query_here")
    same = (here[:, None] == here[None]) & (here[:, None] >= 0)
    shares = 100 * _divide(same.sum(2), np.full(same.shape[:2], here.shape[1]))
    shares[: table.first_layer] = shares[:, : table.first_layer] = np.nan
    return shares


def query_transitions(table: LayerTable, layer: int) -> np.ndarray:
    """Transition matrix of matched queries from ``layer`` to ``layer + 1``: (Q, Q) counts of objects that went from
    query p to query q.

    Raises ValueError unless 0 ≤ layer < L, from the first layer on that predicts.
    """
    if not table.first_layer <= layer < table.layers - 1:
        raise ValueError(f"layer must be in {table.first_layer} … {table.layers - 2}, got {layer}")
    here = table.grid("query_here")[layer : layer + 2]
    both = (here >= 0).all(0)
    counts = np.zeros((table.queries, table.queries), dtype=np.int64)
    np.add.at(counts, (here[0, both], here[1, both]), 1)
    return counts


def iou_drops(table: LayerTable) -> np.ndarray:
    """1 − IoU(layer i − 1, layer i) of the matched final queries: (L, pairs) in [0, 1], NaN where both masks are
    empty.
    """
    return 1 - table.grid("iou_previous")[1:].astype(np.float64)


def stability(before: LayerTable, now: LayerTable) -> np.ndarray:
    """Share of (image, object) pairs matched to the same query in two tables (two checkpoints of one run): (A,) in
    [0, 1].

    Pairs that only one table knows are left out; NaN if there is none.
    """
    if (before.layers, before.first_layer) != (now.layers, now.first_layer):
        raise ValueError("tables of different layers")
    keys = ["image_id", "object", "layer", "query_here"]
    joined = before.frame()[keys].merge(now.frame()[keys], on=keys[:3], suffixes=("_before", "_now"))
    same = (joined["query_here_before"] == joined["query_here_now"]) & (joined["query_here_now"] >= 0)
    shares = same.groupby(joined["layer"]).mean()
    return shares.reindex(range(now.first_layer, now.layers)).reindex(range(now.layers)).to_numpy()


def score_floor(scores: "ArrayLike", high: float = 0.5, share: float = 0.1) -> float:
    """The smallest final score that counts as high in one run: ``high``, or where less than ``share`` of the matched
    queries reach it, the score that this share does reach. A barely trained run then shows its surest queries.
    """
    values = np.asarray(scores, dtype=float)
    return high if values.size == 0 else min(high, float(np.quantile(values, 1 - share)))


def worst_changes(table: LayerTable, n: int, min_score: float | None = None, per_image: int = 1) -> "pd.DataFrame":
    """The failure gallery's rule, over all layers: the ``n`` largest drops of the IoU between adjacent layers, among
    confident final queries.

    Considered are the matched final queries whose score at the last layer is at least ``min_score`` (None: the
    table's :func:`score_floor`), at most ``per_image`` of an image, each object once, at its largest drop. Sorted by
    falling drop; ties by image, object and layer, so that the choice is deterministic. Columns: image_id, object,
    class, area, query, layer (the later of the two), drop, iou_gt_before, iou_gt_after, final_score.
    """
    frame = table.frame().sort_values(["image_id", "object", "layer"])
    pair = frame.groupby(["image_id", "object"], sort=False)
    frame["iou_gt_before"] = pair["iou_gt"].shift(1)
    frame["final_score"] = pair["score"].transform("last")
    frame["drop"] = 1 - frame["iou_previous"]
    floor = score_floor(frame.loc[frame["layer"] == table.layers - 1, "score"]) if min_score is None else min_score
    frame = frame[(frame["final_score"] >= floor) & (frame["drop"] > 0)]
    frame = frame.rename(columns={"query_final": "query", "iou_gt": "iou_gt_after"})
    frame = frame.sort_values(["drop", "image_id", "object", "layer"], ascending=[False, True, True, True])
    frame = frame.drop_duplicates(["image_id", "object"])
    frame = frame[frame.groupby("image_id").cumcount() < per_image].head(n)
    kept = [
        "image_id",
        "object",
        "class",
        "area",
        "query",
        "layer",
        "drop",
        "iou_gt_before",
        "iou_gt_after",
        "final_score",
    ]
    return frame[kept].reset_index(drop=True)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient in float64, NaN where the denominator is 0."""
    return np.divide(
        numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=np.asarray(denominator) != 0
    )


def _means_known(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    known = {name: values[~np.isnan(values)] for name, values in metrics.items()}
    return {name: float(values.mean()) if values.size else float("nan") for name, values in known.items()}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
