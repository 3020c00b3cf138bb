"""What real exports get wrong: looks through a set of the user's own, file by file and image by image. No torch."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mpformer.data.own.annotations import OwnImage, OwnSplit, read_split
from mpformer.data.own.registration import Sources

SPLITS = ("train", "val")
_SHOWN = 3
ALIKE = 24
"""Bits of 256, at most, in which the perceptual hashes of one photo's two files differ. Of 144 real photographs, each
made smaller, brighter and compressed again, none differed in more than 14; of 54,144 pairs of different ones none in
fewer than 54."""
_FLAT = 4.0
"""Standard deviation of the grey values (0 to 255) below which a picture has nothing to be known by."""
_THREADS = 4
_GRID = 32
_COSINES = np.cos(np.pi * np.outer(np.arange(16), 2 * np.arange(_GRID) + 1) / (2 * _GRID))
"""Rows of the discrete cosine transform of 32 numbers: the 16 lowest frequencies."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Finding:
    """One thing that was found: of which file, and whether the set cannot be used before it is mended."""

    where: str
    text: str
    wrong: bool = False


def look(sources: Sources, classes: tuple[str, ...] = (), progress: Progress | None = None) -> list[Finding]:
    """Look through annotation files and images of both splits; worst first.

    Raises UserError for annotation files that cannot be read at all.
    """
    splits = {name: read_split(sources, name, classes) for name in SPLITS}
    total = sum(len(split.images) for split in splits.values())
    seen: dict[str, list[Seen]] = {}
    done = 0
    for name, split in splits.items():
        before = done
        report = (lambda n, start=before: progress(start + n, total)) if progress else None
        seen[name] = look_at(sources.folder(name), split.images, report)
        done += len(split.images)
    found = [f for name, split in splits.items() for f in _of_split(name, split, sources, seen[name])]
    found += _unused(splits)
    found += _same_photos(sources, splits, seen)
    return sorted(found, key=lambda finding: not finding.wrong)


def _listed(what: str, items: Sequence[object]) -> str:
    """``3 images … (a, b, c)``, shortened."""
    shown = ", ".join(map(str, items[:_SHOWN])) + (", …" if len(items) > _SHOWN else "")
    return f"{len(items):,} {what}: {shown}"


def _of_split(name: str, split: OwnSplit, sources: Sources, seen: "Sequence[Seen]") -> Iterator[Finding]:
    where = sources.annotations(name).name
    if split.kind != "semantic":
        yield from _categories(where, _content(sources.annotations(name)))
        yield from _twice(where, split)
    if split.kind == "instance":
        yield from _outlines(where, split)
    yield from _files(where, sources.folder(name), split.images, seen)
    empty = [image.file for image in split.images if not image.marks]
    if empty and split.kind != "semantic":
        yield Finding(where, _listed("images without an annotation", empty))


def _content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


# --- annotation files ---------------------------------------------------------------------------------------------


def _categories(where: str, content: Mapping[str, Any]) -> Iterator[Finding]:
    categories = content["categories"]
    names = Counter(str(c["name"]).strip() for c in categories)
    ids = Counter(c["id"] for c in categories)
    if several := [name for name, count in names.items() if count > 1]:
        yield Finding(where, _listed("categories stand several times and count as one", several))
    if several_ids := [number for number, count in ids.items() if count > 1]:
        yield Finding(where, _listed("category ids mean several things", several_ids), wrong=True)
    if 0 in ids:
        yield Finding(where, "category ids count from 0: fine here, but many readers take 0 for background")
    by_id = Counter(a["id"] for a in content["annotations"] if "id" in a)
    if repeated := [number for number, count in by_id.items() if count > 1]:
        yield Finding(where, _listed("annotation ids stand several times; they are counted anew", repeated))
    images = Counter(image["id"] for image in content["images"])
    if doubled := [number for number, count in images.items() if count > 1]:
        yield Finding(where, _listed("image ids stand several times", doubled), wrong=True)


def _unused(splits: Mapping[str, OwnSplit]) -> Iterator[Finding]:
    used = {s.names.get(mark["category_id"]) for s in splits.values() for image in s.images for mark in image.marks}
    for name, split in splits.items():
        unused = [text for text in dict.fromkeys(split.names.values()) if text not in used]
        if unused and split.kind != "semantic":
            yield Finding(name, _listed("categories that nothing is of are left out", unused))


