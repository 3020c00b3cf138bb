"""One labelled image, as the sets that this project makes hold it. No torch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Segment:
    """One labelled region of an image: its id in the id map and its contiguous class (things, then stuff)."""

    id: int
    category: int
    thing: bool
    crowd: bool = False


@dataclass(frozen=True)
class Thing:
    """One object where objects overlap, so that the id map cannot hold them whole: contiguous class, mask (H, W)."""

    category: int
    mask: NDArray[np.bool_]
    crowd: bool = False


@dataclass(frozen=True)
class Scene:
    """One image with its ground truth.

    image: (H, W, 3) uint8 RGB. ids: (H, W) int32, 0 is void. hidden: class and visible pixels (H, W) of objects that
    became void because too little of them can be seen. objects: None if the things of the id map are the objects.
    """

    image: NDArray[np.uint8]
    ids: NDArray[np.int32]
    segments: tuple[Segment, ...]
    hidden: tuple[tuple[int, NDArray[np.bool_]], ...] = ()
    objects: tuple[Thing, ...] | None = None
