"""Random points on masks: drawing, bilinear sampling, and the most uncertain ones (PointRend, section 3.1).

One set of points is drawn per image and shared by all its layers, queries and objects. Each loss term is then
still an average over uniformly drawn points, as in Mask2Former, while the sampling weights are worked out once
per image instead of once per layer and object.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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


def most_uncertain(logits: Tensor, count: int) -> Tensor:
    """Return the indices (..., count) of the logits (..., K) nearest to 0, in no particular order."""
    return logits.detach().abs().topk(count, dim=-1, largest=False, sorted=False).indices
