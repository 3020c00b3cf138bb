"""Registering datasets with detectron2's catalogs, and reading their annotation files into its standard dicts.

A record has ``file_name, image_id, height, width`` and, by what was asked for, ``annotations`` (contiguous thing
classes), ``pan_seg_file_name`` with ``segments_info`` (contiguous classes of all), ``sem_seg_file_name``.
"""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from mpformer.config.classes import class_table, tasks_of
from mpformer.config.schema import Config
from mpformer.data.packed import Records, pack
from mpformer.data.prepared import dataset_dir
from mpformer.data.sources import Prepared, source_of
from mpformer.runtime.errors import UserError

Record = dict[str, Any]
IGNORE_LABEL = 255


def records(config: Config, data_root: Path, split: str, tasks: Iterable[str]) -> Records:
    """The images of ``train`` or ``val`` with the annotations that the tasks need, ordered by image id, packed.

    Raises UserError if a file is missing or damaged, or its categories are not the expected ones.
    """
    name = register(config, data_root, split, frozenset(tasks))
    found: Records = DatasetCatalog.get(name)
    return found


def register(config: Config, data_root: Path, split: str, tasks: frozenset[str]) -> str:
    """Register a split with detectron2's catalogs (once) and return its name there."""
    dataset, root = config.dataset.name, dataset_dir(config, data_root)
    name = f"mpformer/{dataset}/{'+'.join(sorted(tasks))}/{split}@{root.absolute()}"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, partial(_read, dataset, root, split, tasks))
        table = class_table(dataset, tasks_of(dataset)[-1])
        MetadataCatalog.get(name).set(
            thing_classes=list(table.things),
            stuff_classes=list(table.names),
            ignore_label=IGNORE_LABEL,
            evaluator_type="coco_panoptic_seg" if table.stuff else "coco",
        )
    return name


def _read(dataset: str, root: Path, split: str, tasks: frozenset[str]) -> Records:
    source = source_of(dataset)
    found = source.read(root, split, tasks)
    again = f"remove {root} and run: {source.command}" if isinstance(source, Prepared) else source.advice
    packed = found if isinstance(found, Records) else pack(sorted(found, key=lambda r: r["image_id"]))
    check_files(packed.heads(), dataset, again)
    return packed


def check_files(found: Iterable[Record], dataset: str, advice: str) -> None:
    """Raise UserError if files that the records name do not exist; reads each directory once."""
    named = [r[key] for r in found for key in ("file_name", "pan_seg_file_name", "sem_seg_file_name") if key in r]
    present: dict[str, set[str]] = {}
    missing = []
    for file in named:
        folder, name = os.path.split(file)
        if folder not in present:
            present[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in present[folder]:
            missing.append(file)
    if missing:
        raise UserError(
            f"{dataset} is incomplete: {len(missing)} of {len(named)} files are missing (first: {missing[0]}); {advice}"
        )
