"""What runs read, made or fetched where the launch is: jobs may run where there is no internet."""

from collections.abc import Callable
from pathlib import Path

from experiments.suites import datasets, planning
from experiments.suites.planning import Plan


def prepare_data(plan: Plan, data_root: Path, progress: Callable[[int, int], None] | None = None) -> Plan:
    """Prepare what can be prepared without the user's help (drawn images), and return the plan with it in place."""
    if not plan.data.preparable:
        return plan
    from mpformer.data.prepare import prepare

    prepare(plan.base.dataset, data_root, progress=progress)
    return planning.make(plan.request, data_root)


def fetch_weights(plan: Plan, data_root: Path) -> Plan:
    """Download initial weights that have an address and are not there, and return the plan with them in place.

    Raises UserError if an address does not answer.
    """
    names = [run.config.model.init_weights for run in plan.runs]
    return planning.make(plan.request, data_root) if datasets.fetch_weights(names, data_root) else plan
