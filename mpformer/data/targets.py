"""From a record of the catalog to the pixels: images, and one mask per object, segment or class.

An instance target has a mask per non-crowd object, a panoptic one a mask per non-crowd segment, a semantic one a mask
per class in the image (as Mask2Former trains all three). Masks without a pixel are left out. No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mpformer.data.coco_layout import rgb_to_id

IGNORE_LABEL = 255
Pixels = NDArray[np.uint8]
Masks = NDArray[np.bool_]


class CorruptImage(Exception):
    """An image or label file that cannot be read or does not fit its annotations."""


@dataclass(frozen=True)
class SegmentMap:
    """Labels as one map: ids (H, W) integers, and the (id, class) pairs that are targets; the rest is not labelled."""

    ids: NDArray[Any]
    pairs: tuple[tuple[int, int], ...]

    def masks(self) -> tuple[NDArray[np.int64], Masks]:
        """Classes (n,) and masks (n, H, W) of the pairs that have pixels."""
        wanted = np.array([i for i, _ in self.pairs], dtype=self.ids.dtype)
        return _with_pixels(np.array([c for _, c in self.pairs], dtype=np.int64), self.ids == wanted[:, None, None])

    def classes(self) -> NDArray[np.uint8]:
        """(H, W) class per pixel, IGNORE_LABEL where nothing is labelled."""
        largest = max([int(self.ids.max(initial=0)), *(i for i, _ in self.pairs)])
        lookup = np.full(largest + 1, IGNORE_LABEL, dtype=np.uint8)
        for segment, category in self.pairs:
            lookup[segment] = category
        return lookup[self.ids.astype(np.int64, copy=False)]


@dataclass(frozen=True)
class Objects:
    """Labels as separate objects in an image of size (height, width): COCO polygons or RLE per object."""

    height: int
    width: int
    pairs: tuple[tuple[Any, int], ...]

    def masks(self) -> tuple[NDArray[np.int64], Masks]:
        """Classes (n,) and masks (n, H, W) of the objects that have pixels."""
        from pycocotools import mask as coco

        classes = np.array([c for _, c in self.pairs], dtype=np.int64)
        if not self.pairs:
            return classes, np.zeros((0, self.height, self.width), dtype=bool)
        decoded = coco.decode([to_rle(s, self.height, self.width) for s, _ in self.pairs])
        return _with_pixels(classes, decoded.view(bool).transpose(2, 0, 1))

    def classes(self) -> NDArray[np.uint8]:
        """(H, W) class per pixel, IGNORE_LABEL where no object is; a later object covers an earlier one."""
        result = np.full((self.height, self.width), IGNORE_LABEL, dtype=np.uint8)
        for category, mask in zip(*self.masks(), strict=True):
            result[mask] = category
        return result


Labels = SegmentMap | Objects


def _with_pixels(classes: NDArray[np.int64], masks: Masks) -> tuple[NDArray[np.int64], Masks]:
    kept = masks.any(axis=(1, 2))
    return (classes, masks) if kept.all() else (classes[kept], masks[kept])


def decode_segmentation(segmentation: Any, height: int, width: int) -> Masks:
    """Polygons or RLE as an (H, W) mask; raises CorruptImage if an RLE is of another size."""
    from pycocotools import mask as coco

    return coco.decode(to_rle(segmentation, height, width)).astype(bool)


def to_rle(segmentation: Any, height: int, width: int) -> Any:
    """Polygons or RLE (compressed or not) as pycocotools' compressed RLE; raises CorruptImage for another size."""
    from pycocotools import mask as coco

    if isinstance(segmentation, list):
        return coco.merge(coco.frPyObjects(segmentation, height, width))
    if tuple(segmentation["size"]) != (height, width):
        raise CorruptImage(f"a mask of size {tuple(segmentation['size'])} in an image of {(height, width)}")
    if isinstance(segmentation["counts"], list):
        return coco.frPyObjects(segmentation, height, width)
    return segmentation


def read_image(record: Mapping[str, Any]) -> Pixels:
    """The image (H, W, 3) uint8 RGB: grey is repeated, alpha dropped, 16 bit scaled to 8, EXIF rotation applied.

    Raises CorruptImage if the file cannot be read whole or its size is not the annotations'.
    """
    pixels = _open(record["file_name"], "image")
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    size = (record.get("height"), record.get("width"))
    if None not in size and pixels.shape[:2] != size:
        raise CorruptImage(f"{record['file_name']} is {pixels.shape[:2]}, its annotations say {size}")
    return pixels


def _open(path: str, kind: str) -> Pixels:
    try:
        with Image.open(path) as file:
            if kind == "labels":
                return np.asarray(file)
            if file.mode.startswith("I;16") or file.mode == "I":
                return (np.asarray(file).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise CorruptImage(f"{path} cannot be read: {error}") from None


def read_segment_ids(record: Mapping[str, Any]) -> NDArray[Any]:
    """The panoptic id map (H, W) of a record, as bytes if that suffices; raises CorruptImage."""
    ids = rgb_to_id(_label_map(record, "pan_seg_file_name", 3, "an RGB panoptic map"))
    return ids.astype(np.uint8) if ids.max(initial=0) < 256 else ids


def read_semantic(record: Mapping[str, Any]) -> NDArray[np.uint8]:
    """The semantic map (H, W) of a record: contiguous classes, 255 ignored; raises CorruptImage."""
    return _label_map(record, "sem_seg_file_name", 2, "a single-channel label map")


def _label_map(record: Mapping[str, Any], key: str, dimensions: int, kind: str) -> Pixels:
    pixels = _open(record[key], "labels")
    if pixels.ndim != dimensions:
        raise CorruptImage(f"{record[key]} is not {kind}")
    if pixels.shape[:2] != (record["height"], record["width"]):
        raise CorruptImage(
            f"{record[key]} has labels {pixels.shape[:2]} for an image {record['height'], record['width']}"
        )
    return pixels


def read_labels(record: Mapping[str, Any], task: str, num_classes: int) -> Labels:
    """The targets of a record (with its size) for a task.

    Raises CorruptImage for files that are broken, of another size than the image, or name unknown classes.
    """
    if task == "instance":
        annotations = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
        pairs = tuple((a["segmentation"], a["category_id"]) for a in annotations if a.get("segmentation"))
        return Objects(record["height"], record["width"], pairs)
    if task == "panoptic":
        return panoptic_labels(record)
    classes = read_semantic(record)
    present = np.flatnonzero(np.bincount(classes.ravel(), minlength=IGNORE_LABEL + 1)[:IGNORE_LABEL])
    if len(present) and present[-1] >= num_classes:
        file = record["sem_seg_file_name"]
        raise CorruptImage(f"{file} holds class {present[-1]}; valid: 0-{num_classes - 1} and 255")
    return SegmentMap(classes, tuple((int(c), int(c)) for c in present))


def panoptic_labels(record: Mapping[str, Any]) -> SegmentMap:
    """The non-crowd segments of a record."""
    ids = read_segment_ids(record)
    # an id that the map's own type cannot hold has no pixel
    pairs = [(s["id"], s["category_id"]) for s in record["segments_info"] if not s["iscrowd"]]
    return SegmentMap(ids, tuple((i, c) for i, c in pairs if i <= np.iinfo(ids.dtype).max))
