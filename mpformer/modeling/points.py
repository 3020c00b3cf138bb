"""Random points on masks: drawing, bilinear sampling, and the most uncertain ones (PointRend, section 3.1).

One set of points is drawn per image and shared by all its layers, queries and objects. Each loss term is then
still an average over uniformly drawn points, as in Mask2Former, while the sampling weights are worked out once
per image instead of once per layer and object.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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


def cell_centres(cells: tuple[int, int], device: torch.device) -> Tensor:
    """Return the centres (h*w, 2), x and y in [0, 1], of a grid of cells."""
    y = (torch.arange(cells[0], device=device) + 0.5) / cells[0]
    x = (torch.arange(cells[1], device=device) + 0.5) / cells[1]
    return torch.stack([x.expand(cells[0], -1), y[:, None].expand(-1, cells[1])], dim=-1).flatten(0, 1)


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Sample maps (N, C, H, W) bilinearly at points (N, K, 2); returns (N, C, K). Outside the map it is 0."""
    return F.grid_sample(maps, (2 * points - 1)[:, :, None], align_corners=False).squeeze(-1)


@dataclass(frozen=True)
class SharedPoints:
    """Points that many maps are sampled at: the cells and weights of a point are then the same for all maps.

    Sampling is a lookup of four weighted rows in a table with one column per map, and its gradient the reverse lookup.
    """

    index: Tensor
    """(K, 4) cells around each point."""
    weight: Tensor
    """(K, 4) bilinear weights, 0 outside the map."""
    cells: int

    @classmethod
    def at(cls, points: Tensor, size: tuple[int, int]) -> "SharedPoints":
        """Find the corners of points (K, 2) on maps of ``size`` = (h, w)."""
        extent = torch.tensor([size[1], size[0]], device=points.device)
        place = points * extent - 0.5
        low = place.floor()
        corner = torch.stack([low, low + 1]).long()
        share = torch.stack([1 - (place - low), place - low]) * ((corner >= 0) & (corner < extent))
        (x, y), (share_x, share_y) = corner.clamp(torch.zeros_like(extent), extent - 1).unbind(-1), share.unbind(-1)
        index, weight = y[:, None] * size[1] + x, share_y[:, None] * share_x
        return cls(index.flatten(0, 1).T.contiguous(), weight.flatten(0, 1).T.contiguous(), size[0] * size[1])

    def sample(self, maps: Tensor) -> Tensor:
        """Sample maps (N, h, w) at the points; returns (N, K) with the numbers of :func:`sample`, no gradient."""
        return self.look_up(maps.detach().flatten(1).T.contiguous()).T

    def look_up(self, table: Tensor) -> Tensor:
        """Sample a table (cells, N) of one column per map; returns (K, N), no gradient."""
        return F.embedding_bag(self.index, table.detach(), mode="sum", per_sample_weights=self.weight)

    def scatter(self, values: Tensor) -> Tensor:
        """Give values (N, K) at the points back to the cells (N, cells): the transpose of :meth:`sample`."""
        source, weight, starts = self._by_cell
        return F.embedding_bag(source, values.T.contiguous(), starts, mode="sum", per_sample_weights=weight).T

    @cached_property
    def _by_cell(self) -> tuple[Tensor, Tensor, Tensor]:
        """The points (4K,) around each cell in turn, their weights, and where each cell's points start (cells,)."""
        cell, order = self.index.flatten().to(torch.int32).sort(stable=True)
        starts = torch.searchsorted(cell, torch.arange(self.cells, dtype=torch.int32, device=cell.device))
        return order // self.index.shape[1], self.weight.flatten()[order], starts


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
