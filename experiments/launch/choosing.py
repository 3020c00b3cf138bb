"""Which runs of a plan a command is about: by their states now."""

from collections.abc import Sequence
from dataclasses import replace

from experiments.status import standing
from experiments.status.states import RunState
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan
from mpformer.runtime.errors import UserError


def snapshot(plan: Plan, store: Store) -> list[RunState]:
    """Return the states of the plan's runs now, in the plan's order."""
    return list(standing.look_at_plan(plan, store).values())


def only_new(plan: Plan, store: Store) -> Plan:
    """Return the plan's runs that were never begun; raises UserError if there are none."""
    chosen = tuple(run for run in plan.runs if not store.run(run.run_id).attempts())
    if not chosen:
        raise UserError("every run of it was begun before; launch without --new to go on with what is not done")
    return replace(plan, runs=chosen)


def only_failed(plan: Plan, store: Store, classes: Sequence[str] = ()) -> tuple[Plan, tuple[str, ...]]:
    """Return the plan's failed runs (of these classes), and the classes of their failures.

    Raises UserError with the classes that there are.
    """
    failed = {state.run_id: state.failure_class for state in snapshot(plan, store) if state.state.failed}
    chosen = {run_id: kind for run_id, kind in failed.items() if not classes or kind in classes}
    if not chosen:
        there = ", ".join(sorted(set(failed.values()))) or "none"
        raise UserError(
            f"no failed run to retry{' of class ' + ', '.join(classes) if classes else ''}; failed: {there}"
        )
    kinds = tuple(sorted({kind for kind in chosen.values() if kind}))
    return replace(plan, runs=tuple(run for run in plan.runs if run.run_id in chosen)), kinds
