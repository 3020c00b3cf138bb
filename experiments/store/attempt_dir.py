"""What one execution of a run leaves below ``attempts/<n>/``: how it began and ended, what it did, where it ran."""

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from experiments.store import records
from experiments.store.files import append_json, json_lines, on_network, tail, write_text
from experiments.store.records import Record


class Outcome(StrEnum):
    """How an attempt ended."""

    DONE = "done"
    TRAINED = "trained"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    REQUEUED = "requeued"
    LOST = "lost"
    """Its process died before it could write how it ended; somebody else wrote this."""
    SKIPPED = "skipped"
    """There was nothing to do, or another process was at work; never in a record."""


class FailureClass(StrEnum):
    """Why an attempt failed or died, as ``retry --class`` takes it; NONE where it did not, or nobody knows."""

    NONE = ""
    OOM = "oom"
    TIMEOUT = "timeout"
    NAN = "nan"
    NODE = "node"
    GPU = "gpu"
    """A GPU, its driver or the links between GPUs failed under it."""
    PREEMPTED = "preempted"
    """Its job made room for another one, and Slurm did not queue it again."""
    DISK = "disk"
    IMPORT = "import"
    DATA = "data"
    CONFIG = "config"
    KILLED = "killed"
    CLAIM_LOST = "claim-lost"
    CLAIMED = "claimed"
    """Another job was at work on the run."""
    ERROR = "error"
    """The attempt raised something that has no class of its own."""

    @property
    def repeats(self) -> bool:
        """Whether the same configuration would fail in the same way again."""
        return self in (FailureClass.NAN, FailureClass.CONFIG)

    @classmethod
    def of(cls, name: str) -> "FailureClass":
        """Return the class of this name, ERROR for a name that is none."""
        return cls(name) if name in set(cls) else cls.ERROR


class Stop(StrEnum):
    """Why an attempt is asked to checkpoint and end; of several that come together the last in this order counts."""

    INTERRUPTED = "interrupted"
    TIMEOUT = "timeout"
    REQUEUED = "requeued"
    CANCELLED = "cancelled"

    @property
    def outcome(self) -> Outcome:
        """How an attempt ended that did as it was asked."""
        return Outcome(self.value)


@dataclass(frozen=True)
class StopReason:
    """Why to stop, and who asked."""

    stop: Stop
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.stop}: {self.detail}" if self.detail else str(self.stop)

    @property
    def strength(self) -> int:
        """Of several reasons the strongest counts."""
        return list(Stop).index(self.stop)


@dataclass(frozen=True)
class Ending:
    """How an attempt ended; its number is 0 where there was no attempt."""

    outcome: Outcome
    failure_class: FailureClass = FailureClass.NONE
    detail: str = ""
    attempt: int = 0


@dataclass(frozen=True)
class Execution:
    """One start of a step of a Slurm job, as no other start has it; empty outside Slurm."""

    job_id: str = ""
    array_id: str = ""
    step: str = ""
    restarts: int = 0
    nodes: str = ""

    @property
    def job(self) -> str:
        """The job's id as Slurm's clients write it; empty outside Slurm."""
        return self.array_id or self.job_id


@dataclass(frozen=True)
class AttemptRecord(Record):
    """``stage.json``: written when an attempt begins, and again when it ends or is found dead."""

    stage: str = "all"
    started: float | None = None
    ended: float | None = None
    outcome: Outcome | None = None
    """None while it is under way, and of one that died until somebody notices."""
    failure_class: FailureClass = FailureClass.NONE
    detail: str = ""
    launch: str = ""
    execution: Execution = Execution()
    found: str = ""
    """What was complete of the run when it began (:meth:`experiments.store.run_dir.RunDir.progress_mark`)."""

    @property
    def silent(self) -> bool:
        """Whether the attempt itself has not said how it ended."""
        return self.outcome in (None, Outcome.LOST)


@dataclass(frozen=True)
class Progress(Record):
    """``progress.json``, the last sign of what an attempt is doing: rewritten every second, or every ten."""

    stage: str = ""
    """``start``, ``train`` or ``evaluate``."""
    iteration: int | None = None
    max_iter: int | None = None
    loss: float | None = None
    eta_seconds: float | None = None
    image: int | None = None
    images: int | None = None
    time: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def known(self) -> dict[str, Any]:
        """Return what is known, as plain data."""
        plain = {name: value for name, value in records.encode(self).items() if value not in (None, "")}
        del plain["schema"]
        return plain


@dataclass(frozen=True)
class Event:
    """A line of ``events.jsonl``: a state that the attempt came into, or a WARNING or SIGNAL."""

    state: str
    detail: str = ""
    time: float | None = None


@dataclass(frozen=True)
class Git(Record):
    """Commit and uncommitted difference of the code that ran; empty outside a git checkout."""

    sha: str = ""
    dirty: bool = False
    untracked: tuple[str, ...] = ()
    diff: str = ""
    diff_truncated: bool = False


