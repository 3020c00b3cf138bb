"""Real images: the 2018 Data Science Bowl's stage-1 set (BBBC038, CC0), from its public layout. No torch.

The source is ``stage1_train/<id>/images/<id>.png`` and ``stage1_train/<id>/masks/*.png`` (one file per nucleus), as a
directory or as the .zip or .tar.* it came in. Each image is cut into non-overlapping square tiles (a remainder at the
right and bottom is left out), tiles without a nucleus are dropped, and pieces of fewer than MIN_PIXELS pixels, which
the cut leaves at borders, become void.

The split is by image: an image goes to val if the sha256 of its id falls into the lowest fifth, so all tiles of an
image are on the same side and no image's side depends on the others. Images of one acquisition share their
appearance, though, and the public layout does not say which belong together: some of that leaks from train to val.
"""

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mpformer.data.scene import Scene, Segment
from mpformer.runtime.errors import UserError

CONVERTER_VERSION = 1
MIN_PIXELS = 10
VAL_SHARE = 0.2
DEFAULT_CROP = 128
WHERE = "stage1_train of the 2018 Data Science Bowl (BBBC038, https://bbbc.broadinstitute.org/BBBC038, CC0)"


@dataclass
class SourceImage:
    """The files of one source image, undecoded: PNG bytes."""

    id: str
    image: bytes = b""
    masks: dict[str, bytes] = field(default_factory=dict)

    @property
    def split(self) -> str:
        return "val" if int(hashlib.sha256(self.id.encode()).hexdigest()[:8], 16) < VAL_SHARE * 2**32 else "train"


@dataclass(frozen=True)
class Tile:
    """One tile: the source image, the tile's corner (x, y), and its scene."""

    source: str
    corner: tuple[int, int]
    scene: Scene


def read_source(source: Path) -> list[SourceImage]:
    """Read the public layout, sorted by id.

    Raises UserError if the source is not there, is not of this layout, or lacks an image or its masks.
    """
    images: dict[str, SourceImage] = {}
    for path, content in _files(source):
        _collect(images, PurePosixPath(path), content)
    if not images:
        raise UserError(f"{source} holds no <id>/images/<id>.png with <id>/masks/*.png; expected {WHERE}")
    for item in images.values():
        if not item.image or not item.masks:
            lacks = "image" if not item.image else "masks"
            raise UserError(f"{source} is incomplete: {item.id} has no {lacks}; extract or download it again")
    return [images[key] for key in sorted(images)]


def _collect(images: dict[str, SourceImage], path: PurePosixPath, content: bytes) -> None:
    if path.suffix.lower() != ".png" or len(path.parts) < 3 or path.parts[-2] not in ("images", "masks"):
        return
    item = images.setdefault(path.parts[-3], SourceImage(path.parts[-3]))
    if path.parts[-2] == "images":
        item.image = content
    else:
        item.masks[path.name] = content


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    try:
        if source.is_dir():
            yield from ((str(p.relative_to(source.parent)), p.read_bytes()) for p in sorted(source.rglob("*.png")))
        elif zipfile.is_zipfile(source):
            yield from _zip_files(source)
        elif source.is_file():
            yield from _tar_files(source)
        else:
            raise UserError(f"{source} does not exist; give the directory or archive of {WHERE}")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read {source}: {reason}; download it again: {WHERE}") from None


def _zip_files(source: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            if name.endswith(".png"):
                yield name, archive.read(name)


def _tar_files(source: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(source) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name, file.read()


def fingerprint(images: Iterable[SourceImage], crop: int) -> str:
    """The identity of the converted dataset: sha256 of the source files' checksums and the parameters."""
    digest = hashlib.sha256(json.dumps({"name": "nuclei", **parameters(crop)}, sort_keys=True).encode())
    for item in images:
        digest.update(f"{item.id} {hashlib.sha256(item.image).hexdigest()}\n".encode())
        for name, content in sorted(item.masks.items()):
            digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def parameters(crop: int) -> dict[str, object]:
    """What the converted dataset depends on beside the source files."""
    return {"version": CONVERTER_VERSION, "crop": crop, "min_pixels": MIN_PIXELS, "val_share": VAL_SHARE}


def tiles(item: SourceImage, crop: int) -> list[Tile]:
    """Cut one image into tiles (crop, crop) and drop those without a nucleus.

    Raises UserError for a file that is not an image, or a mask of another size.
    """
    image = _decode(item.id, item.image, "RGB")
    ids = _label(item, image.shape[:2])
    result = []
    for y in range(0, image.shape[0] - crop + 1, crop):
        for x in range(0, image.shape[1] - crop + 1, crop):
            window = (slice(y, y + crop), slice(x, x + crop))
            scene = _scene(image[window], ids[window])
            if scene.segments:
                result.append(Tile(item.id, (x, y), scene))
    return result


def _label(item: SourceImage, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """(H, W) nucleus numbers, 0 for background; where masks overlap the later file name wins."""
    ids = np.zeros(shape, dtype=np.int32)
    for number, (name, content) in enumerate(sorted(item.masks.items()), start=1):
        mask = _decode(f"{item.id}/masks/{name}", content, "L")
        if mask.shape != shape:
            raise UserError(
                f"mask {item.id}/masks/{name} is {mask.shape}, its image {shape}; download it again: {WHERE}"
            )
        ids[mask > 127] = number
    return ids


def _decode(name: str, content: bytes, mode: str) -> NDArray[np.uint8]:
    try:
        return np.asarray(Image.open(io.BytesIO(content)).convert(mode))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{name} is not a readable PNG ({error}); download it again: {WHERE}") from None


def _scene(image: NDArray[np.uint8], ids: NDArray[np.int32]) -> Scene:
    numbers, areas = np.unique(ids, return_counts=True)
    segments: list[Segment] = []
    hidden = []
    renumbered = np.zeros_like(ids)
    for number, area in zip(numbers, areas, strict=True):
        if number == 0:
            continue
        mask = ids == number
        if area < MIN_PIXELS:
            hidden.append((0, mask))
            continue
        segments.append(Segment(len(segments) + 1, 0, True))
        renumbered[mask] = len(segments)
    return Scene(np.ascontiguousarray(image), renumbered, tuple(segments), tuple(hidden))
