"""The datasets: one entry each, with what is known of a dataset without looking at its files. No torch.

What reads, makes and checks its files is the module that the entry names: it has a ``SOURCE``, see
:mod:`mpformer.data.sources`. A set of the user's own joins them when something that names it is read: a registration
(:mod:`mpformer.data.own.registration`) or the configuration of a run. Names of classes that detectron2 has are read
from its metadata file when they are first asked for, without importing detectron2 (and so without torch); the counts
are static.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any

from mpformer.runtime.errors import UserError, choices

TASKS = ("instance", "panoptic", "semantic")


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


def counted_from(first: int, count: int) -> tuple[int, ...]:
    """Category ids that count up from ``first``."""
    return tuple(range(first, first + count))


@dataclass(frozen=True)
class Mini:
    """How a narrow model trains on a dataset in minutes (:mod:`experiments.suites.scales` has what all share)."""

    queries: int
    seconds: float
    """Seconds of an iteration on one core of a 2020s laptop: an estimate until a run has measured it, labelled so."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """What its section of the configuration has beside name and task."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Other keys of the configuration that it changes, dotted."""


@dataclass(frozen=True)
class Dataset:
    """One dataset. Without stuff it has instances only (AP), without things semantic labels only (mIoU)."""

    name: str
    title: str
    """Its name in captions."""
    things: int
    stuff: int
    classes: Callable[[], ClassTable]
    """All classes; things alone are those of the instance task."""
    module: str
    """Module with its ``SOURCE``."""
    folder: str
    """Directory below the data root."""
    catalog: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Per task the names of the training and validation set in a Mask2Former configuration, where they are special."""
    ids: Callable[[str, int], tuple[int, ...]] = lambda task, count: counted_from(1, count)
    """Category ids in the files of a task, by class."""
    val_images: int = 0
    """Validation images, for estimates; 0: a parameter says how many."""
    evaluator: str = "coco"
    """Whose rules score it: ``coco`` or ``cityscapes``."""
    mini: Mini | None = None
    """Suites run on it at scale mini; None: they do not."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that it has."""
        if self.things and self.stuff:
            return TASKS
        return TASKS[:1] if self.things else TASKS[2:]

    @property
    def added(self) -> bool:
        """Whether it is a set of the user's own, from ``mpformer data add``."""
        return self.module == ADDED

    @property
    def one_class(self) -> str:
        """Why rows about classes mean nothing on it; empty: they do."""
        return f"{self.name} has one class" if self.things + self.stuff == 1 else ""

    @property
    def no_stuff(self) -> str:
        """Why it has no panoptic and semantic ground truth; empty: it has."""
        of = " of one class" if self.things == 1 else ""
        return "" if self.stuff else f"{self.name} has instances{of} and no stuff"

    @property
    def no_things(self) -> str:
        """Why it has no instances and no panoptic ground truth; empty: it has."""
        return "" if self.things else f"{self.name} has semantic labels alone"

    def catalog_names(self, task: str) -> tuple[str, str]:
        """Names of the training and validation set in detectron2's catalog."""
        return self.catalog.get(task, (f"{self.name}_{task}_train", f"{self.name}_{task}_val"))


def dataset(name: str) -> Dataset:
    """Return the entry of a dataset; UserError, with the names that there are, for an unknown one."""
    if name not in DATASETS:
        raise choices("dataset", name, DATASETS)
    return DATASETS[name]


def register(entry: Dataset) -> None:
    """Add a dataset; UserError if its name is taken."""
    if entry.name in DATASETS:
        raise UserError(f"there is a dataset {entry.name!r} already; choose another name")
    DATASETS[entry.name] = entry


ADDED = "mpformer.data.own.added_set"
"""Module of the user's own sets."""


def added(
    name: str, things: Iterable[str], stuff: Iterable[str], mini: Mini | None = None, val_images: int = 0
) -> Dataset:
    """The entry of a set of the user's own; UserError for classes of one name, or none."""
    table = things_then_stuff(tuple(things), tuple(stuff))
    if not len(table) or len(set(table.names)) < len(table):
        raise UserError(f"dataset {name!r} needs classes, each with a name of its own: {', '.join(table.names)}")
    return Dataset(
        name=name,
        title=name,
        things=len(table.things),
        stuff=len(table.stuff),
        classes=lambda: table,
        module=ADDED,
        folder=name,
        catalog={"semantic": (f"{name}_sem_seg_train", f"{name}_sem_seg_val")},  # as Mask2Former's own files have it
        val_images=val_images,
        mini=mini,
    )


def know(entry: Dataset) -> None:
    """Add a set of the user's own, or take its newer entry; UserError if the name is a built-in dataset's.

    An entry that says nothing about scale mini does not replace one with the same classes that does.
    """
    before = DATASETS.get(entry.name)
    if before is None:
        return register(entry)
    if not before.added:
        raise UserError(f"{entry.name!r} is a dataset of this project; choose another name")
    if entry.mini is not None or entry.classes() != before.classes():
        DATASETS[entry.name] = entry
    return None


# --- the entries ------------------------------------------------------------------------------------------------

SHAPES_THINGS = ("disc", "square", "triangle", "star", "ring", "cross", "bar", "worm")
SHAPES_STUFF = ("stripes", "checks", "dots", "mottle")