@dataclass(frozen=True)
class Provenance(Execution, Record):
    """``provenance.json``: code, command, host, packages, threads, world size and job of an attempt."""

    time: float | None = None
    git: Git = Git()
    command: tuple[str, ...] = ()
    host: str = ""
    platform: str = ""
    processor: str = ""
    cores: int | None = None
    python: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    world_size: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    runtime: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RankFailure(Record):
    """``ranks/<rank>.json``: how the process of another rank failed, for the main one to read."""

    rank: int
    failure_class: FailureClass = FailureClass.ERROR
    detail: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class AttemptDir:
    """One attempt's directory."""

    path: Path

    RECORD: ClassVar[str] = "stage.json"

    @property
    def number(self) -> int:
        """The attempt's number, which is its claim's."""
        return int(self.path.name)

    @property
    def log(self) -> Path:
        """What the process printed."""
        return self.path / "log.txt"

    def log_tail(self, lines: int = 30, size: int = 6000) -> str:
        """Return the last lines of the log, of its last ``size`` bytes at most; empty if there is none."""
        return "\n".join(tail(self.log, size).splitlines()[-lines:])

    def record(self) -> AttemptRecord | None:
        """Return how it began and ended; None if it died before it could say. Raises RecordError."""
        return records.load(AttemptRecord, self.path / self.RECORD)

    def sound_record(self) -> AttemptRecord | None:
        """The same, and None for a damaged one too; raises RecordError for a newer one."""
        return records.load_sound(AttemptRecord, self.path / self.RECORD)

    def begin(self, record: AttemptRecord) -> None:
        """Write how it begins."""
        records.save(self.path / self.RECORD, record)

    def conclude(self, ending: Ending, only_if_open: bool = False) -> None:
        """Write how it ended, over what was known before but for the time; ``only_if_open``: unless an ending is known.

        Nothing is written of an attempt that has no record, or a damaged one.
        """
        record = self.sound_record()
        if record is not None and not (only_if_open and record.outcome is not None):
            how = {name: value for name, value in vars(ending).items() if name != "attempt"}
            records.save(self.path / self.RECORD, replace(record, ended=record.ended or time.time(), **how))

    def progress(self) -> Progress:
        """Return the last sign of what it does; an empty one if there is none."""
        return records.load_sound(Progress, self.path / "progress.json") or Progress()

    def write_progress(self, values: Mapping[str, Any]) -> None:
        """Replace the last sign of what it does; raises OSError, and ValueError for values that are not finite.

        The disk is not waited for: what a crash of the machine takes away is a picture of progress.
        """
        text = json.dumps({**values, "time": time.time()}, indent=1, allow_nan=False)
        write_text(self.path / "progress.json", f"{text}\n", durable=False)

    @property
    def progress_seconds(self) -> float:
        """How often the last sign is to be replaced at most: a server of files is spared."""
        return 10.0 if on_network(self.path) else 1.0

    def provenance(self) -> Provenance | None:
        """Return where it ran; None if that is not known."""
        return records.load_sound(Provenance, self.path / "provenance.json")

    def write_provenance(self, provenance: Provenance) -> None:
        """Write where it runs."""
        records.save(self.path / "provenance.json", provenance)

    def add_event(self, state: str, detail: str) -> None:
        """Append an event; a disk that does not take it is no reason to stop."""
        with contextlib.suppress(OSError):
            append_json(self.path / "events.jsonl", {"time": time.time(), "state": state, "detail": detail})

    def events(self) -> tuple[Event, ...]:
        """Return the events in order; lines that are damaged are left out."""
        lines = json_lines(self.path / "events.jsonl")
        return tuple(_event(line) for line in lines if isinstance(line.get("state"), str))

    def write_rank_failure(self, failure: RankFailure) -> None:
        """Write how another rank's process failed, unless that is known."""
        path = self.path / "ranks" / f"{failure.rank}.json"
        if not path.exists():
            records.save(path, failure)

    def rank_failures(self) -> list[RankFailure]:
        """Return what other ranks' processes said of their failures."""
        found = (records.load_sound(RankFailure, path) for path in sorted((self.path / "ranks").glob("*.json")))
        return [failure for failure in found if failure is not None]


def _event(line: Mapping[str, Any]) -> Event:
    at = line.get("time")
    return Event(line["state"], str(line.get("detail") or ""), at if isinstance(at, int | float) else None)


def read_git(root: Path) -> Git | None:
    """Return what a snapshot of the code at ``root`` was taken from; None if that is no snapshot."""
    return records.load(Git, root / "snapshot.json")


def write_git(root: Path, git: Git) -> None:
    """Write into a snapshot of the code what it was taken from."""
    records.save(root / "snapshot.json", git)
