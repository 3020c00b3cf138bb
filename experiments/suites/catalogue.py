"""All suites: those of the modules imported here, and what other code defines with ``rows.suite``."""

from experiments.suites import (
    ablations,  # noqa: F401  (importing defines its suites)
    paper_tables,  # noqa: F401
    scales,
)
from experiments.suites.rows import SUITES, Suite
from mpformer.runtime.errors import choices


def all_suites() -> dict[str, Suite]:
    """Return the registered suites by name, in the order of definition."""
    return dict(SUITES)


def find(name: str) -> Suite:
    """Return one suite; raises UserError that lists the suites there are."""
    suites = all_suites()
    if name not in suites:
        raise choices("suite", name, suites)
    return suites[name]


def of_dataset(scale: str, dataset: str | None) -> list[Suite]:
    """Return the suites that have the dataset at a scale, all for None; raises UserError with the valid choices."""
    suites = list(all_suites().values())
    found = [suite for suite in suites if dataset is None or dataset in suite.datasets(scale)]
    if not found:
        known = dict.fromkeys(name for suite in suites for name in suite.datasets(scale))
        raise choices(f"dataset at scale {scale!r}", str(dataset), known)
    return found


def place(name: str, scale: str, dataset: str | None) -> tuple[str, str]:
    """Return scale and dataset of a suite, the default filled in; raises UserError with the valid choices.

    A suite that this version does not have any more, but that was launched once, has the scale's default dataset.
    """
    suites = all_suites()
    return suites[name].place(scale, dataset) if name in suites else scales.check(scale, dataset)
