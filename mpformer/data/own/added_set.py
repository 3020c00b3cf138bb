"""A set of the user's own as files that training reads: its images as they lie, with labels in this project's layout
(for a setting of the paper), and tiles of them (for scale mini). No torch but to read it.

Both are versions of one dataset below ``<data root>/<name>``, each in a directory of its own (see
:mod:`mpformer.data.coco_layout`); the registration (:mod:`mpformer.data.own.registration`) says which are meant.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpformer.config.schema import DatasetConfig
from mpformer.data.chunks import Chunk, Progress
from mpformer.data.coco_layout import (
    Layout,
    Record,
    box,
    encode_mask,
    id_to_rgb,
    png,
    rgb_to_id,
    semantic_map,
    write_atomically,
    write_scene,
)
from mpformer.data.coco_reader import read_prepared
from mpformer.data.own import registration
from mpformer.data.own.annotations import OwnImage, read_split
from mpformer.data.own.painting import Painted, mask_of, of_classes, paint, renumbered, resized
from mpformer.data.own.registration import VOID, Registration, Settings, Sources
from mpformer.data.prepare import Recipe, build
from mpformer.data.scene import Scene, Segment, Thing
from mpformer.data.sources import Prepared
from mpformer.data.targets import CorruptImage, read_image
from mpformer.runtime.disk import sha256
from mpformer.runtime.errors import UserError

WHOLE_VERSION = 1
TILES_VERSION = 1
SPLITS = ("train", "val")
_MOST_TILES = 100
"""Of one image; ids are counted so."""


@dataclass(frozen=True)
class Work:
    """All that a process has to know to convert a part of the set; it reads the annotation files by itself."""

    sources: Sources
    settings: Settings
    kind: str
    things: tuple[str, ...]
    stuff: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.things + self.stuff

    @property
    def is_thing(self) -> tuple[bool, ...]:
        return (True,) * len(self.things) + (False,) * len(self.stuff)

    def images(self, split: str) -> tuple[OwnImage, ...]:
        """The images of a split, in the order of the annotation file."""
        return read_split(self.sources, split, self._classes).images

    def categories(self, split: str) -> dict[int, int]:
        """Contiguous class by category id of a split's annotation file, without classes that were left out."""
        index = {name: number for number, name in enumerate(self.names)}
        given = read_split(self.sources, split, self._classes).names
        return {category: index[name] for category, name in given.items() if name in index}

    @property
    def _classes(self) -> tuple[str, ...]:
        return self.stuff if self.kind == "semantic" else ()

    @property
    def uncovered(self) -> int | None:
        """Class of the pixels that nothing covers; None: they are void."""
        return None if self.settings.uncovered == VOID else self.names.index(self.settings.uncovered)

    def path(self, split: str, image: OwnImage) -> Path:
        return self.sources.folder(split) / image.file


def work_of(registered: Registration) -> Work:
    """What converts a registered set."""
    r = registered
    return Work(r.sources, r.settings, r.kind, r.things, r.stuff)


# --- labels of one image ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Labels:
    """What an image holds: a painted map where the set has stuff, and objects where they are not the map's things."""

    painted: Painted | None
    objects: tuple[Thing, ...] | None
    segmentations: tuple[Any, ...] = ()
    """Of the objects, as the file has them."""


def _labels(work: Work, split: str, image: OwnImage, out: tuple[int, int]) -> _Labels:
    """Read the labels of an image at a size (height, width); raises UserError for a file that cannot be read."""
    size = (image.height, image.width)
    where = work.path(split, image)
    try:
        if work.kind == "panoptic":
            ids = resized(rgb_to_id(_pixels(image.labels, 3)), out)
            return _of_map(work, renumbered(ids, image.marks, work.categories(split), work.is_thing))
        if work.kind == "semantic":
            return _of_map(work, of_classes(resized(_pixels(image.labels, 2), out), len(work.names)))
        objects, raw = _objects(work, split, image, size, out)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"the labels of {where} cannot be read: {error}; see: mpformer data check") from None
    if not work.settings.panoptic:
        return _Labels(None, objects, raw)
    painted = paint(objects, work.is_thing, work.uncovered) if objects else _bare(work, out)
    return _split_things(work, painted, objects, raw)


