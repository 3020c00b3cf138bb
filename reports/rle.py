"""COCO's compressed run-length strings, read with numpy alone (the page's reader: ``templates/explorer.js``)."""

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def counts(text: str) -> list[int]:
    """Run lengths of a compressed string: background first, column-major, as pycocotools writes them."""
    runs: list[int] = []
    value = shift = 0
    for char in text.encode("ascii"):
        bits = char - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def decode(text: str, height: int, width: int) -> Mask:
    """The (height, width) mask of a compressed string; raises ValueError where its size is another."""
    runs = counts(text)
    if sum(runs) != height * width:
        raise ValueError(f"run lengths cover {sum(runs)} cells, the mask has {height} x {width}")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


def mask_of(rle: object, height: int, width: int) -> Mask:
    """The mask of an RLE given as string or as COCO's ``{"counts", "size"}``; (height, width) is used for a string."""
    if isinstance(rle, dict):
        height, width = rle.get("size", (height, width))
        rle = rle["counts"]
    return decode(str(rle), height, width)


def iou(a: Mask, b: Mask) -> float:
    """Intersection over union of two equally sized masks; NaN where both are empty."""
    union = int(np.logical_or(a, b).sum())
    return float(np.logical_and(a, b).sum() / union) if union else float("nan")
