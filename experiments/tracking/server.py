"""The mirror of a run store on one MLflow server: each metric of ``metrics.jsonl`` exactly once.

``metrics.jsonl`` is the truth. What was copied of it is written next to it (:mod:`experiments.store.mlflow_record`),
before a batch is sent and after, and as a tag on the server with the batch. As long as the file has only grown since,
its new lines are sent. In every other case (a resumed run cut the file back, the run was done again, the process died
in the middle of a request, the server's database is another or an older one) the MLflow run is deleted, and the run is
sent anew from its first line.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.store import mlflow_record
from experiments.store.identity import eval_id
from experiments.store.mlflow_record import Copied
from experiments.store.run_dir import RunDir, Store
from mpformer.config.dotted import value_at
from mpformer.config.schema import Config

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

BATCH = 900
"""Most metrics of one request; MLflow takes 1,000 metrics and tags."""

RUN_TAG, STORE_TAG, SENT_TAG = "mpformer.run_id", "mpformer.store", "mpformer.sent"

_TAG = re.compile("[@+]")
"""What MLflow does not allow in a tag's name."""

_PARAMS = ("schedule.max_iter", "schedule.batch_size", "schedule.base_lr", "dataset.task", "dataset.fingerprint")


@dataclass(frozen=True)
class Listing:
    """Where a run belongs: its experiment's name, and the suites that it is a row of."""

    experiment: str
    rows: Mapping[str, str]
    """Row by suite, such as ``headline@mini: mp-former``."""

    @property
    def tags(self) -> dict[str, str]:
        """The tags that name the suites."""
        named = {f"suite.{_TAG.sub('/', suite)}": row for suite, row in self.rows.items()}
        return {"suites": ", ".join(sorted(self.rows)), **named}


def listings(store: Store) -> dict[str, Listing]:
    """Return where each launched run belongs, by run id."""
    rows: dict[str, dict[str, str]] = {}
    experiments: dict[str, str] = {}
    for name, record in store.suites().items():
        for row, run in record.runs():
            rows.setdefault(run.run_id, {})[name] = row.name
            experiments[run.run_id] = f"{record.dataset}/{record.scale}"
    return {run_id: Listing(experiments[run_id], suites) for run_id, suites in rows.items()}


def values(line: Mapping[str, Any], setting: str) -> "list[Metric]":
    """Return the metrics of one line of ``metrics.jsonl`` as MLflow takes them.

    Losses keep their names; scores of the final evaluation too, if its setting is the run's own (``setting``); those of
    another setting carry its id in front, those of evaluations during training ``probe/``.
    """
    from mlflow.entities import Metric

    step, milliseconds = int(line["iteration"]), int(float(line.get("time", 0)) * 1000)
    if line.get("kind") == "evaluation":
        other = line.get("eval_id", setting)
        prefix = "" if line.get("final") and other == setting else f"{other}/" if line.get("final") else "probe/"
        named = {prefix + name: value for name, value in line.get("metrics", {}).items()}
    else:
        named = {name: value for name, value in line.items() if name not in ("kind", "iteration", "time")}
    numbers = {name: value for name, value in named.items() if isinstance(value, int | float)}
    return [Metric(name, float(value), milliseconds, step) for name, value in numbers.items()]


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

    def only_grew(self, copied: Copied) -> bool:
        """Whether the file still holds, where it was read to, the line that was sent last."""
        if not copied.offset:
            return True
        with self.path.open("rb") as file:
            start = max(0, copied.offset - 65536)
            file.seek(start)
            before = file.read(copied.offset - start)
        return len(before) == copied.offset - start and checksum(before.splitlines(keepends=True)[-1]) == copied.line


def checksum(line: bytes) -> str:
    """Return a short checksum of a line."""
    return hashlib.sha256(line).hexdigest()[:16]


