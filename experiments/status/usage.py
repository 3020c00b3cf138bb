"""What runs really used: sacct's Elapsed and MaxRSS where there is accounting, the attempts' own counters elsewhere.

``runs/<run_id>/usage.json`` keeps what accounting said of the run's jobs that are over, so that reports, and whoever
copies the run, need no Slurm. Time that no accounted job covers is taken from the attempts' own records.
"""

import contextlib
import json
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from experiments.status import scheduler
from experiments.status.scheduler import STAGES, Job
from experiments.store import journal
from experiments.store.files import read_json, write_json, write_text
from experiments.store.journal import Submission
from experiments.store.run_dir import RunDir, Store

FILE = "usage.json"

FORGOTTEN = 86400.0
"""Seconds after a submission from which on accounting that does not know a job is not asked about it again."""


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


def of(run: RunDir) -> Used | None:
    """Return what a run used, None if it has had no attempt; from the store alone."""
    numbers = run.attempts()
    jobs = _jobs(run)
    if not numbers and not jobs:
        return None
    uncovered = [stage for stage in map(_stage(run), numbers) if _job_id(stage) not in _ids(jobs)]
    trained = run.trained() or {}
    gpus = int(trained.get("world_size") or 1) if str(trained.get("device", "")).startswith("cuda") else 0
    own = sum(_seconds(stage) for stage in uncovered)
    accounted = sum(job.get("elapsed") or 0.0 for job in jobs.values())
    gpu_seconds = own * gpus + sum((job.get("elapsed") or 0.0) * (job.get("gpus") or 0) for job in jobs.values())
    memory = max((job.get("max_rss") or 0 for job in jobs.values()), default=0)
    sources = [name for name, there in (("sacct", jobs), ("own counters", uncovered or not memory)) if there]
    peak = memory or int(trained.get("peak_memory_bytes") or 0)
    return Used(len(numbers), own + accounted, gpu_seconds, peak, " and ".join(sources))


def _jobs(run: RunDir) -> Mapping[str, Mapping[str, Any]]:
    content = read_json(run.path / FILE)
    return content.get("jobs") or {} if isinstance(content, dict) else {}


def _ids(jobs: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {str(name) for element, job in jobs.items() for name in (element, job.get("raw_id"))}


def _stage(run: RunDir) -> Any:
    def read(number: int) -> dict[str, Any]:
        directory = run.attempt(number)
        stage = read_json(directory / "stage.json")
        if not isinstance(stage, dict):
            return {}
        beat = {} if stage.get("ended") else read_json(directory / "progress.json") or {}
        return {**stage, "ended": stage.get("ended") or beat.get("time")}

    return read


def _job_id(stage: Mapping[str, Any]) -> str:
    execution = stage.get("execution") or {}
    return str(execution.get("array_id") or execution.get("job_id") or "none")


def _seconds(stage: Mapping[str, Any]) -> float:
    started, ended = stage.get("started"), stage.get("ended")
    return 0.0 if started is None or ended is None else max(0.0, ended - started)


def settle(store: Store, run_ids: Collection[str]) -> None:
    """Ask accounting what the jobs of these runs used, for those that are over and not yet written down.

    Without accounting, or when it does not answer, nothing is written; a store that cannot be written is left alone.
    """
    noted = _noted(store)
    found = [one for one in _elements(store, run_ids) if one.key not in noted]
    written = {one.key for one in found if _settled(store.run(one.run_id), one.element)}
    written |= _ask([one for one in found if one.key not in written], store)
    if written:
        with contextlib.suppress(OSError):
            write_text(store.root / NOTED, json.dumps(sorted(noted | written)), durable=False)


NOTED = "settled.json"
"""File of the store: the array elements of which nothing more is to be written down; without it all are looked at."""


def _noted(store: Store) -> frozenset[str]:
    content = read_json(store.root / NOTED)
    return frozenset(map(str, content)) if isinstance(content, list) else frozenset()


@dataclass(frozen=True)
class _Element:
    """A run's place in a batch."""

    run_id: str
    submission: Submission
    index: int

    @property
    def element(self) -> str:
        return f"{self.submission.job_id}_{self.index}"

    @property
    def key(self) -> str:
        """Unlike Slurm's id, never used again."""
        return f"{self.submission.name}/{self.index}"


def _ask(open_: Sequence[_Element], store: Store) -> set[str]:
    """Write down what accounting knows of these elements; returns the keys of those that are settled now."""
    if not open_:
        return set()
    jobs, accounting = scheduler.accounted(list({id(one.submission): one.submission for one in open_}.values()))
    if accounting is None:
        return set()
    known = {(job.name, job.id): job for job in jobs}
    written = set()
    for one in open_:
        job = known.get((one.submission.name, one.element))
        late = not accounting or time.time() - one.submission.created > FORGOTTEN
        over = late if job is None else job.over
        if over and _write(store.run(one.run_id), one.element, job):
            written.add(one.key)
    return written


def _elements(store: Store, run_ids: Collection[str]) -> Iterable[_Element]:
    """The array elements that executed these runs."""
    wanted = set(run_ids)
    for submission in journal.submissions(store):
        if submission.stage in STAGES and submission.job_id is not None:
            for index, each in enumerate(submission.runs):
                if each.run_id in wanted:
                    yield _Element(each.run_id, submission, index)


def _settled(run: RunDir, element: str) -> bool:
    content = read_json(run.path / FILE)
    return isinstance(content, dict) and element in {*(content.get("jobs") or {}), *(content.get("unknown") or ())}


def _write(run: RunDir, element: str, job: Job | None) -> bool:
    """Write down what a job used, or that accounting does not know it; False if the run cannot be written."""
    content = read_json(run.path / FILE) or {"schema": 1}
    jobs, unknown = dict(content.get("jobs") or {}), list(content.get("unknown") or ())
    if job is None:
        unknown.append(element)
    else:
        left_out = ("id", "source", "reason")
        jobs[element] = {name: value for name, value in asdict(job).items() if name not in left_out}
    try:
        write_json(run.path / FILE, {**content, "jobs": jobs, "unknown": unknown})
    except OSError:
        return False
    return True
