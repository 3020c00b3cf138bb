"""What ``status --json`` says of runs, held every few seconds against squeue and the process table."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.status.scheduler import ENDED
from experiments.store import claims, journal
from experiments.store.run_dir import Store
from tests.support.tiny_jobs import ROOT

ACTIVE = ("RUNNING", "QUEUED", "REQUEUED")


@dataclass(frozen=True)
class Facts:
    """What is so at a moment, by run: the jobs that Slurm has of it, and whether a process of it lives."""

    answered: bool
    jobs: dict[str, dict[str, str]]
    """Of each run the elements that are not over, with Slurm's word."""
    processes: dict[str, int]
    """Of each run the process that trains or scores it, once it has left a trace."""
    alive: frozenset[str] = frozenset()
    """Runs of whose jobs a process lives: it may begin, or be about to end."""
    claimed: Mapping[str, int] = field(default_factory=dict)
    """Of each run the number of its last claim: a start that came and went between two looks leaves its trace here."""


@dataclass
class Watch:
    """Samples in the background while a block runs; ``contradictions`` has a line for each, ``kinds`` counts them."""

    store: Store
    suite: str
    period: float = 4.0
    samples: int = 0
    unknown: int = 0
    contradictions: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> "Watch":
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._end.wait(self.period):
            before = facts(self.store)
            view = status(self.store.root, self.suite)
            after = facts(self.store)
            if view is not None:
                self.samples += 1
                heard = (view["scheduler"] or {}).get("controller", True)  # it may have been away for that moment
                for run in view["runs"]:
                    self._judge(run, replace(before, answered=before.answered and heard), after)

    def _judge(self, run: dict[str, Any], before: Facts, after: Facts) -> None:
        kind = contradiction(run, before, after)
        self.unknown += run["state"] == "UNKNOWN"
        if kind:
            run_id = run["run_id"]
            seen = f"jobs {before.jobs.get(run_id)}, process {before.processes.get(run_id)}"
            line = f"{time.strftime('%H:%M:%S')} {kind}: {run_id} {run['label']} ({run['detail']}); {seen}"
            print(f"  {line}", flush=True)
            self.contradictions.append(line)
            self.kinds[kind] += 1


def contradiction(run: dict[str, Any], before: Facts, after: Facts) -> str:
    """The kind of contradiction between what status says and what was so before and after it looked; else empty.

    What changed meanwhile proves nothing. Without an answer of the controller the processes alone are held against it.
    """
    run_id, state = run["run_id"], run["state"]
    process = before.processes.get(run_id)
    works = process is not None and process == after.processes.get(run_id)
    idle = process is None and run_id not in {*after.processes, *before.alive, *after.alive}
    if works and state not in ("RUNNING", "DONE", "TRAINED"):
        return f"a process works, status says {state}"
    if not (before.answered and after.answered) or before.jobs.get(run_id) != after.jobs.get(run_id):
        return ""
    if before.claimed.get(run_id) != after.claimed.get(run_id):
        return ""
    jobs = before.jobs.get(run_id, {})
    if jobs and state not in (*ACTIVE, "DONE", "TRAINED") and not set(jobs.values()) <= {"COMPLETING"}:
        return f"Slurm has a job, status says {state}"
    if not jobs and idle and state in ACTIVE:
        return f"nothing works or waits, status says {state}"
    if jobs and idle and state == "RUNNING" and set(jobs.values()) == {"PENDING"}:
        return "the job waits, status says RUNNING"
    return ""


def facts(store: Store) -> Facts:
    """Ask squeue and the process table."""
    asked = subprocess.run(
        ["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%j"], capture_output=True, text=True, timeout=60, check=False
    )
    lines = [line.split("|", 2) for line in asked.stdout.splitlines()]
    live = {(name, element): word for element, word, name in lines if word not in ENDED}
    jobs: dict[str, dict[str, str]] = {}
    owners: dict[str, str] = {}
    for submission in journal.submissions(store):
        for index, run in enumerate(submission.runs):
            element = journal.Element(submission, index).id
            owners[element] = run.run_id
            if (submission.name, element) in live:
                jobs.setdefault(run.run_id, {})[element] = live[submission.name, element]
    processes = {run.run_id: pid for run in store.runs() if (pid := _worker(run.path / "witness.jsonl"))}
    alive = frozenset(owners[element] for element in _elements() if element in owners)
    claimed = {run.run_id: claims.highest(run.claims) for run in store.runs()}
    return Facts(asked.returncode == 0, jobs, processes, alive, claimed)


def _elements() -> Iterator[str]:
    """The array elements that Python processes of this machine belong to."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"submitit.core._submit" in (entry / "cmdline").read_bytes():
                pairs = (part.partition(b"=") for part in (entry / "environ").read_bytes().split(b"\0"))
                given = {name.decode(): value.decode(errors="replace") for name, _, value in pairs}
                yield f"{given.get('SLURM_ARRAY_JOB_ID', '')}_{given.get('SLURM_ARRAY_TASK_ID', '')}"


def _worker(witness: Path) -> int | None:
    """The last process that left a trace of training, if it lives."""
    try:
        pid = int(json.loads(witness.read_text().splitlines()[-1])["pid"])
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, ValueError, IndexError, KeyError):
        return None
    return None if state in "ZX" else pid


def status(root: Path, suite: str) -> dict[str, Any] | None:
    """What the command prints of the suite; None where nothing was launched yet."""
    command = [sys.executable, "-m", "experiments.cli.main", "status", suite, "--json", "--root", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    return dict(json.loads(done.stdout)[0]) if done.returncode == 0 else None