def _bare(work: Work, out: tuple[int, int]) -> Painted:
    """An image without any annotation."""
    if work.uncovered is None:
        return Painted(np.zeros(out, dtype=np.int32), ())
    return Painted(np.ones(out, dtype=np.int32), (Segment(1, work.uncovered, False),))


def _of_map(work: Work, painted: Painted) -> _Labels:
    """Labels that came as a map: the objects are its things, unless the set has no stuff (then there is no map)."""
    if work.stuff:
        return _Labels(painted, None)
    things = tuple(Thing(s.category, painted.ids == s.id, s.crowd) for s in painted.segments)
    return _Labels(None, things, tuple(encode_mask(thing.mask) for thing in things))


def _objects(
    work: Work, split: str, image: OwnImage, size: tuple[int, int], out: tuple[int, int]
) -> tuple[tuple[Thing, ...], tuple[Any, ...]]:
    """The annotations that have a pixel, as masks and as they are in the file."""
    known = work.categories(split)
    found = []
    for mark in image.marks:
        if mark["category_id"] in known and mark.get("segmentation"):
            mask = mask_of(mark["segmentation"], size, out)
            if mask.any():
                thing = Thing(known[mark["category_id"]], mask, bool(mark.get("iscrowd", 0)))
                found.append((thing, mark["segmentation"]))
    return tuple(thing for thing, _ in found), tuple(raw for _, raw in found)


def _split_things(work: Work, painted: Painted, objects: Sequence[Thing], raw: Sequence[Any]) -> _Labels:
    """Stuff is in the map alone; the instances are the things as they were annotated, whole."""
    kept = [(thing, r) for thing, r in zip(objects, raw, strict=True) if work.is_thing[thing.category]]
    return _Labels(painted, tuple(thing for thing, _ in kept), tuple(r for _, r in kept))


def _pixels(path: str, dimensions: int) -> NDArray[Any]:
    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGB") if dimensions == 3 else file)
    if pixels.ndim != dimensions:
        raise ValueError(f"{path} is not {'an RGB map' if dimensions == 3 else 'a map of one channel'}")
    return pixels


# --- whole images -------------------------------------------------------------------------------------------------


def whole_chunk(work: Work, root: Path, chunk: Chunk) -> list[Record]:
    """Write the labels of images as they are; the images stay where they lie."""
    layout = Layout(root, chunk.split)
    images = work.images(chunk.split)
    return [_whole(work, layout, index, images[index]) for index in range(chunk.start, chunk.stop)]


def _whole(work: Work, layout: Layout, index: int, image: OwnImage) -> Record:
    size = (image.height, image.width)
    labels = _labels(work, layout.split, image, size)
    number = index + 1
    files: dict[Path, bytes] = {}
    if labels.painted is not None:
        scene = Scene(np.zeros((*size, 0), dtype=np.uint8), labels.painted.ids, labels.painted.segments)
        files = {
            layout.panoptic / f"{number:06d}.png": png(id_to_rgb(labels.painted.ids)),
            layout.semantic / f"{number:06d}.png": png(semantic_map(scene)),
        }
    written = {str(p.relative_to(layout.root)): write_atomically(p, content) for p, content in files.items()}
    source = work.path(layout.split, image)
    annotations, segments = list(_whole_annotations(number, labels)), list(_segments(labels.painted))
    content = hashlib.sha256(json.dumps([annotations, segments, written], sort_keys=True).encode()).hexdigest()
    return {
        "image": {"id": number, "file_name": image.file, "height": size[0], "width": size[1]},
        "annotations": annotations,
        "segments": segments,
        "files": {f"{layout.split}/{image.file}": sha256(source), **written},
        "content": content,
        "masks": max(len(annotations), len(segments)),
    }


