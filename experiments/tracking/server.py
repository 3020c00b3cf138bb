"""The mirror of a run store on one MLflow server: each metric of ``metrics.jsonl`` exactly once.

``metrics.jsonl`` is the truth. Next to it, ``mlflow.json`` (the *ledger*) says how far it has been copied, for each
server. It is written before a batch is sent (``pending``) and after. If the process died in between, if the file was
cut back by a resumed run, or if the server does not hold what the ledger says, the run's history is fetched from the
server and only what is missing is sent. A metric is known by its key and step. If the server holds another *value*
under them (the run was voided and done again), the old MLflow run is marked as superseded and a new one begun.
"""

import hashlib
import json
import math
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.store.files import read_json, write_json
from experiments.store.identity import eval_id
from experiments.store.run_dir import RunDir, Store
from experiments.suites import scales
from mpformer.config.schema import validate

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH = 1000
"""Most metrics that MLflow takes in one request."""

RUN_TAG, STORE_TAG, SUPERSEDED_TAG = "mpformer.run_id", "mpformer.store", "mpformer.superseded"

TIMING = ("seconds",)
"""Metrics that differ when an iteration is executed again after a resume; their first value stays."""

_TAG = re.compile("[@+]")
"""What MLflow does not allow in a tag's name."""

_PARAMS = ("schedule.max_iter", "schedule.batch_size", "schedule.base_lr", "dataset.task", "dataset.fingerprint")

Point = tuple[str, int]
"""Key and step of a metric."""


class Contradiction(Exception):
    """The server holds another value under the same key and step."""


@dataclass
class Ledger:
    """How far a run has been copied to one server."""

    mlflow_run: str = ""
    offset: int = 0
    line: str = ""
    """Checksum of the last line before ``offset``."""
    pending: bool = False
    high: dict[str, int] = field(default_factory=dict)
    """Largest step sent, by key."""
    state: dict[str, str] = field(default_factory=dict)
    """Tags and status as they were last sent."""
    experiment: str = ""
    """Id of the MLflow run's experiment, which its address contains."""


@dataclass(frozen=True)
class Place:
    """Where a run belongs: its experiment's name, and the suites that it is a row of."""

    experiment: str
    rows: Mapping[str, str]
    """Row by suite, such as ``headline@mini: mp-former``."""

    @property
    def tags(self) -> dict[str, str]:
        """The tags that name the suites."""
        named = {f"suite.{_TAG.sub('/', suite)}": row for suite, row in self.rows.items()}
        return {"suites": ", ".join(sorted(self.rows)), **named}


@dataclass(frozen=True)
class Value:
    """One metric to be sent."""

    key: str
    step: int
    value: float
    milliseconds: int

    @property
    def point(self) -> Point:
        """What a metric is known by."""
        return self.key, self.step


def places(store: Store) -> dict[str, Place]:
    """Return where each launched run belongs, by run id."""
    rows: dict[str, dict[str, str]] = {}
    experiments: dict[str, str] = {}
    for record in store.suite_records():
        name = suite_name(record)
        for row in record["rows"]:
            for run in row["runs"]:
                rows.setdefault(run["run_id"], {})[name] = row["name"]
                experiments[run["run_id"]] = f"{record['dataset']}/{record['scale']}"
    return {run_id: Place(experiments[run_id], suites) for run_id, suites in rows.items()}


def suite_name(record: Mapping[str, Any]) -> str:
    """Return a launched suite's name, as its record and its report are called."""
    return scales.suite_name(record["suite"], record["scale"], record["dataset"])


def values(line: Mapping[str, Any], setting: str) -> list[Value]:
    """Return the metrics of one line of ``metrics.jsonl``.

    Losses keep their names; scores of the final evaluation too, if its setting is the run's own (``setting``); those of
    another setting carry its id in front, those of evaluations during training ``probe/``.
    """
    step, milliseconds = int(line["iteration"]), int(float(line.get("time", 0)) * 1000)
    if line.get("kind") == "evaluation":
        other = line.get("eval_id", setting)
        prefix = "" if line.get("final") and other == setting else f"{other}/" if line.get("final") else "probe/"
        named = {prefix + name: value for name, value in line.get("metrics", {}).items()}
    else:
        named = {name: value for name, value in line.items() if name not in ("kind", "iteration", "time")}
    numbers = {name: value for name, value in named.items() if isinstance(value, int | float)}
    return [Value(name, step, float(value), milliseconds) for name, value in numbers.items()]


