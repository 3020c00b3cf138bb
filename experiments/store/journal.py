"""What a launch handed to Slurm, in one append-only file a launch: ``launches/<launch>/journal.jsonl``.

A batch is one job array. Before ``sbatch`` is called the journal says what is about to be submitted, under a job name
that no other batch has, and afterwards under which id; a launcher that dies between the two leaves a batch that the
scheduler knows by that name, or does not know at all. Each event is one line, appended by one write and synced; element
i of the array ``1234`` is ``1234_i`` and executes the i-th of the batch's runs.
"""

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

from experiments.store import records
from experiments.store.files import append_json, json_lines
from experiments.store.records import Record
from experiments.store.run_dir import Store

BatchStage = Literal["all", "train", "evaluate", "smoke", "report"]
"""What the elements of a batch do; ``smoke`` and ``report`` batches say which runs they speak for, if any."""

_STAGES = ("all", "train", "evaluate")
"""Batches whose elements execute a run's stage."""

FILE = "journal.jsonl"


@dataclass(frozen=True)
class BatchRun:
    """One element of a batch."""

    run_id: str
    eval_id: str


@dataclass(frozen=True)
class Given:
    """What is given to ``sbatch`` as one batch."""

    batch: int
    stage: BatchStage
    name: str
    """The Slurm job name, which no other batch of any launch has."""
    runs: tuple[BatchRun, ...]
    """In the order of array indices."""
    time: float
    profile: str = ""
    cluster: str = ""
    """Slurm's ClusterName, empty if the site does not say."""
    clusters: str = ""
    """Slurm's name of another cluster than the launcher's, which its clients are to be asked about; else empty."""


@dataclass(frozen=True)
class Submitting(Given, Record):
    """A line of the journal: what is about to be handed to ``sbatch``."""

    event: ClassVar[str] = "submitting"


@dataclass(frozen=True)
class Submitted(Record):
    """A line of the journal: the id of a batch's array."""

    event: ClassVar[str] = "submitted"

    batch: int
    job_id: str
    time: float = 0.0


@dataclass(frozen=True)
class Refused(Record):
    """A line of the journal: a batch is not with the scheduler and never will be."""

    event: ClassVar[str] = "failed"

    batch: int
    error: str
    time: float = 0.0


Line = Submitting | Submitted | Refused
_LINES: Mapping[str, type[Line]] = {kind.event: kind for kind in (Submitting, Submitted, Refused)}


@dataclass(frozen=True)
class Submission(Given):
    """One batch: a job array, and what became of its submission."""

    launch: str = ""
    job_id: str | None = None
    """The array's id; None if ``sbatch`` was not heard of again, or refused (see ``error``)."""
    error: str | None = None
    user: str = ""
    """The account whose jobs they are, by the journal's owner; empty if that is not known."""

    @property
    def unrecorded(self) -> bool:
        """Whether the launcher may have died between ``sbatch`` and its record; the scheduler knows, by ``name``."""
        return self.job_id is None and self.error is None


@dataclass(frozen=True)
class Element:
    """The element of a job array that executes a run."""

    submission: Submission
    index: int

    @property
    def run_id(self) -> str:
        """The run."""
        return self.submission.runs[self.index].run_id

    @property
    def id(self) -> str:
        """Its Slurm id, such as ``1234_7``; the batch's name if the array's id is not known."""
        return f"{self.submission.job_id}_{self.index}" if self.submission.job_id else self.submission.name

    @property
    def key(self) -> str:
        """Its batch and index in the launch; unlike Slurm's id, never used again."""
        return f"{self.submission.batch}/{self.index}"


@dataclass(frozen=True)
class Journal:
    """The journal of one launch."""

    path: Path

    @property
    def launch(self) -> str:
        """The launch's id."""
        return self.path.parent.name

    def submitting(self, one: Given) -> None:
        """Note what is about to be handed to ``sbatch``."""
        about = {field.name: getattr(one, field.name) for field in fields(Given)}
        self._append(Submitting(**about | {"time": time.time()}))

    def submitted(self, batch: int, job_id: str) -> None:
        """Note the id of a batch's array."""
        self._append(Submitted(batch, job_id, time.time()))

    def failed(self, batch: int, error: str) -> None:
        """Note that a batch is not with the scheduler and never will be."""
        self._append(Refused(batch, error, time.time()))

    def submissions(self) -> list[Submission]:
        """Return the batches in the order of their submission; lines that a crash cut short are left out."""
        found: dict[int, Submission] = {}
        user = self._owner()
        for line in self._lines():
            if isinstance(line, Submitting):
                found[line.batch] = Submission(**vars(line), launch=self.launch, user=user)
            elif line.batch in found:
                became = (
                    {"job_id": line.job_id, "error": None} if isinstance(line, Submitted) else {"error": line.error}
                )
                found[line.batch] = replace(found[line.batch], **became)
        return list(found.values())

    def _owner(self) -> str:
        try:
            return self.path.owner()
        except (OSError, KeyError):
            return ""

    def _append(self, line: Line) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_json(self.path, {"event": line.event, **records.encode(line)}, durable=True)

    def _lines(self) -> Iterator[Line]:
        for content in json_lines(self.path):
            kind = _LINES.get(str(content.get("event")))
            if kind is not None:
                yield records.decode(kind, content, str(self.path))


def of_launch(store: Store, launch: str) -> Journal:
    """Return the journal of a launch."""
    return Journal(store.launches / launch / FILE)


def submissions(store: Store, launches: Sequence[str] | None = None) -> list[Submission]:
    """Return the batches of all launches (or of these), oldest first."""
    names = sorted(path.parent.name for path in store.launches.glob(f"*/{FILE}")) if launches is None else launches
    return [submission for name in names for submission in of_launch(store, name).submissions()]


def elements(store: Store, run_ids: Collection[str]) -> Iterator[Element]:
    """Yield the elements that these runs were given to, oldest first."""
    wanted = set(run_ids)
    for submission in submissions(store):
        if submission.stage in _STAGES and submission.error is None:
            for index, run in enumerate(submission.runs):
                if run.run_id in wanted:
                    yield Element(submission, index)


def batches(found: Iterable[Element]) -> list[Submission]:
    """Return the batches of elements, each once."""
    return list({id(one.submission): one.submission for one in found}.values())
