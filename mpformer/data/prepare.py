"""Preparing the datasets that this project makes itself, and telling which version a configuration means. No torch.

A prepared dataset lies in ``<data root>/<name>/<first 12 digits of its fingerprint>/`` (see
:mod:`mpformer.data.coco_layout`). It is built beside its place and renamed when it is whole; a build that was
interrupted goes on where it stopped; two builds at a time do the same work twice but never harm each other.
"""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpformer.config.classes import class_table, tasks_of
from mpformer.config.schema import Config, DatasetConfig, ShapesConfig
from mpformer.data import nuclei, shapes
from mpformer.data.coco_layout import Layout, Record, write_annotations, write_json, write_manifest, write_scene
from mpformer.runtime.errors import UserError, choices

if TYPE_CHECKING:
    from mpformer.data.check import Report

Progress = Callable[[int, int], None]
PREPARED = ("shapes", "nuclei")
#: datasets in the layout of their official release: their identity is the release, not the files' checksums
RELEASES = {"coco": "coco-2017", "ade20k": "ade20k-challenge-2016", "cityscapes": "cityscapes-fine-trainvaltest"}
_CHUNK = 50


@dataclass(frozen=True)
class Chunk:
    """A part of the work: images start ... stop - 1 of a split."""

    split: str
    start: int
    stop: int

    @property
    def file(self) -> str:
        return f"{self.split}-{self.start:06d}-{self.stop:06d}.json"


#: writes the images of a chunk below a directory and returns their records
Work = Callable[[Path, Chunk], list[Record]]


@dataclass(frozen=True)
class Recipe:
    """What to build: name, identity, parameters for the manifest, images per split, and who makes a chunk."""

    name: str
    fingerprint: str
    parameters: Mapping[str, Any]
    counts: Mapping[str, int]
    work: Work

    @property
    def stuff(self) -> bool:
        return "panoptic" in tasks_of(self.name)

    def chunks(self) -> list[Chunk]:
        return [chunk for split, count in self.counts.items() for chunk in chunks_of(split, count)]


