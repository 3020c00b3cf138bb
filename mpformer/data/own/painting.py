"""From annotations that may overlap to masks, and to one map in which every pixel belongs to one segment. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpformer.data.scene import Segment, Thing

Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class Painted:
    """A map of segment ids (H, W), 0 is void, with its segments."""

    ids: NDArray[np.int32]
    segments: tuple[Segment, ...]


def mask_of(segmentation: Any, size: tuple[int, int], out: tuple[int, int]) -> Masks:
    """A COCO segmentation of an image of ``size`` (height, width) as a mask of size ``out``: polygons are scaled
    exactly, RLE by nearest neighbour. A mask without a polygon of three corners is empty.

    Raises ValueError if an RLE is of another size than its image.
    """
    from pycocotools import mask as coco

    if isinstance(segmentation, list):
        scale = np.array([out[1] / size[1], out[0] / size[0]])
        rings = [np.asarray(ring, dtype=np.float64) for ring in segmentation if len(ring) >= 6 and len(ring) % 2 == 0]
        if not rings:
            return np.zeros(out, dtype=bool)
        scaled = [(ring.reshape(-1, 2) * scale).ravel().tolist() for ring in rings]
        return np.asarray(coco.decode(coco.merge(coco.frPyObjects(scaled, *out)))).astype(bool)
    if tuple(segmentation["size"]) != size:
        raise ValueError(f"a mask of size {tuple(segmentation['size'])} in an image of {size}")
    packed = coco.frPyObjects(segmentation, *size) if isinstance(segmentation["counts"], list) else segmentation
    return resized(np.asarray(coco.decode(packed)), out).astype(bool)


def resized(labels: NDArray[Any], out: tuple[int, int]) -> NDArray[Any]:
    """A label map (H, W) at size ``out`` (height, width) by nearest neighbour."""
    if labels.shape == out:
        return labels
    plain = labels.astype(np.int32) if labels.dtype.itemsize > 1 else labels
    return np.asarray(Image.fromarray(plain).resize((out[1], out[0]), Image.Resampling.NEAREST))


def paint(objects: Sequence[Thing], is_thing: Sequence[bool], uncovered: int | None = None) -> Painted:
    """Paint objects (of things and of stuff) into one map, large before small; regions of one stuff class are one.

    What nothing covers is void, or a segment of the class ``uncovered``. Of two objects of one size the later one
    lies on top. Objects of which nothing is left are left out.
    """
    owner = np.full(objects[0].mask.shape, -1, dtype=np.int32)
    areas = [int(thing.mask.sum()) for thing in objects]
    for index in sorted(range(len(objects)), key=lambda i: -areas[i]):
        owner[objects[index].mask] = index
    keys: list[tuple[int, bool]] = []
    lookup = np.zeros(len(objects) + 1, dtype=np.int32)  # the last entry is that of -1
    segments: list[Segment] = []
    for index in np.unique(owner[owner >= 0]).tolist():
        thing = objects[index]
        stuff = not is_thing[thing.category] or thing.crowd
        key = (thing.category, thing.crowd)
        if stuff and key in keys:
            lookup[index] = segments[keys.index(key)].id
            continue
        keys.append(key if stuff else (-1, False))
        segments.append(Segment(len(segments) + 1, thing.category, is_thing[thing.category], thing.crowd))
        lookup[index] = len(segments)
    ids = lookup[owner]
    return Painted(*_covered(ids, segments, uncovered))


def _covered(
    ids: NDArray[np.int32], segments: list[Segment], uncovered: int | None
) -> tuple[NDArray[np.int32], tuple[Segment, ...]]:
    """Give what nothing covers to a class; if the image has a segment of it already, to that."""
    if uncovered is None or (ids > 0).all():
        return ids, tuple(segments)
    own = next((s for s in segments if s.category == uncovered), None)
    if own is None:
        own = Segment(len(segments) + 1, uncovered, False)
        segments = [*segments, own]
    return np.where(ids > 0, ids, own.id).astype(np.int32), tuple(segments)


def renumbered(
    ids: NDArray[np.int32], found: Iterable[Mapping[str, Any]], category: Mapping[Any, int], is_thing: Sequence[bool]
) -> Painted:
    """A panoptic PNG's ids as 1 … n, with the segments that have pixels; what no segment names is void."""
    result = np.zeros(ids.shape, dtype=np.int32)
    segments: list[Segment] = []
    for info in found:
        mask = ids == info["id"]
        if mask.any():
            index = category[info["category_id"]]
            segments.append(Segment(len(segments) + 1, index, is_thing[index], bool(info.get("iscrowd", 0))))
            result[mask] = len(segments)
    return Painted(result, tuple(segments))


def of_classes(classes: NDArray[Any], count: int) -> Painted:
    """A semantic map as segments, one a class; values from ``count`` on are void."""
    present = [int(value) for value in np.unique(classes) if value < count]
    lookup = np.zeros(max(int(classes.max(initial=0)), count) + 1, dtype=np.int32)
    for number, value in enumerate(present, start=1):
        lookup[value] = number
    return Painted(lookup[classes], tuple(Segment(n, value, False) for n, value in enumerate(present, start=1)))