class Mirror:
    """Copies a store to one server; keeps what it has learnt of the server for repeated passes."""

    def __init__(self, client: "MlflowClient", store: Store, uri: str, artifacts: str | None) -> None:
        self.client, self.store, self.uri, self.artifacts = client, store, uri, artifacts
        self.sent = 0
        self.damaged = 0
        self._experiments: dict[str, str] = {}
        self._remote: dict[str, dict[str, list[Any]]] = {}
        self._copied: dict[str, Copied] = {}
        self._reports: dict[str, str] = {}
        self._store_id = mlflow_record.store_name(store)

    def run(self, run: RunDir, listing: Listing, status: str) -> None:
        """Bring one run up to date; ``status`` is MLflow's: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED."""
        if not run.metrics.exists():
            return
        tail, config = Tail(run.metrics), run.config()
        copied = self._entered(run, config, listing, tail)
        for lines, offset, last in tail.chunks(copied.offset):
            found = [value for line in lines for value in values(line, eval_id(config))]
            copied = self._send(run, copied, found, offset, last)
        self.damaged += tail.damaged
        self._send_state(run, copied, {**listing.tags, "status": status})

    def settled(self, run: RunDir, listing: Listing) -> bool:
        """Whether this process has seen the run finished and completely copied, and nothing has changed since."""
        copied = self._copied.get(run.run_id)
        if copied is None or copied.state != {**listing.tags, "status": "FINISHED"} or run.void_file.exists():
            return False
        return run.metrics.exists() and run.metrics.stat().st_size == copied.offset

    def _entered(self, run: RunDir, config: Config, listing: Listing, tail: Tail) -> Copied:
        """Return what the server holds of the run, after deleting what does not agree with the file."""
        copied = self._copied.get(run.run_id) or self._confirmed(run, listing)
        if copied.mlflow_run and not copied.pending and tail.only_grew(copied):
            return copied
        for remote in self._known(listing.experiment).pop(run.run_id, []):
            self.client.delete_run(remote.info.run_id)
        created = self._create(run, config, listing)
        return self._save(run, Copied(created, self.experiment(listing.experiment)))

    def _confirmed(self, run: RunDir, listing: Listing) -> Copied:
        """What an earlier process has copied, if the server says the same; otherwise nothing."""
        copied = mlflow_record.copies(run).get(self.uri, Copied())
        known = {remote.info.run_id: remote for remote in self._known(listing.experiment).get(run.run_id, [])}
        there = known.pop(copied.mlflow_run, None)
        agrees = there is not None and not known and there.data.tags.get(SENT_TAG, "0") == str(copied.offset)
        return copied if agrees else Copied()

    def _send(self, run: RunDir, copied: Copied, metrics: "Sequence[Metric]", offset: int, last: str) -> Copied:
        from mlflow.entities import RunTag

        self._save(run, replace(copied, pending=True))
        for start in range(0, max(len(metrics), 1), BATCH):
            whole = start + BATCH >= len(metrics)
            tags = [RunTag(SENT_TAG, str(offset))] if whole else []
            self.client.log_batch(copied.mlflow_run, metrics=metrics[start : start + BATCH], tags=tags)
        self.sent += len(metrics)
        return self._save(run, replace(copied, offset=offset, line=last, pending=False))

    def _send_state(self, run: RunDir, copied: Copied, state: dict[str, str]) -> None:
        if copied.state == state:
            return
        for key, value in state.items():
            if key != "status" and (copied.state or {}).get(key) != value:
                self.client.set_tag(copied.mlflow_run, key, value)
        if state["status"] in ("RUNNING", "SCHEDULED"):
            self.client.update_run(copied.mlflow_run, status=state["status"])
        else:
            ended = int(run.metrics.stat().st_mtime * 1000)
            self.client.set_terminated(copied.mlflow_run, state["status"], end_time=ended)
        self._save(run, replace(copied, state=state))

    def _save(self, run: RunDir, copied: Copied) -> Copied:
        self._copied[run.run_id] = copied
        mlflow_record.write(run, self.uri, copied)
        return copied

    def _create(self, run: RunDir, config: Config, listing: Listing) -> str:
        from mlflow.entities import Param

        record = run.record()
        tags = {RUN_TAG: run.run_id, STORE_TAG: self._store_id, "row": record.row, **listing.tags}
        created = self.client.create_run(
            self.experiment(listing.experiment), int(record.created * 1000), tags=tags, run_name=run.run_id
        )
        tree = config.model_dump()
        params = {**tree["toggles"], "seed": config.seed} | {key: value_at(tree, key) for key in _PARAMS}
        listed = [Param(key, str(value)) for key, value in params.items()]
        self.client.log_batch(created.info.run_id, params=listed)
        self._known(listing.experiment)[run.run_id] = [created]
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

    def _known(self, experiment: str) -> dict[str, list[Any]]:
        """Return this store's MLflow runs in an experiment, by run id."""
        if experiment not in self._remote:
            found: dict[str, list[Any]] = {}
            for run in self._search(experiment):
                found.setdefault(run.data.tags[RUN_TAG], []).append(run)
            self._remote[experiment] = found
        return self._remote[experiment]

    def _search(self, experiment: str) -> Iterator[Any]:
        token: str | None = None
        where = f"tags.`{STORE_TAG}` = '{self._store_id}'"
        while True:
            page = self.client.search_runs([self.experiment(experiment)], where, max_results=1000, page_token=token)
            yield from (run for run in page if RUN_TAG in run.data.tags)
            token = page.token
            if not token:
                return

    def report(self, folder: Path, experiment: str) -> int:
        """Copy a report's pages and figures as artifacts of an MLflow run of its own, anew if any of them has changed.

        Returns how many were sent. What the server has is a checksum of them all, a tag of that run.
        """
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if _is_artifact(file)}
        content = "".join(f"{name} {checksum(file.read_bytes())} " for name, file in files.items())
        digest = checksum(content.encode())
        if not files or self._reports.get(folder.name) == digest:
            return 0
        run = self._report_run(folder.name, experiment)
        sent = run.data.tags.get(SENT_TAG) == digest
        for name, file in () if sent else files.items():
            self.client.log_artifact(run.info.run_id, str(file), _folder(name))
        if not sent:
            self.client.set_tag(run.info.run_id, SENT_TAG, digest)
            self.client.set_terminated(run.info.run_id, "FINISHED")
        self._reports[folder.name] = digest
        return 0 if sent else len(files)

    def _report_run(self, name: str, experiment: str) -> Any:
        where = f"tags.`{STORE_TAG}` = '{self._store_id}' and tags.`mpformer.report` = '{name}'"
        if found := self.client.search_runs([self.experiment(experiment)], where):
            return found[0]
        tags = {STORE_TAG: self._store_id, "mpformer.report": name, "suites": name}
        return self.client.create_run(self.experiment(experiment), tags=tags, run_name=f"report {name}")


def _folder(name: str) -> str | None:
    """The folder that MLflow puts an artifact into; None for the root."""
    parent = Path(name).parent.as_posix()
    return None if parent == "." else parent


def _is_artifact(path: Path) -> bool:
    suffixes = (".png", ".svg", ".pdf", ".html", ".md", ".tex", ".csv", ".json")
    return path.is_file() and path.suffix in suffixes and not path.name.startswith(".")
