"""Cityscapes through detectron2's own loaders, with integer image ids and clear errors.

``image_id`` counts the images by file name, ``image_key`` is Cityscapes' own (``aachen_000000_000019``).
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from mpformer.config.classes import category_ids, class_table
from mpformer.data.prepare import ignore_interrupts
from mpformer.runtime.errors import UserError

#: so few images are not worth a process
_FEW = 40
ADVICE = "see: mpformer data check cityscapes"


def read_split(root: Path, split: str, tasks: frozenset[str]) -> list[dict[str, Any]]:
    """Read a split of the official layout below ``root``; see :mod:`mpformer.data.catalog` for the records.

    Raises UserError if the layout is incomplete.
    """
    from mpformer.data.catalog import check_files

    try:
        parts = [_READERS[task](root, split) for task in sorted(tasks)]
    except KeyError as error:
        raise UserError(
            f"cityscapes below {root} holds the label id {error}, which is not in its list; {ADVICE}"
        ) from None
    except (AssertionError, FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"cityscapes is incomplete below {root}: {error}; {ADVICE}") from None
    merged: dict[str, dict[str, Any]] = {}
    for part in parts:
        for record in part:
            merged.setdefault(record["file_name"], {}).update(record)
    records = [
        {**merged[name], "image_id": i + 1, "image_key": Path(name).name.removesuffix("_leftImg8bit.png")}
        for i, name in enumerate(sorted(merged))
    ]
    check_files(records, "cityscapes", ADVICE)
    return records


_INTERNAL = "deeplearning.projects.cityscapesApi"


def public_scripts() -> None:
    """Let the internal name by which detectron2's present HEAD imports Cityscapes' scripts mean the public package.

    (detectron2 issue 5436, open: ``deeplearning.projects.cityscapesApi.cityscapesscripts`` is nowhere to be had.)
    Raises UserError if the public package is not installed.
    """
    try:
        modules = {f"{_INTERNAL}.{name}": import_module(name) for name in _SCRIPTS}
    except ImportError as error:
        raise UserError(f"cityscapes needs its scripts ({error.name}): pip install cityscapesscripts") from None
    for name in ("deeplearning", "deeplearning.projects", _INTERNAL):
        modules[name] = ModuleType(name)
        modules[name].__path__ = []
    for name, module in modules.items():
        sys.modules.setdefault(name, module)


_SCRIPTS = ("cityscapesscripts", "cityscapesscripts.helpers", "cityscapesscripts.helpers.labels")
"""What its loaders need."""


def _instances(root: Path, split: str) -> list[dict[str, Any]]:
    """Masks from ``*_instanceIds.png``, which Cityscapes' own scripts paint from the polygons and evaluate against.

    (Mask2Former's training set has the polygons' outlines, half a pixel fatter and without holes.)
    """
    from detectron2.data.datasets.cityscapes import _get_cityscapes_files

    public_scripts()
    records = _parsed(_get_cityscapes_files(str(root / "leftImg8bit" / split), str(root / "gtFine" / split)))
    names = import_module("cityscapesscripts.helpers.labels").name2label
    contiguous = {names[name].id: i for i, name in enumerate(class_table("cityscapes", "instance").names)}
    for annotation in (annotation for record in records for annotation in record["annotations"]):
        annotation["category_id"] = contiguous[annotation["category_id"]]
    return records


def _parsed(files: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Parse each image's files, many of them in processes of their own.

    Not through detectron2's ``load_cityscapes_instances``: its pool forks, and a fork of a process that handles SIGTERM
    (as a run does, to checkpoint) does not die of the pool's end: it waits, sometimes for ever.
    """
    from detectron2.utils import comm

    workers = min(len(os.sched_getaffinity(0)) // comm.get_world_size(), len(files) // _FEW)
    if workers < 2:
        return [_parse(found) for found in files]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=ignore_interrupts) as pool:
        return list(pool.map(_parse, files, chunksize=max(1, _FEW // 4)))


def _parse(files: tuple[str, ...]) -> dict[str, Any]:
    from detectron2.data.datasets.cityscapes import _cityscapes_files_to_dict

    public_scripts()
    return _cityscapes_files_to_dict(files, from_json=False, to_polygons=False)


def _semantic(root: Path, split: str) -> list[dict[str, Any]]:
    from detectron2.data.datasets.cityscapes import load_cityscapes_semantic

    return load_cityscapes_semantic(str(root / "leftImg8bit" / split), str(root / "gtFine" / split))


def _panoptic(root: Path, split: str) -> list[dict[str, Any]]:
    from detectron2.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic

    table, ids = class_table("cityscapes", "panoptic"), category_ids("cityscapes", "panoptic")
    maps: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for contiguous, (category, thing) in enumerate(zip(ids, table.is_thing, strict=True)):
        maps[thing][category] = contiguous
    meta = {"thing_dataset_id_to_contiguous_id": maps[True], "stuff_dataset_id_to_contiguous_id": maps[False]}
    fine = root / "gtFine"
    folder = fine / f"cityscapes_panoptic_{split}"
    records = load_cityscapes_panoptic(str(root / "leftImg8bit" / split), str(folder), f"{folder}.json", meta)
    return [{**r, "segments_info": [{"iscrowd": 0, **s} for s in r["segments_info"]]} for r in records]


_READERS = {"instance": _instances, "semantic": _semantic, "panoptic": _panoptic}
