"""Cityscapes through detectron2's own loaders, with integer image ids and clear errors.

``image_id`` counts the images by file name, ``image_key`` is Cityscapes' own (``aachen_000000_000019``).
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpformer.config.classes import category_ids, class_table
from mpformer.data.chunks import Progress, ignore_interrupts
from mpformer.data.coco_layout import Record, id_to_rgb, png, write_json
from mpformer.data.convert import IGNORE, Job, checksums, read_labels, run_jobs, segment_of, stems_in, written
from mpformer.data.sources import Expected, Release
from mpformer.runtime.errors import UserError

#: so few images are not worth a process
_FEW = 40
_SEE = "see: mpformer data check cityscapes"

FILES = tuple(
    expected
    for split, images in (("train", 2975), ("val", 500))
    for expected in (
        Expected(f"cityscapes/leftImg8bit/{split}", "all tasks", images, "_leftImg8bit.png"),
        Expected(f"cityscapes/gtFine/{split}", "instance", images, "_gtFine_instanceIds.png"),
        Expected(f"cityscapes/gtFine/{split}", "semantic", images, "_gtFine_labelTrainIds.png"),
        Expected(f"cityscapes/gtFine/cityscapes_panoptic_{split}.json", "panoptic"),
        Expected(f"cityscapes/gtFine/cityscapes_panoptic_{split}", "panoptic", images, ".png"),
    )
)
ADVICE = (
    "get leftImg8bit_trainvaltest and gtFine_trainvaltest from https://www.cityscapes-dataset.com (login needed) "
    "into <data root>/cityscapes; then: mpformer data prepare cityscapes"
)


def read_split(root: Path, split: str, tasks: frozenset[str]) -> list[dict[str, Any]]:
    """Read a split below the data root ``root``; see :mod:`mpformer.data.catalog` for the records.

    Raises UserError if the layout is incomplete.
    """
    root = root / "cityscapes"
    try:
        parts = [_READERS[task](root, split) for task in sorted(tasks)]
    except KeyError as error:
        raise UserError(
            f"cityscapes below {root} holds the label id {error}, which is not in its list; {_SEE}"
        ) from None
    except (AssertionError, FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"cityscapes is incomplete below {root}: {error}; {_SEE}") from None
    merged: dict[str, dict[str, Any]] = {}
    for part in parts:
        for record in part:
            merged.setdefault(record["file_name"], {}).update(record)
    return [
        {**merged[name], "image_id": i + 1, "image_key": Path(name).name.removesuffix("_leftImg8bit.png")}
        for i, name in enumerate(sorted(merged))
    ]


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


def labels_of(data_root: Path, image: Path) -> Path:
    """The semantic labels of a validation image."""
    stem = image.name.removesuffix("_leftImg8bit.png")
    return data_root / "cityscapes/gtFine/val" / image.parent.name / f"{stem}_gtFine_labelTrainIds.png"


def convert(root: Path, progress: Progress | None, workers: int | None) -> dict[str, str]:
    fine = root / "gtFine"
    stems = {s: stems_in(fine / s, "_gtFine_instanceIds.png", "cityscapes") for s in ("train", "val")}
    jobs = [Job(root, s, len(names), partial(_cityscapes_image, root, s, names)) for s, names in stems.items()]
    results = run_jobs(jobs, progress, workers)
    files = checksums(results)
    table, ids = class_table("cityscapes", "panoptic"), category_ids("cityscapes", "panoptic")
    categories = [
        {"id": i, "name": n, "isthing": int(t)} for i, n, t in zip(ids, table.names, table.is_thing, strict=True)
    ]
    for split, records in zip(stems, results, strict=True):
        content = {
            "images": [r["image"] for r in records],
            "annotations": [r["annotation"] for r in records],
            "categories": categories,
        }
        name = f"gtFine/cityscapes_panoptic_{split}.json"
        files[name] = write_json(root / name, content)
    return files


def _cityscapes_image(root: Path, split: str, stems: Sequence[str], index: int) -> Record:
    """Training labels and the panoptic PNG of one image; the same as Cityscapes' own scripts make (tested)."""
    stem = stems[index]
    key = Path(stem).name
    fine = root / "gtFine"
    label_ids = read_labels(fine / split / f"{stem}_gtFine_labelIds.png", "cityscapes")
    numbers = read_labels(fine / split / f"{stem}_gtFine_instanceIds.png", "cityscapes").astype(np.int32)
    _check_label_ids(label_ids, numbers, f"gtFine/{split}/{stem}")
    train_ids = np.full(256, IGNORE, dtype=np.uint8)
    train_ids[list(category_ids("cityscapes", "semantic"))] = np.arange(19)
    files = written(root, fine / split / f"{stem}_gtFine_labelTrainIds.png", png(train_ids[label_ids]))
    panoptic, segments = _cityscapes_segments(numbers)
    name = f"{key}_gtFine_panoptic.png"
    files |= written(root, fine / f"cityscapes_panoptic_{split}" / name, png(id_to_rgb(panoptic)))
    h, w = numbers.shape
    return {
        "image": {"id": key, "width": w, "height": h, "file_name": f"{key}_gtFine_leftImg8bit.png"},
        "annotation": {"image_id": key, "file_name": name, "segments_info": segments},
        "files": files,
    }


_LABELS = 34
"""Cityscapes' label ids are 0-33."""


def _check_label_ids(label_ids: NDArray[Any], numbers: NDArray[np.int32], where: str) -> None:
    found = np.unique(np.where(numbers < 1000, numbers, numbers // 1000))
    outside = sorted({int(i) for i in (*np.unique(label_ids), *found) if i >= _LABELS})
    if label_ids.shape != numbers.shape:
        raise UserError(f"{where}: labelIds are {label_ids.shape}, instanceIds {numbers.shape}; extract gtFine again")
    if outside:
        raise UserError(
            f"{where} holds label id {outside[0]}; valid: 0-{_LABELS - 1}; see: mpformer data check cityscapes"
        )


def _cityscapes_segments(numbers: NDArray[np.int32]) -> tuple[NDArray[np.int32], list[Record]]:
    """Ids below 1000 are label ids (of things: crowds), others label id x 1000 + instance."""
    is_thing = dict(
        zip(category_ids("cityscapes", "panoptic"), class_table("cityscapes", "panoptic").is_thing, strict=True)
    )
    panoptic, segments = np.zeros_like(numbers), []
    for number in np.unique(numbers).tolist():
        category = number if number < 1000 else number // 1000
        if category not in is_thing:
            continue
        mask = numbers == number
        panoptic[mask] = number
        segments.append(segment_of(number, category, mask, crowd=number < 1000 and is_thing[category]))
    return panoptic, segments


SOURCE = Release("cityscapes-fine-trainvaltest", read_split, FILES, ADVICE, labels_of, convert)
