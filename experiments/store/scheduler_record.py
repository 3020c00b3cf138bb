"""``scheduler.json``: what Slurm said of the runs' jobs when it was last asked, for reports and for other processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from experiments.store import records
from experiments.store.records import Record
from experiments.store.run_dir import Store


@dataclass(frozen=True)
class JobRecord:
    """One array element as Slurm describes it. Times are seconds since 1970, None where there is none."""

    id: str
    state: str
    name: str = ""
    raw_id: str = ""
    """What the job itself sees as SLURM_JOB_ID."""
    reason: str = ""
    submitted: float | None = None
    started: float | None = None
    ended: float | None = None
    elapsed: float | None = None
    """Seconds that it ran, the earlier rounds of a requeued job included (accounting only)."""
    exit_code: str = ""
    max_rss: int | None = None
    """Largest memory of a task in bytes (accounting only)."""
    gpus: int = 0
    cpus: int = 0
    nodes: str = ""
    clusters: str = ""
    """The cluster to ask about it, if that is not this machine's."""
    source: str = "squeue"


@dataclass(frozen=True)
class KeptJob:
    """Where Slurm had a run at its last answer about it: an element of a launch's batch."""

    launch: str
    batch: int
    index: int
    time: float
    state: str = ""
    job: JobRecord | None = None
    """None: Slurm did not have it."""


@dataclass(frozen=True)
class SchedulerRecord(Record):
    """Slurm's last answer."""

    remedy: ClassVar[str] = "remove it; Slurm is asked again"

    time: float = 0.0
    controller: bool = True
    accounting: bool | None = None
    cluster: str = ""
    problems: tuple[str, ...] = ()
    clusters: Mapping[str, Any] = field(default_factory=dict)
    """When each cluster's name was asked, and the name."""
    jobs: Mapping[str, KeptJob] = field(default_factory=dict)
    """By run id."""


def read(store: Store) -> SchedulerRecord:
    """Return Slurm's last answer; an empty one if there is none, or a damaged one."""
    return records.load_sound(SchedulerRecord, store.root / "scheduler.json") or SchedulerRecord()


def write(store: Store, record: SchedulerRecord) -> None:
    """Replace Slurm's last answer; raises OSError."""
    records.save(store.root / "scheduler.json", record)
