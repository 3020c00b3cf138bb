"""What a launch handed to Slurm, in one append-only file a launch: ``launches/<launch>/journal.jsonl``.

A batch is one job array. Before ``sbatch`` is called the journal says what is about to be submitted, under a job name
that no other batch has, and afterwards under which id; a launcher that dies between the two leaves a batch that the
scheduler knows by that name, or does not know at all. Each event is one line, appended by one write and synced::

    {"event": "submitting", "batch": 0, "stage": "all", "name": "headline.20260101-120000-a1b2c3.0",
     "runs": [{"run_id": "…", "eval_id": "…"}], "profile": "a100", "cluster": "lab", "time": 1767268800.0}
    {"event": "submitted", "batch": 0, "job_id": "1234", "time": 1767268800.4}
    {"event": "failed", "batch": 1, "error": "sbatch: error: …", "time": 1767268800.5}

Element i of the array ``1234`` is ``1234_i`` and executes ``runs[i]``.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from experiments.store.files import append_json, json_lines
from experiments.store.run_dir import Store

BatchStage = Literal["all", "train", "evaluate", "smoke", "report"]
"""What the elements of a batch do; ``smoke`` and ``report`` batches say which runs they speak for, if any."""

FILE = "journal.jsonl"


@dataclass(frozen=True)
class BatchRun:
    """One element of a batch."""

    run_id: str
    eval_id: str


@dataclass(frozen=True)
class Submission:
    """One batch: a job array, and what became of its submission."""

    launch: str
    batch: int
    stage: BatchStage
    name: str
    """The Slurm job name, which no other batch of any launch has."""
    runs: tuple[BatchRun, ...]
    """In the order of array indices."""
    profile: str
    cluster: str
    """Slurm's ClusterName, empty if the site does not say."""
    created: float
    job_id: str | None = None
    """The array's id; None if ``sbatch`` was not heard of again, or refused (see ``error``)."""
    error: str | None = None
    clusters: str = ""
    """Slurm's name of another cluster than the launcher's, which its clients are to be asked about; else empty."""
    user: str = ""
    """The account whose jobs they are, by the journal's owner; empty if that is not known."""

    @property
    def unrecorded(self) -> bool:
        """Whether the launcher may have died between ``sbatch`` and its record; the scheduler knows, by ``name``."""
        return self.job_id is None and self.error is None

    def element(self, run_id: str) -> str | None:
        """Return the Slurm id of a run's array element, such as ``1234_7``; None if it has none (yet)."""
        indices = [index for index, run in enumerate(self.runs) if run.run_id == run_id]
        return f"{self.job_id}_{indices[0]}" if indices and self.job_id is not None else None


@dataclass(frozen=True)
class Journal:
    """The journal of one launch."""

    path: Path

    @property
    def launch(self) -> str:
        """The launch's id."""
        return self.path.parent.name

    def submitting(self, submission: Submission) -> None:
        """Note what is about to be handed to ``sbatch``."""
        runs = [{"run_id": run.run_id, "eval_id": run.eval_id} for run in submission.runs]
        about = {"stage": submission.stage, "name": submission.name, "runs": runs}
        about |= {"profile": submission.profile, "cluster": submission.cluster}
        about |= {"clusters": submission.clusters} if submission.clusters else {}
        self._append("submitting", submission.batch, **about)

    def submitted(self, batch: int, job_id: str) -> None:
        """Note the id of a batch's array."""
        self._append("submitted", batch, job_id=job_id)

    def failed(self, batch: int, error: str) -> None:
        """Note that a batch is not with the scheduler and never will be."""
        self._append("failed", batch, error=error)

    def submissions(self) -> list[Submission]:
        """Return the batches in the order of their submission."""
        found: dict[int, Submission] = {}
        user = self._owner()
        for event in self._events():
            number = int(event["batch"])
            if event["event"] == "submitting":
                found[number] = self._submission(event, user)
            elif number in found and event["event"] == "submitted":
                found[number] = replace(found[number], job_id=str(event["job_id"]), error=None)
            elif number in found and event["event"] == "failed":
                found[number] = replace(found[number], error=str(event["error"]))
        return list(found.values())

    def _owner(self) -> str:
        try:
            return self.path.owner()
        except (OSError, KeyError):
            return ""

    def _submission(self, event: dict[str, Any], user: str) -> Submission:
        runs = tuple(BatchRun(run["run_id"], run["eval_id"]) for run in event["runs"])
        about: dict[str, Any] = {"profile": event.get("profile", ""), "cluster": event.get("cluster", "")}
        about |= {"created": event["time"], "user": user, "clusters": event.get("clusters", "")}
        return Submission(self.launch, int(event["batch"]), event["stage"], event["name"], runs, **about)

    def _append(self, event: str, batch: int, **about: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_json(self.path, {"event": event, "batch": batch, **about, "time": time.time()}, durable=True)

    def _events(self) -> Iterator[dict[str, Any]]:
        """The lines that are whole: a crash may have cut one short."""
        yield from (line for line in json_lines(self.path) if "event" in line and "batch" in line)


def of_launch(store: Store, launch: str) -> Journal:
    """Return the journal of a launch."""
    return Journal(store.launches / launch / FILE)


def submissions(store: Store, launches: Sequence[str] | None = None) -> list[Submission]:
    """Return the batches of all launches (or of these), oldest first."""
    names = sorted(path.parent.name for path in store.launches.glob(f"*/{FILE}")) if launches is None else launches
    return [submission for name in names for submission in of_launch(store, name).submissions()]
