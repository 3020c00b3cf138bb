"""What was launched: a launch's own records, and which of its workers and waiting runs there are now."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from experiments.store import claims, records
from experiments.store.attempt_dir import Stop, StopReason
from experiments.store.claims import Owner
from experiments.store.files import tail
from experiments.store.records import Record, RecordError
from experiments.store.run_dir import Store

START_SECONDS = 60.0
"""Time in which a launch's first worker is expected to appear; its runs are QUEUED meanwhile."""

SLURM = "slurm"
"""The executor of launches whose runs are jobs; workers of this machine have none."""


@dataclass(frozen=True)
class LaunchRecord(Record):
    """``launch.json``: what a launch was asked for and what it started."""

    suite: str = ""
    scale: str = ""
    dataset: str = ""
    command: str = ""
    runs: tuple[str, ...] = ()
    """Ids of the runs that it was to start."""
    created: float = 0.0
    notify: str | None = None
    """Command or webhook that is notified of its end."""
    workers: int | None = None
    ended: float | None = None
    executor: str = ""
    profile: str = ""
    cluster: str = ""
    code: str = ""
    """The snapshot of the code that its jobs run from."""
    report: bool = False
    """Whether its last job is to be the suite's report."""


@dataclass(frozen=True)
class WorkerRecord(Owner, Record):
    """``workers/<host>.<pid>.json``: a worker's process, and when it ended."""

    ended: float | None = None


@dataclass(frozen=True)
class StopRecord(Record):
    """``stop.json``: workers are asked to checkpoint their runs and end."""

    reason: Stop = Stop.INTERRUPTED
    detail: str = ""
    time: float = 0.0


DEATHS = "deaths.txt"
"""File of a launch with a line for each start of its jobs that the infrastructure ended, written by batch shells."""


@dataclass(frozen=True)
class Death:
    """One start of a job that the infrastructure ended: its line's columns."""

    time: int
    job_id: str
    start: int
    """How often Slurm had started the job again before."""
    node: str
    """``?`` for jobs of several nodes: nobody knows which of them it was."""
    exit_code: int
    seconds: int
    """How long it had lived."""


def deaths(path: Path) -> tuple[Death, ...]:
    """Return what a file of deaths says, without the lines that are not whole."""
    return tuple(death for death in map(_death, tail(path, 1 << 20).splitlines()) if death is not None)


def _death(line: str) -> Death | None:
    try:
        at, job, start, node, code, seconds = line.split()
        return Death(int(at), job, int(start), node, int(code), int(seconds))
    except ValueError:
        return None


FORGET = "forget"
"""A line of the file by which the nodes that are named before it are forgotten."""


def bad_nodes(path: Path) -> dict[str, int]:
    """Return the nodes on which two starts or more have died, by a file of deaths, with the number of these."""
    lines = tail(path, 1 << 20).splitlines()
    since = max((number + 1 for number, line in enumerate(lines) if line == FORGET), default=0)
    nodes = [death.node for death in map(_death, lines[since:]) if death is not None and death.node != "?"]
    return {node: nodes.count(node) for node in dict.fromkeys(nodes) if nodes.count(node) > 1}


@dataclass(frozen=True)
class LaunchDir:
    """One launch's directory."""

    path: Path

    @property
    def id(self) -> str:
        """The launch's id."""
        return self.path.name

    @property
    def file(self) -> Path:
        """Its record's file, which living workers touch."""
        return self.path / "launch.json"

    @property
    def stop_file(self) -> Path:
        """Present when its workers are to end."""
        return self.path / "stop.json"

    @property
    def deaths_file(self) -> Path:
        """What its jobs' batch shells noted: see :class:`Death`."""
        return self.path / DEATHS

    @property
    def jobs(self) -> Path:
        """What submitit keeps of its jobs."""
        return self.path / "jobs"

    def record(self) -> LaunchRecord | None:
        """Return its record; None if there is none, or a damaged one. Raises RecordError for a newer one."""
        return records.load_sound(LaunchRecord, self.file)

    def write(self, record: LaunchRecord) -> None:
        """Write its record."""
        records.save(self.file, record)

    def close(self) -> None:
        """Note that nothing of it runs any more, so that its waiting runs are no longer QUEUED."""
        record = self.record()
        if record is not None and not record.ended:
            with contextlib.suppress(OSError):
                self.write(replace(record, ended=time.time()))

    def ask_to_stop(self, reason: StopReason) -> None:
        """Ask its workers to checkpoint their runs and end."""
        records.save(self.stop_file, StopRecord(reason.stop, reason.detail, time.time()))

    @contextlib.contextmanager
    def worker(self) -> Iterator[None]:
        """Show while a block runs that this process is one of its workers: its waiting runs are QUEUED."""
        owner = claims.this_process()
        path = self.path / "workers" / f"{owner.host}.{owner.pid}.json"
        about = WorkerRecord(**asdict(owner))
        records.save(path, about)
        try:
            yield
        finally:
            records.save(path, replace(about, ended=time.time()))

    def live_workers(self) -> list[int]:
        """Return the pids of its workers that are alive on this machine, or were heard of lately on another."""
        found = (records.load_sound(WorkerRecord, path) for path in (self.path / "workers").glob("*.json"))
        return [one.pid for one in found if one and not one.ended and claims.lives(one, self.file)]

    def will_start_more(self, record: LaunchRecord) -> bool:
        """Whether its workers are going to start more runs; of jobs in Slurm, Slurm tells."""
        if record.ended or self.stop_file.exists():
            return False
        return bool(self.live_workers()) or self._starting(record)

    def _starting(self, record: LaunchRecord) -> bool:
        """Whether it was just written, and none of its workers has registered yet."""
        if record.executor == SLURM:
            return False
        registered = next((self.path / "workers").glob("*.json"), None)
        return registered is None and time.time() - record.created < START_SECONDS


def stop_reason(path: Path) -> StopReason | None:
    """Return why a stop file asks to end; None if there is none."""
    if not path.exists():
        return None
    record = records.load_sound(StopRecord, path) or StopRecord()
    return StopReason(record.reason, record.detail)


def launch_dir(store: Store, launch: str) -> LaunchDir:
    """Return the directory of a launch."""
    return LaunchDir(store.launches / launch)


def recorded(store: Store, file: str = "launch.json") -> Iterator[tuple[LaunchDir, LaunchRecord]]:
    """Yield the launches that have this file, with their records, in the order of their ids.

    Those whose record cannot be read are left out.
    """
    for path in sorted(store.launches.glob(f"*/{file}")):
        found = LaunchDir(path.parent)
        with contextlib.suppress(RecordError):
            record = found.record()
            if record is not None:
                yield found, record


def queued_runs(store: Store) -> frozenset[str]:
    """Return the runs that live launches are going to start."""
    return frozenset(run for found, record in recorded(store) if found.will_start_more(record) for run in record.runs)