def _twice(where: str, split: OwnSplit) -> Iterator[Finding]:
    files = Counter(image.file for image in split.images)
    if several := [file for file, count in files.items() if count > 1]:
        yield Finding(where, _listed("images stand several times", several), wrong=True)


def _outlines(where: str, split: OwnSplit) -> Iterator[Finding]:
    """Degenerate outlines, masks of another size, boxes that leave their image."""
    degenerate, parts, sizes, outside = [], [], [], []
    for image in split.images:
        for mark in image.marks:
            label = f"{mark.get('id')} in {image.file}"
            outline = mark.get("segmentation")
            if isinstance(outline, dict):
                if list(outline.get("size", ())) != [image.height, image.width]:
                    sizes.append(label)
            elif not any(map(_is_ring, outline or ())):
                degenerate.append(label)
            elif not all(map(_is_ring, outline or ())):
                parts.append(label)
            if _outside(mark.get("bbox"), image):
                outside.append(label)
    if degenerate:
        yield Finding(where, _listed("annotations have no outline, or one without area, and are left out", degenerate))
    if parts:
        yield Finding(where, _listed("annotations have parts without area", parts))
    if sizes:
        yield Finding(where, _listed("masks have another size than their image", sizes), wrong=True)
    if outside:
        yield Finding(where, _listed("boxes are empty or leave their image (they are taken from the masks)", outside))


def _is_ring(ring: Sequence[float]) -> bool:
    """Whether it is a polygon: pairs of numbers, three corners or more, and an area of half a pixel."""
    return len(ring) >= 6 and len(ring) % 2 == 0 and _area(ring) >= 0.5


