"""Building the datasets that this project makes itself. No torch.

A prepared dataset lies in ``<data root>/<name>/<first 12 digits of its fingerprint>/`` (see
:mod:`mpformer.data.coco_layout`). It is built beside its final directory and renamed when it is whole; a build that
was interrupted goes on where it stopped; two builds at a time do the same work twice but never harm each other.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpformer.config.classes import class_table, tasks_of
from mpformer.config.schema import DatasetConfig
from mpformer.data.chunks import Chunk, Progress, Work, chunks_of, run_chunks
from mpformer.data.coco_layout import Layout, Record, write_annotations, write_manifest
from mpformer.data.convert import convert
from mpformer.data.prepared import prepared_dir
from mpformer.data.sources import Release, source_of
from mpformer.runtime.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """What to build: name, identity, parameters for the manifest, images per split, and who makes a chunk."""

    name: str
    fingerprint: str
    parameters: Mapping[str, Any]
    counts: Mapping[str, int]
    work: Work
    images: Mapping[str, Path] | None = None
    """Folders of the images by split, where they stay and only their labels are written."""

    @property
    def stuff(self) -> bool:
        return "semantic" in tasks_of(self.name)

    def chunks(self) -> list[Chunk]:
        return [chunk for split, count in self.counts.items() for chunk in chunks_of(split, count)]


def prepare(
    dataset: DatasetConfig,
    data_root: Path,
    source: Path | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Path:
    """Make a dataset under the data root: draw it, convert ``source``, or complete a release that lies there.

    Returns its directory; what is done is left alone. ``workers`` is the number of processes (None: one per
    processor). Raises UserError if there is no such dataset, something is missing or broken, or nothing can be
    written.
    """
    found = source_of(dataset.name)
    if isinstance(found, Release):
        return convert(dataset.name, data_root, progress, workers)
    return found.prepare(dataset, data_root, source, progress, workers)


def build(recipe: Recipe, data_root: Path, progress: Progress | None, workers: int | None) -> Path:
    """Write what a recipe says, unless it is there; returns its directory."""
    target = prepared_dir(recipe.name, recipe.fingerprint, data_root)
    if not (target / "manifest.json").exists():
        try:
            _build_beside(recipe, target, progress, workers)
        except FileNotFoundError:
            # another process built the same dataset and renamed the directory meanwhile
            if not (target / "manifest.json").exists():
                raise
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}; choose another place with --data-root") from None
    elif progress:
        total = sum(recipe.counts.values())
        progress(total, total)
    return target


def _build_beside(recipe: Recipe, target: Path, progress: Progress | None, workers: int | None) -> None:
    beside = target.with_name(f".{target.name}.partial")
    (beside / "chunks").mkdir(parents=True, exist_ok=True)
    for split in recipe.counts:
        if recipe.images is not None and not Layout(beside, split).images.exists():
            Layout(beside, split).images.symlink_to(recipe.images[split].absolute())
        Layout(beside, split).make(recipe.stuff)
    records = _records(recipe, beside, progress, workers)
    table = class_table(recipe.name, tasks_of(recipe.name)[-1])
    files: dict[str, str] = {}
    for split, found in records.items():
        files |= write_annotations(Layout(beside, split), found, table)
    write_manifest(beside, recipe.name, recipe.fingerprint, recipe.parameters, records, files)
    shutil.rmtree(beside / "chunks")
    _move_into_place(beside, target)


def _move_into_place(beside: Path, target: Path) -> None:
    try:
        beside.rename(target)
    except OSError:
        if not (target / "manifest.json").exists():
            raise
        shutil.rmtree(beside, ignore_errors=True)


def _records(recipe: Recipe, root: Path, progress: Progress | None, workers: int | None) -> dict[str, list[Record]]:
    """The records of all images by split, in order; chunks that an earlier build finished are read back."""
    chunks = recipe.chunks()
    missing = [c for c in chunks if not (root / "chunks" / c.file).exists()]
    done = sum(c.stop - c.start for c in chunks) - sum(c.stop - c.start for c in missing)
    total = sum(recipe.counts.values())
    for chunk in run_chunks(recipe.work, root, missing, workers):
        done += chunk.stop - chunk.start
        if progress:
            progress(done, total)
    records: dict[str, list[Record]] = {split: [] for split in recipe.counts}
    for chunk in chunks:
        records[chunk.split] += json.loads((root / "chunks" / chunk.file).read_text())
    return records
