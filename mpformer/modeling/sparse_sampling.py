"""Bilinear sampling as a product with a sparse matrix: multi-scale deformable attention on CPU.

The output of deformable attention (Deformable DETR, Zhu et al., ICLR 2021, equation 3) is linear in the values: a row
per query and head holds four weights, those of the surrounding cells, for every sample. The forward pass is
this matrix times the values, the gradient of the values its transpose times the gradient of the output, and the
gradients of locations and weights follow from the products of both at the matrix's entries. Each is one library call.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Said once by PyTorch of any matrix in this format; the one operator that is used here has tests.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state", category=UserWarning)

Sizes = tuple[tuple[int, int], ...]

_BORDER = 2
"""Cells of zeros around every level; samples beyond them are moved there, where values and slopes are zero."""

_CORNERS = 2**21
"""Entries of the matrix that are made at once, in whole images: 8 MiB of numbers and as much of their samples."""


def sparse_kernel(value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples on CPU; differentiable once.

    value (B, S, M, d), locations (B, N, M, levels, K, 2) as x, y in [0, 1], weights (B, N, M, levels, K);
    returns (B, N, M*d).
    """
    images = max(1, _CORNERS // (4 * weights[0].numel()))
    parts = zip(*(x.split(images) for x in (value, locations, weights)), strict=True)
    return torch.cat([_Sampling.apply(v, sizes, x, w) for v, x, w in parts])


@dataclass(frozen=True)
class _Grid:
    """The levels, each with its border, one after the other."""

    sizes: Sizes
    points: int
    """Samples per head and level."""

    @property
    def bordered(self) -> Sizes:
        return tuple((h + 2 * _BORDER, w + 2 * _BORDER) for h, w in self.sizes)

    def per_sample(self, values: list[int], like: Tensor) -> Tensor:
        """One number per level, repeated for the level's samples: (1, levels * K)."""
        return torch.tensor(values, dtype=like.dtype).repeat_interleave(self.points)[None]

    def first_cells(self) -> list[int]:
        """Index of each level's cell (0, 0)."""
        starts, start = [], 0
        for height, width in self.bordered:
            starts.append(start + _BORDER * width + _BORDER)
            start += height * width
        return starts

    def add_border(self, value: Tensor) -> Tensor:
        """Values (B, S, M, d) to (B, S', M, d)."""
        parts = value.flatten(2).split([h * w for h, w in self.sizes], dim=1)
        table = value.new_zeros(len(value), sum(h * w for h, w in self.bordered), parts[0].shape[-1])
        for inside, part in zip(self._insides(table), parts, strict=True):
            inside.copy_(part.view_as(inside))
        return table.unflatten(-1, value.shape[2:])

    def drop_border(self, table: Tensor) -> Tensor:
        """The inverse of :meth:`add_border`."""
        return torch.cat([inside.flatten(1, 2) for inside in self._insides(table.flatten(2))], dim=1)

    def _insides(self, table: Tensor) -> list[Tensor]:
        """Views (B, h, w, M * d) of the levels without their borders."""
        levels = table.split([h * w for h, w in self.bordered], dim=1)
        maps = [level.unflatten(1, size) for level, size in zip(levels, self.bordered, strict=True)]
        return [m[:, _BORDER:-_BORDER, _BORDER:-_BORDER] for m in maps]


@dataclass(frozen=True)
class _Samples:
    """Where is sampled, a row per query and head, a column per level and point."""

    cell: Tensor
    """(R, P) int32 row of the table that holds the upper left corner; ``heads`` rows are one cell."""
    right: Tensor
    """(R, P) how far right of that corner, from 0 to 1."""
    down: Tensor
    """(R, P) how far below it."""

    @classmethod
    def of(cls, locations: Tensor, grid: _Grid, table: Tensor) -> "_Samples":
        """Of locations (B, N, M, levels, K, 2) in a table (B, S', M, d)."""
        batch, heads = len(table), table.shape[2]
        x, right = _cell_and_rest(locations[..., 0].reshape(-1, len(grid.sizes) * grid.points), 1, grid)
        y, down = _cell_and_rest(locations[..., 1].reshape(x.shape), 0, grid)
        cell = y.mul_(grid.per_sample([w for _, w in grid.bordered], y)).add_(x)
        cell.add_(grid.per_sample(grid.first_cells(), cell)).mul_(heads)
        cell.view(batch, -1, heads, cell.shape[-1]).add_(_first_rows(table)[:, None, :, None])
        return cls(cell, right, down)

    def matrix(self, weights: Tensor, grid: _Grid, heads: int) -> tuple[Tensor, Tensor]:
        """Columns and entries (R, 4 P) of the matrix: upper left, upper right, lower left, lower right corners."""
        below = grid.per_sample([w * heads for _, w in grid.bordered], self.cell)
        corners = torch.cat([0 * below, 0 * below + heads, below, below + heads])
        lower = self.down * weights
        vertical = torch.stack([weights - lower, lower], dim=1)
        horizontal = torch.stack([1 - self.right, self.right], dim=1)
        entries = vertical[:, :, None] * horizontal[:, None]
        return (self.cell[:, None] + corners).flatten(1), entries.flatten(1)


def _cell_and_rest(share: Tensor, axis: int, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Split samples, as shares of the image's side, into whole cells (int32) and the rest."""
    lengths = grid.per_sample([size[axis] for size in grid.sizes], share)
    position = (share * lengths).sub_(0.5).clamp_(min=-_BORDER)
    position = torch.minimum(position, lengths)
    cell = position.floor()
    # A diverged model's position may be no number: any cell will do, and the rest says so to the loss.
    return cell.int().clamp_(min=-_BORDER), position.sub_(cell)


def _first_rows(table: Tensor) -> Tensor:
    """(B, M) table row of each image's first cell and head."""
    batch, cells, heads, _ = table.shape
    return torch.arange(batch, dtype=torch.int32)[:, None] * (cells * heads) + torch.arange(heads, dtype=torch.int32)


class _Sampling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
        grid = _Grid(sizes, weights.shape[-1])
        table = grid.add_border(value)
        samples, rows = _Samples.of(locations, grid, table), weights.reshape(-1, weights.shape[-2] * weights.shape[-1])
        ctx.grid, ctx.shape = grid, locations.shape
        ctx.save_for_backward(table, samples.cell, samples.right, samples.down, rows)
        columns, entries = samples.matrix(rows, grid, table.shape[2])
        sampled = F.embedding_bag(columns, table.flatten(0, 2), per_sample_weights=entries, mode="sum")
        return sampled.view(*weights.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        table, cell, right, down, weights = ctx.saved_tensors
        columns, entries = _Samples(cell, right, down).matrix(weights, ctx.grid, table.shape[2])
        flat = table.flatten(0, 2)
        grad = grad.reshape(-1, flat.shape[1])
        of_table = _transposed_product(columns, entries, grad, len(flat)).view_as(table)
        of_x, of_y, of_weights = _slopes(_products_at(columns, entries, grad, flat), right, down)
        lengths = [ctx.grid.per_sample([size[axis] for size in ctx.grid.sizes], weights) for axis in (1, 0)]
        of_locations = torch.stack([of_x.mul_(weights * lengths[0]), of_y.mul_(weights * lengths[1])], dim=-1)
        return (
            ctx.grid.drop_border(of_table).unflatten(-1, table.shape[2:]),
            None,
            of_locations.view(ctx.shape),
            of_weights.view(ctx.shape[:-1]),
        )


def _transposed_product(columns: Tensor, entries: Tensor, grad: Tensor, rows: int) -> Tensor:
    """(rows, d): the transpose of the matrix times grad (R, d)."""
    parts = (entries.flatten().numpy(), columns.flatten().numpy(), _row_starts(columns).numpy())
    matrix = scipy.sparse.csr_array(parts, shape=(len(columns), rows))
    return torch.from_numpy(matrix.T @ grad.numpy())


def _products_at(columns: Tensor, space: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    """Inner products (R, 4, P) of each row's gradient with the table's rows that it sampled; overwrites ``space``."""
    parts = (_row_starts(columns), columns.flatten(), space.flatten())
    matrix = torch.sparse_csr_tensor(*parts, (len(columns), len(table)), check_invariants=False)
    torch.sparse.sampled_addmm(matrix, grad, table.T, beta=0.0, out=matrix)
    return matrix.values().view(len(columns), 4, -1)


def _row_starts(columns: Tensor) -> Tensor:
    return torch.arange(0, columns.numel() + 1, columns.shape[1], dtype=torch.int32)


def _slopes(corners: Tensor, right: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives by x and y, in cells, and the value, of the bilinear surface over corners (R, 4, P)."""
    upper_left, upper_right, lower_left, lower_right = corners.unbind(1)
    upper_slope, lower_slope = upper_right - upper_left, lower_right - lower_left
    upper, lower = torch.addcmul(upper_left, right, upper_slope), torch.addcmul(lower_left, right, lower_slope)
    by_y = lower - upper
    return torch.lerp(upper_slope, lower_slope, down), by_y, torch.addcmul(upper, down, by_y)
