"""Random points on masks: drawing, bilinear sampling, and the most uncertain ones (PointRend, section 3.1).

One set of points is drawn per image and shared by all its layers, queries and objects. Each loss term is then
still an average over uniformly drawn points, as in Mask2Former, while the sampling weights are worked out once
per image instead of once per layer and object.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_CACHED = 640 * 1024
"""Values of masks that a CPU's cache holds."""
_MEMORY_PARTS = 2048
"""A tensor that is worked on at a time takes one part of a GPU's memory: 40 MiB of 80 GiB."""
_TRIED = 2048
"""Values of a row that bound the smallest ones."""


@dataclass(frozen=True)
class PointSettings:
    """How many points a mask is judged at."""

    points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75

    @property
    def candidates(self) -> int:
        """Points among which the most uncertain ones are looked for."""
        return int(self.points * self.oversample_ratio)

    @property
    def uncertain(self) -> int:
        """Points taken for their uncertainty; the rest are uniform."""
        return int(self.points * self.importance_sample_ratio)


@dataclass(frozen=True)
class PointDraw:
    """The random points of one batch; x, y in [0, 1] over the padded image."""

    matching: Tensor | None
    """(1 or L+1, B, K, 2) points of the matching cost; None: the centres of all cells."""
    candidates: Tensor
    """(B, oversampled K, 2) among which each loss row takes its most uncertain ones."""
    uniform: Tensor
    """(B, K - uncertain, 2) taken by every loss row."""


@dataclass(frozen=True)
class FixedPoints:
    """Points given from outside, for comparisons: nothing is drawn and nothing is selected."""

    matching: Tensor
    """(1 or L+1, B, K, 2), layer 0 (bare queries) first."""
    loss: Tensor
    """(L+1, R, K, 2): rows image-major, then ascending matched query index."""
    pilot_loss: Tensor | None = None
    """(L+1, R', K, 2): rows image-major, then group, then object."""


Points = PointDraw | FixedPoints


