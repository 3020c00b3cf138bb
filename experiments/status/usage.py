"""What runs really used: sacct's Elapsed and MaxRSS where there is accounting, the attempts' own counters elsewhere.

``launches/<launch>/usage.json`` keeps what accounting said of the launch's jobs that are over, so that reports need no
Slurm. Runs that were imported have what was said of theirs in ``runs/<run_id>/usage.json``, and so have those of stores
from before there was one file a launch; both are read. Time that no accounted job covers is taken from the attempts'
own records.
"""

import contextlib
import functools
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experiments.status import scheduler
from experiments.status.scheduler import Job
from experiments.store import journal
from experiments.store import usage as record
from experiments.store.attempt_dir import AttemptDir, AttemptRecord
from experiments.store.journal import Element
from experiments.store.run_dir import RunDir, Store, Trained
from experiments.store.usage import FILE, Usage

FORGOTTEN = 86400.0
"""Seconds after a submission from which on accounting that does not know a job is not asked about it again."""

Jobs = Mapping[str, Mapping[str, Any]]
"""What accounting said of jobs, by their Slurm ids."""


@dataclass(frozen=True)
class Used:
    """What a run used up to now, over all its attempts."""

    attempts: int
    seconds: float
    gpu_seconds: float
    peak_bytes: int
    """Largest memory of a process (of the trainer alone, where its own counter says it)."""
    source: str
    """``sacct``, ``own counters``, or both."""

    def text(self) -> str:
        """Return it as one line."""
        hours, minutes = divmod(round(self.seconds / 60), 60)
        parts = [f"{hours} h {minutes} min in {self.attempts} attempt{'s' if self.attempts != 1 else ''}"]
        parts += [f"{self.gpu_seconds / 3600:.2f} GPU-hours"] if self.gpu_seconds else []
        parts += [f"peak memory {self.peak_bytes / 2**30:.2f} GiB"] if self.peak_bytes else []
        return f"{', '.join(parts)} ({self.source})"


def used_by(run: RunDir) -> Used | None:
    """Return what a run used, None if it has had no attempt; from the store alone."""
    numbers = run.attempts()
    jobs = _jobs(run)
    if not numbers and not jobs:
        return None
    uncovered = [one for one in map(run.attempt, numbers) if (_record(one).execution.job or "none") not in _ids(jobs)]
    trained = run.trained() or Trained("")
    gpus = (trained.world_size or 1) if trained.device.startswith("cuda") else 0
    own = sum(_seconds(attempt) for attempt in uncovered)
    accounted = sum(job.get("elapsed") or 0.0 for job in jobs.values())
    gpu_seconds = own * gpus + sum((job.get("elapsed") or 0.0) * (job.get("gpus") or 0) for job in jobs.values())
    memory = max((job.get("max_rss") or 0 for job in jobs.values()), default=0)
    sources = [name for name, there in (("sacct", jobs), ("own counters", uncovered or not memory)) if there]
    peak = memory or trained.peak_memory_bytes or 0
    return Used(len(numbers), own + accounted, gpu_seconds, peak, " and ".join(sources))


def _jobs(run: RunDir) -> Jobs:
    """The accounted jobs of a run, of all its launches."""
    found: dict[str, Mapping[str, Any]] = dict(record.read(run.path).jobs)
    for launch in _of_launches(run.root):
        found |= launch.get(run.run_id, {})
    return found


def of_launches(store: Store) -> dict[str, Jobs]:
    """What the launches' files say of all jobs, by their run: accounting may come after a run has its result."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for launch in _of_launches(store.root):
        for run_id, jobs in launch.items():
            found.setdefault(run_id, {}).update(jobs)
    return dict(found)


def _of_launches(root: Path) -> Iterator[Mapping[str, Jobs]]:
    """The accounted jobs of each launch, by their run."""
    for path in sorted((root / "launches").glob(f"*/{FILE}")):
        with contextlib.suppress(OSError):
            yield _by_run(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _by_run(path: Path, _: int) -> dict[str, Jobs]:
    """A launch's accounted jobs by their run; the file's time of change tells its states apart."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for job in record.read(path.parent).jobs.values():
        found.setdefault(job["run_id"], {})[job["element"]] = job
    return dict(found)


def accounted(run: RunDir) -> bool:
    """Whether accounting said something of its jobs."""
    return bool(_jobs(run))


def keep(run: RunDir, copy: Path) -> None:
    """Write what accounting said of a run's jobs into a copy of it: its launches stay behind."""
    jobs = _jobs(run)
    if jobs:
        record.write(copy, Usage(jobs))


def _ids(jobs: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {str(name) for element, job in jobs.items() for name in (element, job.get("raw_id"))}


def _record(attempt: AttemptDir) -> AttemptRecord:
    return attempt.sound_record() or AttemptRecord()


def _seconds(attempt: AttemptDir) -> float:
    """Seconds from its beginning to its end, or to the last sign of one that did not say how it ended."""
    said = _record(attempt)
    ended = said.ended or attempt.progress().time
    return 0.0 if said.started is None or ended is None else max(0.0, ended - said.started)


def _with(usage: Usage, one: Element, job: Job | None) -> Usage:
    """A launch's file with one more job: what accounting said of it, or that it does not know it."""
    if job is None:
        return replace(usage, unknown=(*usage.unknown, one.key))
    said = {name: value for name, value in asdict(job).items() if name not in ("id", "source", "reason")}
    return replace(usage, jobs={**usage.jobs, one.key: {"run_id": one.run_id, "element": one.id, **said}})


def settle(store: Store, run_ids: Collection[str]) -> None:
    """Ask accounting what the jobs of these runs used, for those that are over and not yet written down.

    Without accounting, or when it does not answer, nothing is written; a store that cannot be written is left alone.
    """
    elements = [one for one in journal.elements(store, run_ids) if one.submission.job_id is not None]
    files = {name: record.read(store.launches / name) for name in {one.submission.launch for one in elements}}
    noted = {(name, key) for name, file in files.items() for key in (*file.jobs, *file.unknown)}
    open_ = [one for one in elements if (one.submission.launch, one.key) not in noted]
    changed = set()
    for one, job in _over(open_):
        launch = one.submission.launch
        files[launch] = _with(files[launch], one, job)
        changed.add(launch)
    for name in changed:
        with contextlib.suppress(OSError):
            record.write(store.launches / name, files[name])


def _over(open_: Sequence[Element]) -> Iterator[tuple[Element, Job | None]]:
    """The elements that are over, by what accounting knows; None: it does not know the job, and never will."""
    if not open_:
        return
    jobs, accounting = scheduler.accounted(journal.batches(open_))
    if accounting is None:
        return
    known = {(job.name, job.id): job for job in jobs}
    for one in open_:
        job = known.get((one.submission.name, one.id))
        late = not accounting or time.time() - one.submission.time > FORGOTTEN
        if late if job is None else job.over:
            yield one, job