@dataclass
class Tail:
    """The whole lines of a growing ``metrics.jsonl`` from an offset on."""

    path: Path
    damaged: int = 0

    def chunks(self, offset: int) -> Iterator[tuple[list[dict[str, Any]], int, str]]:
        """Yield (parsed lines, offset behind them, checksum of the last), some lines at a time."""
        with self.path.open("rb") as file:
            file.seek(offset)
            while lines := self._some(file):
                offset += sum(map(len, lines))
                yield self._parsed(lines), offset, checksum(lines[-1])

    def _some(self, file: Any, most: int = 80) -> list[bytes]:
        lines: list[bytes] = []
        while len(lines) < most and (line := file.readline()).endswith(b"\n"):
            lines.append(line)
        return lines

    def _parsed(self, lines: Sequence[bytes]) -> list[dict[str, Any]]:
        found = []
        for line in lines:
            try:
                content = json.loads(line)
                content["iteration"] = int(content["iteration"])
                found.append(content)
            except (ValueError, KeyError, TypeError):
                self.damaged += 1
        return found

    def unchanged(self, ledger: Ledger) -> bool:
        """Whether the file still holds, before the ledger's offset, the line that was sent last."""
        if not ledger.offset:
            return True
        with self.path.open("rb") as file:
            start = max(0, ledger.offset - 65536)
            file.seek(start)
            before = file.read(ledger.offset - start)
        return len(before) == ledger.offset - start and checksum(before.splitlines(keepends=True)[-1]) == ledger.line


def checksum(line: bytes) -> str:
    """Return a short checksum of a line."""
    return hashlib.sha256(line).hexdigest()[:16]


def same(one: float, other: float) -> bool:
    """Whether two values are the same number; a server may clip infinities and keep no NaN apart."""
    if not math.isfinite(one) or not math.isfinite(other):
        return True
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


