"""Class tables: names and counts of the classes that a dataset and a task tell apart. No torch."""

from collections.abc import Callable
from functools import cache

from mpformer.config.datasets import TASKS, ClassTable, Dataset, dataset
from mpformer.runtime.errors import UserError, choices


def num_classes(name: str, task: str) -> int:
    """Number of classes without "no object": things for ``instance``, all for the other tasks.

    Raises UserError for an unknown dataset or task, or one that the dataset does not have.
    """
    entry = _checked(name, task)
    return entry.things if task == "instance" else entry.things + entry.stuff


def class_table(name: str, task: str) -> ClassTable:
    """The classes of a dataset for a task; see :func:`num_classes` for what it raises."""
    full, things = _tables(_checked(name, task).classes)
    return things if task == "instance" else full


@cache
def _tables(classes: Callable[[], ClassTable]) -> tuple[ClassTable, ClassTable]:
    """All classes, and the things alone."""
    full = classes()
    return full, ClassTable(full.things, (True,) * len(full.things))


def category_ids(name: str, task: str) -> tuple[int, ...]:
    """The category id in the dataset's files of each class of :func:`class_table`, for the files of that task."""
    return _checked(name, task).ids(task, num_classes(name, task))


def tasks_of(name: str) -> tuple[str, ...]:
    """The tasks that a dataset has: one without stuff has instances only."""
    return dataset(name).tasks


def _checked(name: str, task: str) -> Dataset:
    if task not in TASKS:
        raise choices("task", task, TASKS)
    entry = dataset(name)
    if task not in entry.tasks:
        raise UserError(f"dataset {name!r} has no task {task!r}; valid: {', '.join(entry.tasks)}")
    return entry
