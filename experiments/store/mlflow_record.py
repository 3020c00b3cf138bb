"""``mlflow.json`` of a run: where its metrics were copied to, and how far, for each MLflow server.

``mlflow/store.json``: the store's name on the servers.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from experiments.store import records
from experiments.store.records import Record
from experiments.store.run_dir import RunDir, Store


@dataclass(frozen=True)
class Copied:
    """How far a run has been copied to one server."""

    mlflow_run: str = ""
    experiment: str = ""
    """Id of the MLflow run's experiment, which its address contains."""
    offset: int = 0
    """Bytes of ``metrics.jsonl``."""
    line: str = ""
    """Checksum of the last line before ``offset``."""
    pending: bool = False
    """A request was begun, and nobody knows yet whether the server has it."""
    state: Mapping[str, str] | None = None
    """Tags and status as they were last sent; None: they were not."""


@dataclass(frozen=True)
class MlflowRecord(Record):
    """What was copied of a run; a damaged one is begun anew."""

    servers: Mapping[str, Copied] = field(default_factory=dict)
    """By address."""


def copies(run: RunDir) -> Mapping[str, Copied]:
    """Return what was copied of a run, by server; {} if nothing was or the file is damaged."""
    return (records.load_sound(MlflowRecord, run.path / "mlflow.json") or MlflowRecord()).servers


def write(run: RunDir, server: str, copied: Copied) -> None:
    """Replace the record of one server."""
    records.save(run.path / "mlflow.json", MlflowRecord({**copies(run), server: copied}))


@dataclass(frozen=True)
class StoreRecord(Record):
    """``mlflow/store.json``: what tells this store from others on one server; a damaged one is made anew."""

    store: str = ""


def store_name(store: Store) -> str:
    """Return the name of a store on MLflow servers, made at the first call."""
    path = store.root / "mlflow" / "store.json"
    record = records.load_sound(StoreRecord, path)
    if record is None or not record.store:
        record = StoreRecord(uuid.uuid4().hex)
        records.save(path, record)
    return record.store