class Mirror:
    """Copies a store to one server; keeps what it has learnt of the server for repeated passes."""

    def __init__(self, client: "MlflowClient", store: Store, uri: str, artifacts: str | None) -> None:
        self.client, self.store, self.uri, self.artifacts = client, store, uri, artifacts
        self.sent = 0
        self.damaged = 0
        self._experiments: dict[str, str] = {}
        self._remote: dict[str, dict[str, Any]] = {}
        self._ledgers: dict[str, Ledger] = {}
        self._store_id = store_id(store)

    def run(self, run: RunDir, place: Place, status: str) -> None:
        """Bring one run up to date; ``status`` is MLflow's: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED."""
        if not run.metrics.exists():
            return
        try:
            self._run(run, place, status)
        except Contradiction:
            self.client.set_tag(self._ledgers[run.run_id].mlflow_run, SUPERSEDED_TAG, "true")
            self.client.set_terminated(self._ledgers[run.run_id].mlflow_run, "KILLED")
            self._remote[place.experiment].pop(run.run_id, None)
            self._ledgers[run.run_id] = Ledger()
            self._run(run, place, status)

    def settled(self, run: RunDir, place: Place) -> bool:
        """Whether this process has seen the run finished and completely copied, and nothing has changed since."""
        ledger = self._ledgers.get(run.run_id)
        if ledger is None or ledger.state != {**place.tags, "status": "FINISHED"} or run.void_file.exists():
            return False
        return run.metrics.exists() and run.metrics.stat().st_size == ledger.offset

    def _run(self, run: RunDir, place: Place, status: str) -> None:
        ledger, history = self._entered(run, place)
        tail = Tail(run.metrics)
        if not tail.unchanged(ledger):
            ledger.offset = 0
        setting = eval_id(validate(run.record()["config"]))
        for lines, offset, last in tail.chunks(ledger.offset):
            wanted = [value for line in lines for value in values(line, setting)]
            self._send(run, ledger, history, self._missing(wanted, ledger, history))
            ledger.offset, ledger.line, ledger.pending = offset, last, False
            self._save(run, ledger)
        self.damaged += tail.damaged
        self._tell_state(run, ledger, {**place.tags, "status": status})

    def _entered(self, run: RunDir, place: Place) -> tuple[Ledger, "History"]:
        """Return the run's ledger, in agreement with the server, and its history there (fetched when needed)."""
        if run.run_id in self._ledgers and self._ledgers[run.run_id].mlflow_run:
            ledger = self._ledgers[run.run_id]
            return ledger, History(self.client, ledger.mlflow_run)
        ledger = self._load(run)
        remote = self._known(place.experiment).get(run.run_id)
        identifier = remote.info.run_id if remote is not None else self._create(run, place)
        history = History(self.client, identifier)
        agrees = ledger.mlflow_run == identifier and not ledger.pending
        if remote is None or not agrees or set(ledger.high) - set(remote.data.metrics):
            ledger = Ledger(identifier, high=history.high() if remote is not None else {})
        ledger.experiment = self.experiment(place.experiment)
        self._ledgers[run.run_id] = ledger
        self._save(run, ledger)
        return ledger, history

    def _missing(self, wanted: Sequence[Value], ledger: Ledger, history: "History") -> list[Value]:
        """Return the values that the server does not hold yet; raises Contradiction."""
        missing: dict[Point, Value] = {}
        for value in wanted:
            if value.point in history.sent:
                continue
            there = history.value(value.point) if value.step <= ledger.high.get(value.key, -1) else None
            if there is None:
                missing.setdefault(value.point, value)
            elif value.key not in TIMING and not same(there, value.value):
                raise Contradiction(f"{value.key} at step {value.step}: {there} there, {value.value} here")
        return list(missing.values())

    def _send(self, run: RunDir, ledger: Ledger, history: "History", missing: Sequence[Value]) -> None:
        from mlflow.entities import Metric

        if missing:
            ledger.pending = True
            self._save(run, ledger)
        metrics = [Metric(value.key, value.value, value.milliseconds, value.step) for value in missing]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(ledger.mlflow_run, metrics=metrics[start : start + BATCH])
        for value in missing:
            ledger.high[value.key] = max(value.step, ledger.high.get(value.key, -1))
        history.sent.update(value.point for value in missing)
        self.sent += len(metrics)

    def _tell_state(self, run: RunDir, ledger: Ledger, state: dict[str, str]) -> None:
        if ledger.state == state:
            return
        for key, value in state.items():
            if key != "status" and ledger.state.get(key) != value:
                self.client.set_tag(ledger.mlflow_run, key, value)
        if state["status"] in ("RUNNING", "SCHEDULED"):
            self.client.update_run(ledger.mlflow_run, status=state["status"])
        else:
            ended = int(run.metrics.stat().st_mtime * 1000)
            self.client.set_terminated(ledger.mlflow_run, state["status"], end_time=ended)
        ledger.state = state
        self._save(run, ledger)

    def _create(self, run: RunDir, place: Place) -> str:
        from mlflow.entities import Param

        record = run.record()
        tags = {RUN_TAG: run.run_id, STORE_TAG: self._store_id, "row": str(record.get("row", "")), **place.tags}
        created = self.client.create_run(
            self.experiment(place.experiment), int(record["created"] * 1000), tags=tags, run_name=run.run_id
        )
        params = {**record["toggles"], "seed": record["seed"]} | {key: _at(record["config"], key) for key in _PARAMS}
        listed = [Param(key, str(value)) for key, value in params.items()]
        self.client.log_batch(created.info.run_id, params=listed)
        self._remote[place.experiment][run.run_id] = created
        return str(created.info.run_id)

    def experiment(self, name: str) -> str:
        """Return the experiment's id; it is created (or brought back from the bin) if need be."""
        if name not in self._experiments:
            found = self.client.get_experiment_by_name(name)
            if found is None:
                self._experiments[name] = self.client.create_experiment(name, self.artifacts)
            else:
                if found.lifecycle_stage == "deleted":
                    self.client.restore_experiment(found.experiment_id)
                self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def _known(self, experiment: str) -> dict[str, Any]:
        """Return this store's MLflow runs in an experiment, by run id."""
        if experiment not in self._remote:
            self._remote[experiment] = {run.data.tags[RUN_TAG]: run for run in self._search(experiment)}
        return self._remote[experiment]

    def _search(self, experiment: str) -> Iterator[Any]:
        token: str | None = None
        where = f"tags.`{STORE_TAG}` = '{self._store_id}'"
        while True:
            page = self.client.search_runs([self.experiment(experiment)], where, max_results=1000, page_token=token)
            yield from (run for run in page if RUN_TAG in run.data.tags and SUPERSEDED_TAG not in run.data.tags)
            token = page.token
            if not token:
                return

    def report(self, folder: Path, experiment: str) -> int:
        """Copy a report's pages and figures as artifacts of an MLflow run of its own; returns how many were new."""
        path = self.store.root / "mlflow" / "reports.json"
        book = read_json(path) or {}
        known = book.setdefault(self.uri, {}).setdefault(folder.name, {"mlflow_run": "", "files": {}})
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if _is_artifact(file)}
        changed = {
            name: file for name, file in files.items() if known["files"].get(name) != checksum(file.read_bytes())
        }
        if not changed:
            return 0
        known["mlflow_run"] = self._report_run(known["mlflow_run"], folder.name, experiment)
        for name, file in changed.items():
            self.client.log_artifact(known["mlflow_run"], str(file), _folder(name))
            known["files"][name] = checksum(file.read_bytes())
            write_json(path, book)
        self.client.set_terminated(known["mlflow_run"], "FINISHED")
        return len(changed)

    def _report_run(self, known: str, name: str, experiment: str) -> str:
        where = f"tags.`{STORE_TAG}` = '{self._store_id}' and tags.`mpformer.report` = '{name}'"
        found = [run.info.run_id for run in self.client.search_runs([self.experiment(experiment)], where)]
        if found:
            return known if known in found else str(found[0])
        tags = {STORE_TAG: self._store_id, "mpformer.report": name, "suites": name}
        return str(
            self.client.create_run(self.experiment(experiment), tags=tags, run_name=f"report {name}").info.run_id
        )

    def _load(self, run: RunDir) -> Ledger:
        content = (read_json(run.path / "mlflow.json") or {}).get("servers", {}).get(self.uri)
        return Ledger(**content) if content else Ledger()

    def _save(self, run: RunDir, ledger: Ledger) -> None:
        path = run.path / "mlflow.json"
        servers = (read_json(path) or {}).get("servers", {})
        write_json(path, {"schema": 1, "servers": {**servers, self.uri: vars(ledger)}})