def uniform(shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw from U[0, 1) on the generator's own device, so that every device sees the same numbers."""
    source = generator.device if generator is not None else device
    return torch.rand(tuple(shape), generator=generator, device=source).to(device)


def draw_points(
    settings: PointSettings,
    batch: int,
    cells: tuple[int, int],
    generator: torch.Generator | None,
    device: torch.device,
) -> PointDraw:
    """Draw the points of one batch whose masks have ``cells`` = (h, w).

    With no more cells than points the matching cost takes every cell once, which is exact and cheaper.
    """
    matching = None
    if cells[0] * cells[1] > settings.points:
        matching = uniform((1, batch, settings.points, 2), generator, device)
    candidates = uniform((batch, settings.candidates, 2), generator, device)
    rest = uniform((batch, settings.points - settings.uncertain, 2), generator, device)
    return PointDraw(matching, candidates, rest)


@lru_cache(maxsize=64)
def cell_centres(cells: tuple[int, int], device: torch.device) -> Tensor:
    """Return the centres (h*w, 2), x and y in [0, 1], of a grid of cells. Cached: callers must not write into it."""
    y = (torch.arange(cells[0], device=device) + 0.5) / cells[0]
    x = (torch.arange(cells[1], device=device) + 0.5) / cells[1]
    return torch.stack([x.expand(cells[0], -1), y[:, None].expand(-1, cells[1])], dim=-1).flatten(0, 1)


def values_at_once(device: torch.device, cached: int) -> int:
    """How many float32 values to work on at a time: ``cached`` on CPU, elsewhere a small part of the memory.

    Few enough that a handful of such tensors do not count, as many as that allows: every part costs its launches.
    """
    if device.type == "cpu":
        return cached
    return torch.get_device_module(device).get_device_properties(device).total_memory // (4 * _MEMORY_PARTS)


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Sample maps (N, C, H, W) bilinearly at points (N, K, 2); returns (N, C, K). Outside the map it is 0."""
    return F.grid_sample(maps, (2 * points - 1)[:, :, None], align_corners=False).squeeze(-1)


def sample_masks(masks: Tensor, points: Tensor) -> Tensor:
    """Sample bool masks (n, H, W) at points (K, 2); returns (n, K) float32. Few are float maps at a time."""
    at_once = max(1, values_at_once(masks.device, _CACHED) // (masks.shape[-2] * masks.shape[-1]))
    return torch.cat([sample(part[None].float(), points[None])[0] for part in masks.split(at_once)])


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (B, D, h, w) bilinearly; bool ones become float32.

    By an even factor down a cell is the mean of the four in its middle, which slices give fastest.
    """
    dtype = torch.float32 if maps.dtype == torch.bool else maps.dtype
    factor = maps.shape[-1] // size[1]
    if tuple(maps.shape[-2:]) == size:
        return maps.to(dtype)
    if factor % 2 or maps.shape[-2:] != (size[0] * factor, size[1] * factor):
        return F.interpolate(maps.to(dtype), size=size, mode="bilinear", align_corners=False)
    middle = maps[..., factor // 2 - 1 :, factor // 2 - 1 :]
    upper, lower = middle[..., ::factor, :].to(dtype), middle[..., 1::factor, :].to(dtype)
    return (upper[..., ::factor] + upper[..., 1::factor] + lower[..., ::factor] + lower[..., 1::factor]) / 4


@dataclass(frozen=True)
class SharedPoints:
    """Points of each image that many maps are sampled at: cells and weights of a point are the same for all maps.

    Sampling is a lookup of four weighted rows in a table with one column per map, and its gradient the reverse lookup.
    """

    index: Tensor
    """(B, K, 4) cells around each point."""
    weight: Tensor
    """(B, K, 4) bilinear weights, 0 outside the map."""
    cells: int

    @classmethod
    def at(cls, points: Tensor, size: tuple[int, int]) -> "SharedPoints":
        """Find the corners of points (B, K, 2) on maps of ``size`` = (h, w)."""
        x, share_x = _neighbours(points[..., 0], size[1])
        y, share_y = _neighbours(points[..., 1], size[0])
        index, weight = y[..., :, None] * size[1] + x[..., None, :], share_y[..., :, None] * share_x[..., None, :]
        return cls(index.flatten(-2), weight.flatten(-2), size[0] * size[1])

    def look_up(self, image: int, table: Tensor) -> Tensor:
        """Sample a table (cells, N) of one column per map at an image's points; returns (K, N), no gradient."""
        return F.embedding_bag(self.index[image], table.detach(), mode="sum", per_sample_weights=self.weight[image])

    def sample(self, image: int, maps: Tensor) -> Tensor:
        """Sample maps (N, h, w) at an image's points; returns (N, K) with the numbers of :func:`sample`."""
        return self.look_up(image, maps.flatten(1).T.contiguous()).T

    def scatter(self, image: int, values: Tensor) -> Tensor:
        """Give values (N, K) at an image's points back to the cells (N, cells): the transpose of :meth:`sample`."""
        source, weight, starts = (part[image] for part in self._by_cell)
        return F.embedding_bag(source, values.T.contiguous(), starts, mode="sum", per_sample_weights=weight).T

    @cached_property
    def _by_cell(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per image the points (4K,) around each cell in turn, their weights, and where a cell's begin (cells,)."""
        cell, order = self.index.flatten(1).to(torch.int32).sort(stable=True)
        cells = torch.arange(self.cells, dtype=torch.int32, device=cell.device).expand(len(cell), -1).contiguous()
        starts = torch.searchsorted(cell, cells)
        return order // self.index.shape[2], self.weight.flatten(1).gather(1, order), starts


def _neighbours(place: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The two cells around places in [0, 1] of one axis, and their weights, 0 outside; both (..., 2)."""
    place = place * length - 0.5
    low = place.floor()
    share, cell = place - low, torch.stack([low, low + 1], dim=-1)
    weight = torch.stack([1 - share, share], dim=-1) * ((cell >= 0) & (cell < length))
    return cell.clamp(0, length - 1).long(), weight


def most_uncertain(logits: Tensor, count: int) -> Tensor:
    """Return the indices (R, count) of the logits (R, K) nearest to 0 in each row, in no particular order."""
    distance = logits.detach().abs()
    if distance.device.type == "cpu":
        return torch.from_numpy(_smallest(distance.numpy(), count))
    return distance.topk(count, dim=-1, largest=False, sorted=False).indices


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices (R, count) of the smallest values of each row (R, K).

    The first values of a row, which stands for points in random order, bound the ones sought, so that few have to be
    put in order: half the time of numpy's selection, a third of ``topk``'s. A bound that is too low is not used.
    """
    if values.shape[1] <= _TRIED:
        return np.argpartition(values, count - 1, axis=1)[:, :count]
    share = count / values.shape[1]
    rank = min(_TRIED - 1, int(_TRIED * share + 4 * (_TRIED * share * (1 - share)) ** 0.5) + 1)
    bounds = np.partition(values[:, :_TRIED], rank, axis=1)[:, rank]
    rows = []
    for row, bound in zip(values, bounds, strict=True):
        near = np.flatnonzero(row <= bound)
        if len(near) < count:
            near = np.arange(len(row))
        rows.append(near[np.argpartition(row[near], count - 1)[:count]])
    return np.stack(rows)
