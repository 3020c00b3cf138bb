"""What may be removed from a store, and why each: leavings of runs that are done, never results, never a run by itself.

A run is not removed because no suite names it any more: only because the user names it. Nothing that a live claim, a
waiting job or a live launch may need is offered.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.status import standing
from experiments.store import claims, journal
from experiments.store.files import modified
from experiments.store.launches import queued_runs, recorded
from experiments.store.run_dir import RESULT, RunDir, Store

OLD = 86400.0
"""Age in seconds from which on a file that was being written counts as left behind."""


@dataclass(frozen=True)
class Leaving:
    """Something to remove, and why."""

    path: Path
    reason: str
    bytes: int
    files: int


def find(store: Store, named: Sequence[RunDir] = ()) -> tuple[list[Leaving], list[str]]:
    """Return what may be removed, and a line for each thing that may not, though it was named.

    ``named`` are runs that the user wants to be gone, results and all.
    """
    busy = _busy(store)
    kept = [f"{run.run_id} is kept: something works on it or is going to" for run in named if run.run_id in busy]
    gone = [run.archive if run.packed else run.path for run in named if run.run_id not in busy]
    found = [_leaving(path, "you named it") for path in gone]
    for run in store.runs():
        if run not in named and run.run_id not in busy:
            found += _of_run(run)
    found += [_leaving(path, _TORN) for path in (store.root / "runs").glob(".*") if _age(path) > OLD]
    found += _of_launches(store, busy)
    return found, kept


def remove(leavings: Sequence[Leaving], store: Store) -> int:
    """Remove what was found, but for what somebody has begun to use meanwhile; returns how many things went."""
    busy = _busy(store)
    count = 0
    for leaving in leavings:
        run = _run_of(leaving.path, store)
        if run is not None and (run in busy or claims.holder(store.run(run).claims) is not None):
            continue
        if leaving.path.is_dir():
            shutil.rmtree(leaving.path)
        else:
            leaving.path.unlink(missing_ok=True)
        count += 1
    return count


def _run_of(path: Path, store: Store) -> str | None:
    parts = path.relative_to(store.root).parts
    return parts[1] if parts[0] == "runs" and len(parts) > 1 else None


def _busy(store: Store) -> frozenset[str]:
    """Runs that are worked on, are waiting for it, or whose job Slurm does not answer about."""
    keys = [(run.run_id, _any_evaluation(run)) for run in store.runs()]
    found = standing.look(store, keys).states
    active = {run_id for (run_id, _), state in found.items() if state.active}
    held = {run.run_id for run in store.runs() if claims.holder(run.claims) is not None}
    return frozenset(active | held | queued_runs(store))


def _any_evaluation(run: RunDir) -> str:
    return next((path.parent.name for path in sorted((run.path / "evals").glob(f"*/{RESULT}"))), "")


def _of_run(run: RunDir) -> Iterator[Leaving]:
    for path in sorted((run.path / "voided").glob("*")):
        yield _leaving(path, "set aside when the run was declared void and done again")
    for path in sorted((run.path / "superseded").glob("*")):
        yield _leaving(path, "set aside by reevaluate")
    trained = run.trained()
    if trained is not None and _any_evaluation(run):
        for path in sorted((run.path / "checkpoints").glob("iteration_*")):
            if str(path.relative_to(run.path)) != trained.weights:
                yield _leaving(path, "checkpoint of a run that is done; its final weights stay")
    for number in run.attempts():
        unfinished = run.attempt(number).path / "evaluation"
        if unfinished.exists():
            yield _leaving(unfinished, "an evaluation by reevaluate that did not complete")
        reserve = run.attempt(number).path / ".reserve"
        if reserve.exists():
            yield _leaving(reserve, "space reserved by an attempt that died")
    yield from _torn(run.path)


_TORN = "half-written by a process that is gone"


def _torn(folder: Path) -> Iterator[Leaving]:
    """Files that somebody was writing when they died."""
    for at, _, names in os.walk(folder):
        for name in names:
            path = Path(at) / name
            if name.startswith(".") and name != ".reserve" and _age(path) > OLD:
                yield _leaving(path, _TORN)


def _age(path: Path) -> float:
    changed = modified(path)
    return time.time() - changed if changed else 0.0


def _of_launches(store: Store, busy: Collection[str]) -> Iterator[Leaving]:
    """Smoke runs of launches and code snapshots that nobody is going to run any more."""
    live = _live_launches(store, busy)
    needed: set[str] = set()
    for launch, record in recorded(store):
        if launch.id in live:
            needed.add(Path(record.code).name)
        elif (launch.path / "smoke" / "runs").exists():
            yield _leaving(launch.path / "smoke" / "runs", "smoke runs of a launch that is over")
    for path in sorted((store.root / "code").glob("*")):
        if path.name not in needed and not path.name.startswith(".") and _age(path) > OLD:
            yield _leaving(path, "code snapshot that no waiting or running job uses")


def _live_launches(store: Store, busy: Collection[str]) -> Collection[str]:
    """Launches with runs that are not over, and those too young to tell."""
    found = {one.launch for one in journal.submissions(store) if any(run.run_id in busy for run in one.runs)}
    young = {launch.id for launch, _ in recorded(store) if _age(launch.file) < OLD}
    return found | young


def _leaving(path: Path, reason: str) -> Leaving:
    sizes = []
    with contextlib.suppress(OSError):
        files = [os.path.join(at, name) for at, _, names in os.walk(path) for name in names] or [str(path)]
        sizes = [os.lstat(file).st_size for file in files]
    return Leaving(path, reason, sum(sizes), len(sizes))