class History:
    """What a server holds of one run, fetched when first asked for."""

    def __init__(self, client: "MlflowClient", identifier: str) -> None:
        self._client, self._identifier = client, identifier
        self.sent: set[Point] = set()
        self._points: dict[Point, float] | None = None

    def points(self) -> dict[Point, float]:
        """Every metric of the run."""
        if self._points is None:
            keys = list(self._client.get_run(self._identifier).data.metrics)
            listed = [metric for key in keys for metric in self._client.get_metric_history(self._identifier, key)]
            self._points = {(metric.key, metric.step): metric.value for metric in listed}
        return self._points

    def value(self, point: Point) -> float | None:
        """The metric's value there, or None."""
        return self.points().get(point)

    def high(self) -> dict[str, int]:
        """The largest step by key."""
        found: dict[str, int] = {}
        for key, step in self.points():
            found[key] = max(step, found.get(key, -1))
        return found


def store_id(store: Store) -> str:
    """Return the name of a store, made at the first call: two stores on one server keep apart."""
    path = store.root / "mlflow" / "store.json"
    content = read_json(path)
    if not isinstance(content, dict):
        content = {"store": uuid.uuid4().hex}
        write_json(path, content)
    return str(content["store"])


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _folder(name: str) -> str | None:
    """The folder that MLflow puts an artifact into; None for the root."""
    parent = Path(name).parent.as_posix()
    return None if parent == "." else parent


def _is_artifact(path: Path) -> bool:
    suffixes = (".png", ".svg", ".pdf", ".html", ".md", ".tex", ".csv", ".json")
    return path.is_file() and path.suffix in suffixes and not path.name.startswith(".")
