"""The run store: plain files under one root, written atomically, never deleted by another command's success.

``<root>/suites`` says which runs a launch resolved to, ``<root>/runs/<run_id>`` holds a run, ``<root>/launches`` what
was started. Nothing here imports torch, and reading never writes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.store.attempt_dir import AttemptDir
from experiments.store.files import is_finite, names_in, read_json, write_json
from mpformer.runtime.errors import UserError

if TYPE_CHECKING:
    from mpformer.config.schema import Config

SCHEMA = 1


@dataclass(frozen=True)
class RunDir:
    """One run's directory."""

    path: Path

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def metrics(self) -> Path:
        """The file that MLflow mirrors."""
        return self.path / "metrics.jsonl"

    @property
    def void_file(self) -> Path:
        """Present when a user declared the run's results void."""
        return self.path / "void.json"

    @property
    def cancel_file(self) -> Path:
        """Present when a user asked for the run to be stopped."""
        return self.path / "cancel.json"

    def exists(self) -> bool:
        """Whether the run has been planned into the store."""
        return (self.path / "run.json").exists()

    def create(self, config: "Config", row: str) -> None:
        """Write ``run.json`` unless it is there, sound: it is immutable."""
        from experiments.store.identity import SCHEME

        if read_json(self.path / "run.json") is not None:
            return
        record = {
            "schema": SCHEMA,
            "run_id": self.run_id,
            "scheme": SCHEME,
            "seed": config.seed,
            "toggles": config.toggles.model_dump(mode="json"),
            "config": config.model_dump(mode="json"),
            "row": row,
            "created": time.time(),
        }
        write_json(self.path / "run.json", record)

    def record(self) -> dict[str, Any]:
        """Return ``run.json``; raises UserError if it is missing or damaged."""
        record = read_json(self.path / "run.json")
        if not isinstance(record, dict) or "config" not in record:
            raise UserError(f"{self.path / 'run.json'} is missing or damaged; launch its suite again to rewrite it")
        return record

    def config(self) -> "Config":
        """Return the run's full configuration."""
        from mpformer.config.schema import validate  # pydantic, which those who only look at states do without

        return validate(self.record()["config"])

    def attempt(self, number: int) -> AttemptDir:
        """Return the directory of one attempt."""
        return AttemptDir(self.path / "attempts" / str(number))

    def attempts(self) -> list[int]:
        """Return the numbers of the attempts so far, ascending."""
        return sorted(int(name) for name in names_in(self.path / "attempts") if name.isdigit())

    def last_attempt(self) -> AttemptDir | None:
        """Return the directory of the last attempt, None if there was none."""
        number = max(self.attempts(), default=0)
        return self.attempt(number) if number else None

    @property
    def claims(self) -> Path:
        """Who may work on it (:mod:`experiments.store.claims`)."""
        return self.path / "claims"

    def end_task(self, name: str) -> None:
        """Say to the other tasks of a start of a Slurm job, by its name, that the main one has ended."""
        write_json(self._task(name), {"time": time.time()})

    def task_ended(self, name: str) -> bool:
        """Whether the main task of that start has ended."""
        return self._task(name).exists()

    def _task(self, name: str) -> Path:
        return self.path / "tasks" / f"{name}.json"

    def trained(self) -> dict[str, Any] | None:
        """Return ``trained.json`` if the train stage is complete."""
        content = read_json(self.path / "trained.json")
        return content if isinstance(content, dict) and content.get("weights_sha256") else None

    def evaluation(self, eval_id: str) -> Path:
        """Return the directory of one evaluation setting."""
        return self.path / "evals" / eval_id

    def result(self, eval_id: str) -> dict[str, Any] | None:
        """Return ``result.json`` if it is valid, complete and finite: the run is then DONE for this setting."""
        content = read_json(self.evaluation(eval_id) / "result.json")
        return content if valid_result(content, self.run_id, eval_id) else None


def valid_result(content: Any, run_id: str, eval_id: str) -> bool:
    """Whether ``result.json``'s content is of this run and setting, complete, and finite throughout."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or content.get("complete") is not True:
        return False
    if (content.get("run_id"), content.get("eval_id")) != (run_id, eval_id):
        return False
    metrics = content.get("metrics")
    return isinstance(metrics, dict) and bool(metrics) and is_finite(content)


@dataclass(frozen=True)
class Store:
    """A store of runs under ``root``."""

    root: Path

    def run(self, run_id: str) -> RunDir:
        """Return a run's directory, whether or not it exists."""
        return RunDir(self.root / "runs" / run_id)

    def runs(self) -> Iterator[RunDir]:
        """Yield every run, in the order of names."""
        for name in sorted(names_in(self.root / "runs")):
            yield self.run(name)

    def find(self, text: str) -> RunDir:
        """Return the one run whose id is, ends with or starts with ``text``; raises UserError with the candidates."""
        names = sorted(names_in(self.root / "runs"))
        found = [n for n in names if n == text] or [n for n in names if n.endswith(text) or n.startswith(text)]
        if len(found) == 1:
            return self.run(found[0])
        shown = ", ".join((found or names)[:8]) or "none yet: launch a suite"
        raise UserError(f"{'ambiguous' if found else 'unknown'} run {text!r}; runs: {shown}")

    @property
    def launches(self) -> Path:
        """Directory of what was started."""
        return self.root / "launches"

    def suite_path(self, suite: str, scale: str, dataset: str | None) -> Path:
        """Return the path of a suite's record; ``dataset`` is None for the scale's default."""
        return self.root / "suites" / f"{suite}@{scale}{f'+{dataset}' if dataset else ''}.json"

    def suites(self) -> dict[str, dict[str, Any]]:
        """Return the records of all launched suites by name, such as ``headline@mini``."""
        names = sorted(name for name in names_in(self.root / "suites") if name.endswith(".json"))
        records = {name.removesuffix(".json"): read_json(self.root / "suites" / name) for name in names}
        return {name: record for name, record in records.items() if isinstance(record, dict)}

    def suite_records(self) -> list[dict[str, Any]]:
        """Return the records of all launched suites."""
        return list(self.suites().values())
