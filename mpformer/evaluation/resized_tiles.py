"""Masks at the image's original size, a tile at a time: what inference resizes whole, without the whole ever existing.

Inference resizes mask logits bilinearly to the padded input, cuts the padding off and resizes the rest to the original
image; for semantics alone it makes class maps between the two. Both steps are linear along rows and columns, so that a
tile of the result is two small products with the few cells under it; the numbers differ from
:func:`mpformer.modeling.inference.crop_and_resize`'s in the last bits alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]

#: rows and columns of a tile: on a CPU what stays in the cache, elsewhere what keeps the device busy
_SIDES = {"cpu": (32, 96)}
_LARGE = (256, 512)


@dataclass(frozen=True)
class Tile:
    """A rectangle of the resized masks and the cells that it is interpolated from."""

    rows: slice
    columns: slice
    source_rows: slice
    source_columns: slice
    down: Tensor
    """(r, a) weights of the a source rows for r rows."""
    across: Tensor
    """(b, c) weights of the b source columns for c columns."""
    late: tuple[Tensor, Tensor] | None = None
    """The second step's weights (R, r) and (c, C), where something is done between the steps; None: all is one step."""

    def source(self, masks: Tensor) -> Tensor:
        """The cells (N, a, b) of masks (N, h, w) that the tile depends on."""
        return masks[:, self.source_rows, self.source_columns]

    def resized(self, source: Tensor) -> Tensor:
        """(N, r · c) values from the tile's cells (N, a, b): of the tile, or what its second step needs."""
        return (self.down @ (source @ self.across)).flatten(1)

    def resized_again(self, maps: Tensor) -> Tensor:
        """(..., R · C) values of the tile from (..., r · c) of the first step."""
        if self.late is None:
            return maps
        down, across = self.late
        return (down @ maps.unflatten(-1, (down.shape[1], across.shape[0])) @ across).flatten(-2)


@lru_cache(maxsize=64)
def tiles(
    cells: Size, padded: Size, size: Size, output: Size, device: torch.device, late: bool = False
) -> tuple[Tile, ...]:
    """The tiles that make up masks at ``output``, by rows.

    ``cells`` (h, w) are those of the mask logits, ``padded`` the network's input size, ``size`` the image's part of it;
    ``late`` leaves the second step for later.
    """
    late = late and size != output
    axes = zip(cells, padded, size, output, _SIDES.get(device.type, _LARGE), strict=True)
    rows, columns = ([_moved(block, device) for block in _blocks(*axis, late)] for axis in axes)
    return tuple(
        Tile(a.outputs, b.outputs, a.sources, b.sources, a.weights, b.weights.T.contiguous(), _late(a, b))
        for a in rows
        for b in columns
    )


@dataclass(frozen=True)
class _Block:
    """A run of outputs along one axis: the weights (r, a) of the sources and, if there is one, the second step's."""

    outputs: slice
    sources: slice
    weights: Tensor
    second: Tensor | None


def _blocks(cells: int, padded: int, size: int, output: int, side: int, late: bool) -> Iterator[_Block]:
    first = _resized(torch.eye(cells), padded)[:size]
    second = _resized(torch.eye(size), output)
    whole = _resized(first, output)
    for start in range(0, output, side):
        block = slice(start, min(start + side, output))
        if late:
            between = _used(second[block])
            sources = _used(first[between])
            yield _Block(block, sources, first[between, sources], second[block, between])
        else:
            sources = _used(whole[block])
            yield _Block(block, sources, whole[block, sources], None)


def _resized(columns: Tensor, size: int) -> Tensor:
    """(n, k) values along one axis, k of them side by side, resized to (size, k)."""
    return F.interpolate(columns.T[None], size=size, mode="linear", align_corners=False)[0].T


def _used(weights: Tensor) -> slice:
    """The sources that have a weight in any row."""
    used = weights.any(0).nonzero().flatten()
    return slice(int(used[0]), int(used[-1]) + 1)


def _moved(block: _Block, device: torch.device) -> _Block:
    second = None if block.second is None else block.second.contiguous().to(device)
    return replace(block, weights=block.weights.contiguous().to(device), second=second)


def _late(rows: _Block, columns: _Block) -> tuple[Tensor, Tensor] | None:
    if rows.second is None or columns.second is None:
        return None
    return rows.second, columns.second.T.contiguous()