def _whole_annotations(number: int, labels: _Labels) -> Iterator[Record]:
    """Instances with the outlines of the file; where the labels came as a map, its things."""
    objects, raw = labels.objects, labels.segmentations
    if objects is None:
        assert labels.painted is not None
        things = [s for s in labels.painted.segments if s.thing]
        objects = tuple(Thing(s.category, labels.painted.ids == s.id, s.crowd) for s in things)
        raw = tuple(encode_mask(thing.mask) for thing in objects)
    for index, (thing, segmentation) in enumerate(zip(objects, raw, strict=True)):
        yield {
            "id": number * 10_000 + index + 1,
            "image_id": number,
            "category_id": thing.category + 1,
            "iscrowd": int(thing.crowd),
            "area": int(thing.mask.sum()),
            "bbox": box(thing.mask),
            "segmentation": segmentation,
        }


def _segments(painted: Painted | None) -> Iterator[Record]:
    if painted is None:
        return
    for segment in painted.segments:
        mask = painted.ids == segment.id
        what = {"id": segment.id, "category_id": segment.category + 1, "iscrowd": int(segment.crowd)}
        yield {**what, "area": int(mask.sum()), "bbox": box(mask)}


# --- tiles --------------------------------------------------------------------------------------------------------


def tiles_chunk(work: Work, root: Path, chunk: Chunk) -> list[Record]:
    """Write the tiles of images; one without a label, or with too many objects, is left out."""
    layout, images = Layout(root, chunk.split), work.images(chunk.split)
    chosen = chosen_images(len(images), work.settings, chunk.split)
    return [r for n in range(chunk.start, chunk.stop) for r in _tiles(work, layout, chosen[n], images[chosen[n]])]