# The 100 thing classes of ADE20K's instance challenge, as indices into the 150 classes of its scene parsing
# challenge; the other 50 are stuff.
_ADE20K_STUFF = (
    "0 1 2 3 4 5 6 9 11 13 16 17 21 25 26 28 29 34 40 46 48 51 52 54 59 60 61 63 68 77 79 84 91 94 96 99 100 101 105 "
    "106 109 113 114 117 122 128 131 140 141 145"
)


def things_then_stuff(things: tuple[str, ...], stuff: tuple[str, ...] = ()) -> ClassTable:
    """A table in the usual order."""
    return ClassTable(things + stuff, (True,) * len(things) + (False,) * len(stuff))


def _ade20k() -> ClassTable:
    names = tuple(name.strip() for name in _builtin_meta().ADE20K_SEM_SEG_CATEGORIES)
    stuff = {int(index) for index in _ADE20K_STUFF.split()}
    return ClassTable(names, tuple(i not in stuff for i in range(len(names))))


def _of_detectron2(table: str) -> ClassTable:
    rows = getattr(_builtin_meta(), table)
    return ClassTable(tuple(r["name"] for r in rows), tuple(bool(r["isthing"]) for r in rows))


def _ids_of(table: str, count: int) -> tuple[int, ...]:
    return tuple(row["id"] for row in getattr(_builtin_meta(), table))[:count]


LIGHT_STRESS: Mapping[str, Any] = MappingProxyType(
    {
        "side": 96,
        "crowding": 0.1,
        "solids": ("disc", "star", "ring"),
        **dict.fromkeys(("tiny", "thin", "split", "camouflage", "clutter", "noise", "blur"), 0.0),
    }
)
"""What a narrow model learns within minutes: neighbours and large objects, three shapes, four textures, but little else
of what ShapesConfig can do. At its defaults minutes reach an AP below 1: telling shapes apart takes longest (without
tiny objects, a classifier that is given the true masks is right about 4 of 10 of six shapes after 400 steps, and about
8 of 10 of these three after 300). `--set dataset.shapes.crowding=0.55` and the like bring the stress back, one
parameter at a time or together; each is an ablation of its own."""

# Category ids of ADE20K and Cityscapes are those of the files that Mask2Former's and Cityscapes' own scripts write.
DATASETS: dict[str, Dataset] = {
    entry.name: entry
    for entry in (
        Dataset(
            name="shapes",
            title="shapes (procedural)",
            things=len(SHAPES_THINGS),
            stuff=len(SHAPES_STUFF),
            classes=lambda: things_then_stuff(SHAPES_THINGS, SHAPES_STUFF),
            module="mpformer.data.sets.shapes_set",
            folder="shapes",
            mini=Mini(queries=25, seconds=0.16, keys={"shapes": LIGHT_STRESS}),
        ),
        Dataset(
            name="nuclei",
            title="nuclei (2018 Data Science Bowl)",
            things=1,
            stuff=0,
            classes=lambda: things_then_stuff(("nucleus",)),
            module="mpformer.data.sets.nuclei_set",
            folder="nuclei",
            val_images=130,  # about: it depends on the crops
            mini=Mini(queries=40, seconds=0.25, keys={"crop": 128}),  # crops hold up to some 40 nuclei
        ),
        Dataset(
            name="coco",
            title="COCO val2017",
            things=80,
            stuff=53,
            classes=lambda: _of_detectron2("COCO_CATEGORIES"),
            module="mpformer.data.sets.coco",
            folder="coco",
            catalog={
                "instance": ("coco_2017_train", "coco_2017_val"),
                "panoptic": ("coco_2017_train_panoptic", "coco_2017_val_panoptic_with_sem_seg"),
                "semantic": ("coco_2017_train_panoptic_stuffonly", "coco_2017_val_panoptic_stuffonly"),
            },
            ids=lambda task, count: _ids_of("COCO_CATEGORIES", count),
            val_images=5000,
        ),
        Dataset(
            name="ade20k",
            title="ADE20K val",
            things=100,
            stuff=50,
            classes=_ade20k,
            module="mpformer.data.sets.ade20k",
            folder="ADEChallengeData2016",
            catalog={"semantic": ("ade20k_sem_seg_train", "ade20k_sem_seg_val")},
            ids=lambda task, count: counted_from(1 if task == "instance" else 0, count),
            val_images=2000,
        ),
        Dataset(
            name="cityscapes",
            title="Cityscapes val",
            things=8,
            stuff=11,
            classes=lambda: _of_detectron2("CITYSCAPES_CATEGORIES"),
            module="mpformer.data.sets.cityscapes",
            folder="cityscapes",
            catalog={
                "instance": ("cityscapes_fine_instance_seg_train", "cityscapes_fine_instance_seg_val"),
                "panoptic": ("cityscapes_fine_panoptic_train", "cityscapes_fine_panoptic_val"),
                "semantic": ("cityscapes_fine_sem_seg_train", "cityscapes_fine_sem_seg_val"),
            },
            ids=lambda task, count: (
                counted_from(1, count) if task == "instance" else _ids_of("CITYSCAPES_CATEGORIES", count)
            ),
            val_images=500,
            evaluator="cityscapes",
        ),
    )
}
"""Name -> entry."""


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