def _area(ring: Sequence[float]) -> float:
    """Of a polygon, by the shoelace formula."""
    points = np.asarray(ring, dtype=np.float64).reshape(-1, 2)
    x, y = points[:, 0], points[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _outside(box: Any, image: OwnImage) -> bool:
    if box is None:
        return False
    if len(box) != 4 or not np.isfinite(box).all():
        return True
    x, y, w, h = box
    return bool(min(w, h) <= 0 or min(x, y) < -1 or x + w > image.width + 1 or y + h > image.height + 1)


# --- images -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What an image file is: size (height, width) and perceptual hash (4 × 64 bits), or why it does not open."""

    size: tuple[int, int] | None = None
    hash: NDArray[np.uint64] | None = None
    """None for a picture that is all of one colour."""
    problem: str = ""


def look_at(folder: Path, images: Sequence[OwnImage], progress: Callable[[int], None] | None = None) -> list[Seen]:
    """Open every image."""
    seen = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for done, one in enumerate(pool.map(lambda image: _seen(folder / image.file), images), start=1):
            seen.append(one)
            if progress:
                progress(done)
    return seen


def _seen(path: Path) -> Seen:
    try:
        with Image.open(path) as file:
            turned = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            size = file.size if turned else file.size[::-1]
            file.draft("L", (64, 64))  # a JPEG is decoded at an eighth of its size
            return Seen((size[0], size[1]), perceptual_hash(ImageOps.exif_transpose(file).convert("L")))
    except FileNotFoundError:
        return Seen(problem="missing")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        return Seen(problem=f"does not open ({error})")


def perceptual_hash(grey: Image.Image) -> NDArray[np.uint64] | None:
    """256 bits, as 4 × uint64: which of the 16 × 16 lowest frequencies of the picture (at 32 × 32 pixels) are above the
    median (a DCT hash; C. Zauner, 2010). The mean brightness counts as below. None for a picture without contrast.
    """
    small = np.asarray(grey.resize((_GRID, _GRID), Image.Resampling.BOX), dtype=np.float64)
    if small.std() < _FLAT:
        return None
    frequencies = _COSINES @ small @ _COSINES.T
    frequencies[0, 0] = -np.inf
    return np.packbits(frequencies > np.median(frequencies)).view(np.uint64)


def _files(where: str, folder: Path, images: Sequence[OwnImage], seen: Sequence[Seen]) -> Iterator[Finding]:
    missing = [image.file for image, one in zip(images, seen, strict=True) if one.problem == "missing"]
    moved = _moved(folder, missing)
    if moved:
        text = [f"{name} is at {found}" for name, found in moved.items()]
        yield Finding(where, _listed("images are elsewhere below --images", text), wrong=True)
    if gone := [name for name in missing if name not in moved]:
        yield Finding(where, _listed(f"images are not in {folder}", gone), wrong=True)
    broken = [f"{i.file} {s.problem}" for i, s in zip(images, seen, strict=True) if s.problem not in ("", "missing")]
    if broken:
        yield Finding(where, _listed("images cannot be read", broken), wrong=True)
    other = [
        f"{image.file} is {one.size[1]} x {one.size[0]}, annotated as {image.width} x {image.height}"
        for image, one in zip(images, seen, strict=True)
        if one.size is not None and one.size != (image.height, image.width)
    ]
    if other:
        yield Finding(where, _listed("images have another size", other), wrong=True)


def _moved(folder: Path, missing: Iterable[str]) -> dict[str, str]:
    """Where files of the names of missing ones lie below the folder, if there is exactly one."""
    wanted = {Path(name).name: name for name in missing}
    if not wanted or not folder.is_dir():
        return {}
    places: dict[str, list[str]] = {}
    for path in folder.rglob("*"):
        if path.name in wanted:
            places.setdefault(path.name, []).append(str(path.relative_to(folder)))
    return {wanted[name]: found[0] for name, found in places.items() if len(found) == 1}


# --- the same photo on both sides ---------------------------------------------------------------------------------

_EXPORTED = re.compile(r"\.rf\.[0-9a-f]+$", re.IGNORECASE)
"""What Roboflow appends to a name."""
_DERIVED = re.compile(
    r"(?:_(?:jpe?g|png|bmp|tiff?))?$"  # a suffix that an export has made part of the name
    r"|[ _-]*(?:copy|crop(?:ped)?|tile|patch|aug(?:mented)?|flip(?:ped)?|rot(?:ated)?|scaled|resized)(?:[ _-].*|\d*)$"
    r"|[ _-]*\(\d+\)$",
    re.IGNORECASE,
)
"""What tools append to the name of a photo that they make several images of."""


def photo_of(file: str) -> str:
    """The name of the photo that an image was made of, as far as its name shows."""
    stem = _EXPORTED.sub("", Path(file).stem)
    while (shorter := _DERIVED.sub("", stem, count=1)) != stem and shorter:
        stem = shorter
    return stem


def _same_photos(
    sources: Sources, splits: Mapping[str, OwnSplit], seen: Mapping[str, Sequence[Seen]]
) -> Iterator[Finding]:
    train, val = ([image.file for image in splits[name].images] for name in SPLITS)
    both = "train and val"
    if pairs := list(_by_name(sources, train, val)):
        yield Finding(both, _listed("pairs of images are of one photo by their names", pairs))
    named = set(pairs)
    alike = [f"{train[i]} and {val[j]}" for i, j in alike_pairs(*(seen[name] for name in SPLITS))]
    if looks := [pair for pair in alike if pair not in named]:
        yield Finding(both, _listed("pairs of images look the same", looks))


def _by_name(sources: Sources, train: Sequence[str], val: Sequence[str]) -> Iterator[str]:
    """Pairs whose names differ in what tools append only, or that are one file."""
    one_folder = sources.folder("train") == sources.folder("val")
    photos: dict[str, list[str]] = {}
    for file in train:
        photos.setdefault(photo_of(file), []).append(file)
    for file in val:
        for other in photos.get(photo_of(file), ()):
            derived = photo_of(file) != Path(file).stem or photo_of(other) != Path(other).stem
            if derived or (one_folder and file == other):
                yield f"{other} and {file}"


def alike_pairs(train: Sequence[Seen], val: Sequence[Seen]) -> Iterator[tuple[int, int]]:
    """Indices of training and validation images whose perceptual hashes agree but for 24 of 256 bits."""
    indices = [i for i, one in enumerate(train) if one.hash is not None]
    if not indices:
        return
    hashes = np.stack([train[i].hash for i in indices])  # type: ignore[misc]
    for j, one in enumerate(val):
        if one.hash is not None:
            different = np.bitwise_count(hashes ^ one.hash).sum(axis=1)
            yield from ((indices[k], j) for k in np.flatnonzero(different <= ALIKE).tolist())