def chunks_of(split: str, count: int) -> list[Chunk]:
    """Cut a split into chunks of at most 50 images."""
    return [Chunk(split, start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]


def prepare_shapes(
    config: ShapesConfig, data_root: Path, progress: Progress | None = None, workers: int | None = None
) -> Path:
    """Draw the shapes dataset unless it is there; returns its directory.

    progress(done, total) counts images; workers is the number of processes (None: one per processor).
    Raises UserError if the data root cannot be written.
    """
    counts = {"train": config.train_images, "val": config.val_images}
    parameters = {"version": shapes.GENERATOR_VERSION, **config.model_dump()}
    work = partial(_draw_chunk, config)
    return _build(Recipe("shapes", shapes.fingerprint(config), parameters, counts, work), data_root, progress, workers)


def prepare_nuclei(
    source: Path, data_root: Path, crop: int = nuclei.DEFAULT_CROP, progress: Progress | None = None
) -> Path:
    """Convert the Data Science Bowl's public layout (directory or archive); returns the dataset's directory.

    Raises UserError if the source is missing, incomplete or broken, or the data root cannot be written.
    """
    images = nuclei.read_source(Path(source))
    tiles: dict[str, list[nuclei.Tile]] = {"train": [], "val": []}
    for done, item in enumerate(images, start=1):
        tiles[item.split] += nuclei.tiles(item, crop)
        if progress:
            progress(done, 2 * len(images))
    counts = {split: len(found) for split, found in tiles.items()}
    if not all(counts.values()):
        raise UserError(f"{source} gives {counts} tiles of {crop} px; both splits need some: use the whole set")
    identity = nuclei.fingerprint(images, crop)
    recipe = Recipe("nuclei", identity, nuclei.parameters(crop), counts, partial(_tile_chunk, tiles))
    total = sum(counts.values())
    half = (lambda done, _: progress(total + done, 2 * total)) if progress else None
    return _build(recipe, data_root, half, workers=1)


def _draw_chunk(config: ShapesConfig, root: Path, chunk: Chunk) -> list[Record]:
    layout = Layout(root, chunk.split)
    return [
        write_scene(layout, index + 1, shapes.generate(config, chunk.split, index), stuff=True)
        for index in range(chunk.start, chunk.stop)
    ]


def _tile_chunk(tiles: Mapping[str, list[nuclei.Tile]], root: Path, chunk: Chunk) -> list[Record]:
    layout = Layout(root, chunk.split)
    records = []
    for index in range(chunk.start, chunk.stop):
        tile = tiles[chunk.split][index]
        record = write_scene(layout, index + 1, tile.scene, stuff=False)
        record["image"] |= {"source": tile.source, "corner": list(tile.corner)}
        records.append(record)
    return records


def _build(recipe: Recipe, data_root: Path, progress: Progress | None, workers: int | None) -> Path:
    target = prepared_dir(recipe.name, recipe.fingerprint, data_root)
    if not (target / "manifest.json").exists():
        try:
            _build_beside(recipe, target, progress, workers)
        except FileNotFoundError:
            # another process built the same dataset and renamed the directory under our hands
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


def run_chunks(work: Work, root: Path, chunks: list[Chunk], workers: int | None) -> Iterator[Chunk]:
    """Do the chunks, in processes if there are several, keep each one's records, and give it when it is done."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(chunks))
    if workers <= 1:
        for chunk in chunks:
            yield _do(work, root, chunk)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=ignore_interrupts) as pool:
        try:
            for future in as_completed([pool.submit(_do, work, root, chunk) for chunk in chunks]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def ignore_interrupts() -> None:
    """Ctrl-C is for the parent, which then stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _do(work: Work, root: Path, chunk: Chunk) -> Chunk:
    write_json(root / "chunks" / chunk.file, work(root, chunk))
    return chunk


# --- which prepared dataset a configuration means ---------------------------------------------------------------


def prepared_dir(name: str, fingerprint: str, data_root: Path) -> Path:
    """Where a prepared dataset of this identity lies."""
    return Path(data_root) / name / fingerprint[:12]


def resolve(config: Config, data_root: Path) -> Config:
    """Fill in the dataset's fingerprint.

    Raises UserError if a dataset that must be converted first is not there, if several versions of it are and the
    configuration does not say which, or if a given fingerprint is not the parameters' own.
    """
    return config.replace({"dataset.fingerprint": fingerprint(config.dataset, data_root)})


def fingerprint(dataset: DatasetConfig, data_root: Path) -> str:
    """The identity of the dataset that is meant; see :func:`resolve` for what it raises."""
    if dataset.name == "nuclei":
        return _prepared_nuclei(dataset, data_root)
    if dataset.name == "shapes":
        assert dataset.shapes is not None
        own = shapes.fingerprint(dataset.shapes)
    else:
        own = hashlib.sha256(RELEASES[dataset.name].encode()).hexdigest()
    if dataset.fingerprint not in ("", own):
        raise UserError(
            f"the configuration names {dataset.name} {dataset.fingerprint[:12]}, but this version of mpformer makes "
            f"{own[:12]} from its parameters; use the version that made it, or clear dataset.fingerprint"
        )
    return own


def _prepared_nuclei(dataset: DatasetConfig, data_root: Path) -> str:
    wanted = dataset.crop or nuclei.DEFAULT_CROP
    found = {
        m["fingerprint"]: m["parameters"]["crop"]
        for m in (read_manifest(p) for p in sorted(Path(data_root, "nuclei").glob("*/manifest.json")))
    }
    if dataset.fingerprint:
        return dataset.fingerprint
    fitting = [key for key, crop in found.items() if crop == wanted]
    if not fitting:
        raise UserError(f"nuclei with {wanted}-px crops is not in {data_root}; run: mpformer data prepare nuclei SRC")
    if len(fitting) > 1:
        listed = ", ".join(key[:12] for key in fitting)
        raise UserError(f"{data_root} holds several nuclei datasets; set dataset.fingerprint to one of: {listed}")
    return fitting[0]


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.json; raises UserError if it is not one."""
    try:
        content = json.loads(path.read_text())
        return {**content, "fingerprint": content["fingerprint"], "splits": content["splits"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; remove {path.parent} and prepare the dataset again") from None


def dataset_dir(config: Config, data_root: Path) -> Path:
    """The directory of a prepared dataset (of COCO, ADE20K and Cityscapes: the data root itself).

    Raises UserError, naming the command that makes it, if the dataset is not there.
    """
    dataset = config.dataset
    if dataset.name not in PREPARED:
        return Path(data_root)
    directory = prepared_dir(dataset.name, fingerprint(dataset, data_root), data_root)
    if not (directory / "manifest.json").exists():
        source = " SRC" if dataset.name == "nuclei" else ""
        command = f"mpformer data prepare {dataset.name}{source}"
        raise UserError(f"dataset {dataset.name} {directory.name} is not in {data_root}; run: {command}")
    return directory


def check_name(name: str) -> None:
    """Raise UserError if there is no dataset of this name."""
    if name not in (*PREPARED, *RELEASES):
        raise choices("dataset", name, (*PREPARED, *RELEASES))


def check(name: str, data_root: Path, full: bool = False) -> "tuple[Report, ...]":
    """What of a dataset is there; see :func:`mpformer.data.check.check`."""
    from mpformer.data.check import check as look

    return look(name, data_root, full)