def chosen_images(count: int, settings: Settings, split: str) -> list[int]:
    """Images that tiles are cut from: all, or evenly spread ones; of validation images a quarter as many."""
    most = settings.mini_images if split == "train" else max(1, settings.mini_images // 4)
    return list(range(count)) if count <= most else [n * count // most for n in range(most)]


def _tiles(work: Work, layout: Layout, index: int, image: OwnImage) -> Iterator[Record]:
    try:
        pixels = read_image(
            {"file_name": str(work.path(layout.split, image)), "height": image.height, "width": image.width}
        )
    except CorruptImage as error:
        raise UserError(f"{error}; see: mpformer data check") from None
    out = tile_size(image.height, image.width, work.settings)
    labels = _labels(work, layout.split, image, out)
    if pixels.shape[:2] != out:
        pixels = np.asarray(Image.fromarray(pixels).resize((out[1], out[0]), Image.Resampling.LANCZOS))
    for number, (y, x) in enumerate(corners(out, work.settings.crop)):
        window = (slice(y, y + work.settings.crop), slice(x, x + work.settings.crop))
        scene = _tile(pixels, labels, window, work.settings.min_pixels)
        held = len(scene.objects if scene.objects is not None else scene.segments)
        if held + len(scene.segments) and not 0 < work.settings.max_objects < held:
            record = write_scene(layout, index * _MOST_TILES + number + 1, scene, stuff=bool(work.stuff))
            record["image"] |= {"source": image.file, "corner": [x, y]}
            yield record


def tile_size(height: int, width: int, settings: Settings) -> tuple[int, int]:
    """Size of an image before it is cut: its shorter side as asked, and no side smaller than a tile."""
    shorter = max(settings.resize or min(height, width), settings.crop)
    factor = shorter / min(height, width)
    return max(shorter, round(height * factor)), max(shorter, round(width * factor))


def corners(size: tuple[int, int], crop: int) -> list[tuple[int, int]]:
    """Top left corners (y, x) of the tiles, which do not overlap; a remainder is shared by both sides."""
    ys, xs = ((side % crop) // 2 + crop * np.arange(side // crop) for side in size)
    return [(int(y), int(x)) for y in ys for x in xs][:_MOST_TILES]


def _tile(pixels: NDArray[np.uint8], labels: _Labels, window: tuple[slice, slice], least: int) -> Scene:
    """One tile; what has fewer than ``least`` pixels in it becomes void."""
    image = np.ascontiguousarray(pixels[window])
    segments: list[Segment] = []
    hidden: list[tuple[int, NDArray[np.bool_]]] = []
    ids = np.zeros(image.shape[:2], dtype=np.int32)
    for segment in labels.painted.segments if labels.painted else ():
        assert labels.painted is not None
        mask = labels.painted.ids[window] == segment.id
        if mask.sum() >= least:
            segments.append(Segment(len(segments) + 1, segment.category, segment.thing, segment.crowd))
            ids[mask] = len(segments)
        elif segment.thing and mask.any() and labels.objects is None:
            hidden.append((segment.category, mask))
    if labels.objects is None:
        return Scene(image, ids, tuple(segments), tuple(hidden))
    cut = [Thing(thing.category, thing.mask[window], thing.crowd) for thing in labels.objects]
    small = [thing for thing in cut if 0 < thing.mask.sum() < least]
    objects = tuple(thing for thing in cut if thing.mask.sum() >= least)
    return Scene(image, ids, tuple(segments), tuple((t.category, t.mask) for t in small), objects)


# --- versions -----------------------------------------------------------------------------------------------------


def whole_fingerprint(work: Work, progress: Callable[[int], None] | None = None) -> str:
    """The identity of the set: annotation files, images and label maps by their bytes, and how they are read."""
    head = {"version": WHOLE_VERSION, "kind": work.kind, "things": work.things, "stuff": work.stuff}
    digest = hashlib.sha256(
        json.dumps({**head, "panoptic": work.settings.panoptic, "uncovered": work.settings.uncovered}).encode()
    )
    with ThreadPoolExecutor(4) as pool:
        for split in SPLITS:
            images = work.images(split)
            annotations = work.sources.annotations(split)
            digest.update((sha256(annotations) if annotations.is_file() else "").encode())
            paths = [work.path(split, image) for image in images]
            paths += [Path(image.labels) for image in images if image.labels]
            for done, checksum in enumerate(pool.map(_checksum, paths), start=1):
                digest.update(checksum.encode())
                if progress:
                    progress(done)
    return digest.hexdigest()


def _checksum(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; --images is the folder that file names begin in"
        ) from None


def tiles_fingerprint(whole: str, settings: Settings) -> str:
    """The identity of the tiles."""
    of = {"of": whole, "version": TILES_VERSION, **_cut(settings)}
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()


def _cut(settings: Settings) -> dict[str, int]:
    """What the tiles depend on beside the set."""
    return {key: getattr(settings, key) for key in ("crop", "resize", "min_pixels", "max_objects", "mini_images")}


def build_whole(registered: Registration, data_root: Path, progress: Progress | None, workers: int | None) -> Path:
    """Write the labels of the whole images, unless they are there; returns the directory."""
    work = work_of(registered)
    counts = {split: len(work.images(split)) for split in SPLITS}
    images = {split: work.sources.folder(split) for split in SPLITS}
    parameters = {"version": WHOLE_VERSION, "crop": 0}
    made = partial(whole_chunk, work)
    recipe = Recipe(registered.name, registered.fingerprint, parameters, counts, made, images)
    return build(recipe, data_root, progress, workers)


def build_tiles(registered: Registration, data_root: Path, progress: Progress | None, workers: int | None) -> Path:
    """Cut the tiles, unless they are there; returns the directory."""
    work = work_of(registered)
    counts = {split: len(chosen_images(len(work.images(split)), work.settings, split)) for split in SPLITS}
    parameters = {"version": TILES_VERSION, **_cut(work.settings)}
    recipe = Recipe(registered.name, registered.tiles, parameters, counts, partial(tiles_chunk, work))
    return build(recipe, data_root, progress, workers)


def _prepare(
    name: str, dataset: DatasetConfig, data_root: Path, _: Path | None, progress: Progress | None, workers: int | None
) -> Path:
    """Write again what a registration says, from the files that it was made of."""
    registered = registration.load(name, data_root)
    make = build_whole if dataset.crop is None else build_tiles
    return make(registered, data_root, progress, workers)


def source(name: str) -> Prepared:
    """Who reads and makes the files of a set of the user's own."""
    command = "mpformer data add"
    return Prepared(
        partial(read_prepared, name, command=command),
        partial(_prepare, name),
        f"{command} {name} …",
        current=registration.fingerprint,
    )


SOURCE = source
