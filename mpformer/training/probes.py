"""Quick evaluations during training: ``probes.parquet``, one line per iteration × decoder layer.

They show when queries stop changing hands while a run trains: utilisation, consistency and the stability of the
matching from one probe to the next, on the first few validation images.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis import layer_table
from mpformer.config.schema import Config
from mpformer.data.validation import ValidationItems, validation_items
from mpformer.evaluation.evaluate import probe_scores
from mpformer.modeling.meta_arch import MPFormer
from mpformer.runtime.disk import disk_failures
from mpformer.runtime.errors import RunFailure

#: column → which of the recorder's layer values it holds
_MEASURES = {
    "Util": "Util",
    "mIoU-L": "mIoU-L",
    "IoU-gt": "IoU-gt",
    "empty_attention_share": "empty_attention_share",
}


class Prober:
    """Probes a model and keeps what the next probe compares with; its state is part of the checkpoint."""

    def __init__(self, config: Config, directory: Path, data_root: Path) -> None:
        self._config, self._data_root = config, data_root
        self.path = directory / "probes.parquet"
        self._before: layer_table.LayerTable | None = None

    @cached_property
    def _items(self) -> ValidationItems:
        """Read once: a large dataset's annotations take a minute to parse."""
        return validation_items(self._config, self._data_root, self._config.runtime.probe_images)

    def probe(self, model: MPFormer, iteration: int) -> dict[str, float]:
        """Score the model, add its lines to the file and return the metrics of the last layer, in percent."""
        scores, recorder = probe_scores(model, self._config, self._items)
        summary, table = recorder.summary(), recorder.table()
        stability = np.full(table.layers, np.nan)
        if self._before is not None:
            stability = 100 * layer_table.stability(self._before, table)
        self._before = table
        self._write(_lines(iteration, summary["layers"], scores, stability))
        return {**scores, **{name: value for name, value in summary["metrics"].items() if value is not None}}

    def cut_back(self, iteration: int) -> None:
        """Forget probes after `iteration`."""
        if self.path.exists():
            frame = _read(self.path)
            self._save(frame[frame["iteration"] <= iteration])

    def state_dict(self) -> dict[str, Any]:
        """The last probe's matching, as tensors, for the checkpoint."""
        if self._before is None:
            return {}
        columns = {name: torch.from_numpy(column.copy()) for name, column in self._before.columns.items()}
        return {"columns": columns, "layers": self._before.layers, "queries": self._before.queries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        columns = {name: column.numpy() for name, column in state.get("columns", {}).items()}
        self._before = layer_table.LayerTable(columns, state["layers"], state["queries"]) if columns else None

    def _write(self, lines: dict[str, Any]) -> None:
        import pandas as pd

        frame = pd.DataFrame(lines)
        self._save(pd.concat([_read(self.path), frame]) if self.path.exists() else frame)

    def _save(self, frame: Any) -> None:
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with disk_failures(self.path):
            frame.to_parquet(partial, index=False)
            partial.replace(self.path)


def _lines(
    iteration: int, layers: dict[str, list[float | None]], scores: dict[str, float], stability: np.ndarray
) -> dict[str, Any]:
    """Columns of one probe; AP is that of the last layer, NaN at the others."""
    count = len(stability)
    last = np.arange(count) == count - 1
    lines: dict[str, Any] = {"iteration": np.full(count, iteration), "layer": np.arange(count, dtype=np.int16)}
    for column, name in _MEASURES.items():
        values = [np.nan if value is None else value for value in layers.get(name, [])]
        lines[column] = np.pad(np.asarray(values, dtype=np.float64), (0, count - len(values)), constant_values=np.nan)
    for name in ("AP", "PQ", "mIoU"):
        if name in scores:
            lines[name] = np.where(last, scores[name], np.nan)
    return {**lines, "stability": stability}


def _read(path: Path) -> Any:
    import pandas as pd
    import pyarrow as pa

    try:
        return pd.read_parquet(path)
    except (OSError, pa.ArrowException) as error:
        advice = "move it away and launch again: the probes before are lost, nothing else hangs on them"
        raise RunFailure("disk", f"{path} is damaged ({str(error).splitlines()[0]}): {advice}") from None
