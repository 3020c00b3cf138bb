"""Class tables: names and counts of the classes that a dataset and a task tell apart. No torch.

The counts are static. The names of the drawn and the microscopy classes are static too; those of COCO, ADE20K
and Cityscapes are read from detectron2's metadata file when they are first asked for, without importing detectron2
(and so without torch).
"""

import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from mpformer.runtime.errors import UserError, choices

SHAPES_THINGS = ("disc", "square", "triangle", "star", "ring", "cross", "bar", "worm")
SHAPES_STUFF = ("stripes", "checks", "dots", "mottle")
NUCLEI_THINGS = ("nucleus",)

#: number of (thing, stuff) classes
COUNTS = {
    "shapes": (len(SHAPES_THINGS), len(SHAPES_STUFF)),
    "nuclei": (1, 0),
    "coco": (80, 53),
    "ade20k": (100, 50),
    "cityscapes": (8, 11),
}
TASKS = ("instance", "panoptic", "semantic")

# The 100 thing classes of ADE20K's instance challenge, as indices into the 150 classes of its scene parsing
# challenge; the other 50 are stuff.
_ADE20K_STUFF = (
    "0 1 2 3 4 5 6 9 11 13 16 17 21 25 26 28 29 34 40 46 48 51 52 54 59 60 61 63 68 77 79 84 91 94 96 99 100 101 105 "
    "106 109 113 114 117 122 128 131 140 141 145"
)


@dataclass(frozen=True)
class ClassTable:
    """Classes in contiguous order (0 ... C-1), with what each is."""

    names: tuple[str, ...]
    is_thing: tuple[bool, ...]

    @property
    def things(self) -> tuple[str, ...]:
        """Names of the things, in contiguous order."""
        return tuple(n for n, thing in zip(self.names, self.is_thing, strict=True) if thing)

    @property
    def stuff(self) -> tuple[str, ...]:
        """Names of the stuff, in contiguous order."""
        return tuple(n for n, thing in zip(self.names, self.is_thing, strict=True) if not thing)

    @property
    def thing_indices(self) -> tuple[int, ...]:
        """Contiguous index of each thing class; entry i belongs to class i of the instance task."""
        return tuple(i for i, thing in enumerate(self.is_thing) if thing)

    def __len__(self) -> int:
        return len(self.names)


def num_classes(dataset: str, task: str) -> int:
    """Number of classes without "no object": things for ``instance``, all for the other tasks.

    Raises UserError for an unknown dataset or task, or one that the dataset does not have.
    """
    things, stuff = COUNTS[_checked(dataset, task)]
    return things if task == "instance" else things + stuff


@cache
def class_table(dataset: str, task: str) -> ClassTable:
    """The classes of a dataset for a task; see :func:`num_classes` for what it raises."""
    full = _full_table(_checked(dataset, task))
    if task == "instance":
        return ClassTable(full.things, (True,) * len(full.things))
    return full


def category_ids(dataset: str, task: str) -> tuple[int, ...]:
    """The category id in the dataset's files of each class of :func:`class_table`, for the files of that task.

    ADE20K and Cityscapes follow the files that Mask2Former's preparation scripts and Cityscapes' own write.
    """
    size = num_classes(dataset, task)
    if dataset == "coco":
        return tuple(row["id"] for row in _builtin_meta().COCO_CATEGORIES)[:size]
    if dataset == "cityscapes" and task != "instance":
        return tuple(row["id"] for row in _builtin_meta().CITYSCAPES_CATEGORIES)
    first = 0 if dataset == "ade20k" and task != "instance" else 1
    return tuple(range(first, first + size))


def tasks_of(dataset: str) -> tuple[str, ...]:
    """The tasks that a dataset has: one without stuff has instances only."""
    if dataset not in COUNTS:
        raise choices("dataset", dataset, COUNTS)
    return TASKS if COUNTS[dataset][1] else TASKS[:1]


def _checked(dataset: str, task: str) -> str:
    if task not in TASKS:
        raise choices("task", task, TASKS)
    if task not in tasks_of(dataset):
        raise UserError(f"dataset {dataset!r} has no task {task!r}; valid: {', '.join(tasks_of(dataset))}")
    return dataset


def _full_table(dataset: str) -> ClassTable:
    if dataset == "shapes":
        return _things_then_stuff(SHAPES_THINGS, SHAPES_STUFF)
    if dataset == "nuclei":
        return _things_then_stuff(NUCLEI_THINGS, ())
    meta = _builtin_meta()
    if dataset == "ade20k":
        names = tuple(name.strip() for name in meta.ADE20K_SEM_SEG_CATEGORIES)
        stuff = {int(index) for index in _ADE20K_STUFF.split()}
        return ClassTable(names, tuple(i not in stuff for i in range(len(names))))
    rows = meta.COCO_CATEGORIES if dataset == "coco" else meta.CITYSCAPES_CATEGORIES
    return ClassTable(tuple(r["name"] for r in rows), tuple(bool(r["isthing"]) for r in rows))


def _things_then_stuff(things: tuple[str, ...], stuff: tuple[str, ...]) -> ClassTable:
    return ClassTable(things + stuff, (True,) * len(things) + (False,) * len(stuff))


@cache
def _builtin_meta() -> ModuleType:
    """detectron2's ``builtin_meta.py``, a file of plain tables, loaded alone: its package would import torch."""
    loaded = sys.modules.get("detectron2.data.datasets.builtin_meta")
    if loaded is not None:
        return loaded
    package = importlib.util.find_spec("detectron2")
    if package is None or not package.submodule_search_locations:
        raise UserError("detectron2 is not installed; run `make setup`")
    path = f"{package.submodule_search_locations[0]}/data/datasets/builtin_meta.py"
    spec = importlib.util.spec_from_file_location("mpformer._builtin_meta", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
