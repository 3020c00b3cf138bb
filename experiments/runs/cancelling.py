"""Ending runs that work or wait: workers are asked by a file to checkpoint and end, waiting jobs leave the queue."""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.status import scheduler
from experiments.status.states import RunState
from experiments.store.run_dir import Store


@dataclass(frozen=True)
class Cancelled:
    """What was done about runs."""

    asked: int
    """Runs whose worker or job is asked, by a file, to end."""
    jobs: tuple[str, ...]
    """Slurm jobs that were cancelled."""
    trouble: str = ""
    """Why Slurm did not cancel its jobs; the runs' jobs then end by themselves when they begin."""


def cancel(store: Store, states: Sequence[RunState], now: bool = False) -> Cancelled:
    """End runs: jobs that wait in Slurm go at once, those that run checkpoint first, unless ``now`` says not to wait.

    The file comes first: a job that begins meanwhile finds it, and ends.
    """
    for state in states:
        store.run(state.run_id).ask_to_cancel()
    jobs, answer = scheduler.live_elements(store, {state.run_id for state in states})
    chosen = [job for job in jobs if now or job.waiting]
    trouble = scheduler.cancel(chosen)
    if answer is not None and not answer.controller:
        trouble = "; ".join(answer.problems)
    return Cancelled(len(states), () if trouble else tuple(job.id for job in chosen), trouble)
