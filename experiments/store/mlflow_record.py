"""``mlflow.json`` of a run: where its metrics were copied to, and how far, for each MLflow server."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from experiments.store.files import read_json, write_json
from experiments.store.run_dir import RunDir


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
    state: dict[str, str] = field(default_factory=dict)
    """Tags and status as they were last sent."""


def copies(run: RunDir) -> dict[str, Copied]:
    """Return what was copied of a run, by server; {} if nothing was or the file is damaged."""
    content = read_json(run.path / "mlflow.json")
    servers = content.get("servers") if isinstance(content, dict) else None
    if not isinstance(servers, dict):
        return {}
    return {str(server): _read(one) for server, one in servers.items() if isinstance(one, dict)}


def write(run: RunDir, server: str, copied: Copied) -> None:
    """Replace the record of one server."""
    servers = {name: asdict(one) for name, one in {**copies(run), server: copied}.items()}
    write_json(run.path / "mlflow.json", {"schema": 1, "servers": servers})


def _read(content: dict[str, Any]) -> Copied:
    """A record of an earlier version has fields that nothing needs any more; one that is damaged is begun anew."""
    kinds = {one.name: type(getattr(Copied(), one.name)) for one in fields(Copied)}
    known: dict[str, Any] = {name: content[name] for name in kinds if isinstance(content.get(name), kinds[name])}
    return Copied(**known)
