"""Where many runs stand: their files first, then, for those that are not done, this machine's workers and Slurm."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.status import scheduler
from experiments.status.scheduler import Answer, Placement
from experiments.status.states import RunState, State, finished, unfinished
from experiments.store.files import side_by_side
from experiments.store.launches import queued_runs
from experiments.store.run_dir import Store

if TYPE_CHECKING:
    from experiments.suites.planning import Plan

Key = tuple[str, str]
"""Run id and evaluation id."""


@dataclass(frozen=True)
class Standing:
    """The states of runs, and what Slurm answered; None if none of the unfinished ones was ever given to it."""

    states: dict[Key, RunState]
    answer: Answer | None = None


def look(store: Store, runs: Iterable[Key], max_age: float = 0.0) -> Standing:
    """Return the state of each run at its evaluation setting.

    Slurm is asked about runs alone that are not done and were given to it; an answer of the last ``max_age`` seconds is
    used again.
    """
    keys = list(dict.fromkeys(runs))
    done = side_by_side(lambda key: finished(store.run(key[0]), key[1]), keys)
    states = {key: state for key, state in zip(keys, done, strict=True) if state is not None}
    rest = [key for key in keys if key not in states]
    queued = queued_runs(store)
    placements, answer = scheduler.placements(store, {run_id for run_id, _ in rest}, max_age)
    others = side_by_side(lambda key: _open(store, key, queued, placements), rest)
    states |= zip(rest, others, strict=True)
    return Standing({key: states[key] for key in keys}, answer)


def _open(store: Store, key: Key, queued: frozenset[str], placements: Mapping[str, Placement]) -> RunState:
    """The state of a run that was not done before Slurm was asked; it may have got its result meanwhile."""
    run = store.reading(key[0])
    state = unfinished(run, queued, placements)
    done = finished(run, key[1]) if state.state in (State.TRAINED, State.UNKNOWN) else None
    return done or state


def look_at_plan(plan: "Plan", store: Store) -> dict[str, RunState]:
    """Return the state of each of a plan's runs by run id, what Slurm says included."""
    found = look(store, [(run.run_id, run.eval_id) for run in plan.unique])
    return {run_id: state for (run_id, _), state in found.states.items()}
