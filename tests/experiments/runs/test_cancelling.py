"""cancel, where there is no Slurm (with it: tests/slurm/test_status_slurm.py)."""

from experiments.launch import begin, choosing
from experiments.runs import cancelling
from experiments.status.states import State
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan


def test_cancel_writes_the_file_that_workers_look_for(plan: Plan, store: Store) -> None:
    begin.record(plan, store, "")
    states = choosing.snapshot(plan, store)
    done = cancelling.cancel(store, states[:1])
    assert (done.asked, done.jobs, done.trouble) == (1, (), "")
    assert choosing.snapshot(plan, store)[0].state is State.CANCELLED
