"""Multi-scale deformable attention (Deformable DETR, Zhu et al., ICLR 2021, section 4.1).

The sampling runs in the ``torch-ms-deform-attn`` package's kernel where it is installed, in ``grid_sample``
otherwise; both give the same numbers up to rounding.
"""

import math
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Sizes = tuple[tuple[int, int], ...]
Kernel = Callable[[Tensor, Sizes, Tensor, Tensor], Tensor]


def grid_sample_kernel(value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples, in plain PyTorch.

    value (B, S, M, d), locations (B, N, M, levels, K, 2) as x, y in [0, 1], weights (B, N, M, levels, K);
    returns (B, N, M*d).
    """
    batch, _, heads, depth = value.shape
    queries = locations.shape[1]
    grids = 2 * locations - 1
    samples = []
    for level, part in enumerate(value.split([h * w for h, w in sizes], dim=1)):
        maps = part.permute(0, 2, 3, 1).reshape(batch * heads, depth, *sizes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(maps, grid, align_corners=False))
    stacked = torch.cat(samples, dim=-1)
    flat = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    return (stacked * flat).sum(-1).view(batch, heads * depth, queries).transpose(1, 2)


def package_kernel(value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute what :func:`grid_sample_kernel` computes in the ``torch-ms-deform-attn`` package's kernel."""
    from torch_ms_deform_attn import ms_deform_attn

    shapes = torch.tensor(sizes, dtype=torch.int64, device=value.device)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    return ms_deform_attn(value.contiguous(), shapes, starts, locations.contiguous(), weights.contiguous())


def kernel_name() -> str:
    """Name the kernel in use, for diagnostics, such as ``torch-ms-deform-attn 0.1.1`` or ``grid_sample``."""
    try:
        return f"torch-ms-deform-attn {version('torch-ms-deform-attn')}" if _installed() else "grid_sample"
    except PackageNotFoundError:
        return "torch-ms-deform-attn"


def _installed() -> bool:
    return find_spec("torch_ms_deform_attn") is not None


def default_kernel() -> Kernel:
    """Return the package's kernel where it is installed, the ``grid_sample`` one otherwise."""
    return package_kernel if _installed() else grid_sample_kernel


class DeformableAttention(nn.Module):
    """Attention of each token to a few learnt offsets around its reference point on every level."""

    def __init__(self, channels: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        self.kernel = default_kernel()
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self._initialise()

    def _initialise(self) -> None:
        """Start head m looking in direction 2 pi m / M, point k at distance k cells, all equally weighted."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * steps[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, reference: Tensor, tokens: Tensor, sizes: Sizes) -> Tensor:
        """Attend from query (B, N, D) at reference (N, 2) to tokens (B, S, D) of levels ``sizes``.

        ``reference`` holds x, y in [0, 1]; returns (B, N, D).
        """
        batch, count, _ = query.shape
        value = self.value_proj(tokens).view(batch, tokens.shape[1], self.heads, -1)
        shape = (batch, count, self.heads, self.levels, self.points)
        locations = reference[:, None, None, None] + self._offsets(query, sizes).float().view(*shape, 2)
        weights = self.attention_weights(query).view(*shape[:3], -1).softmax(-1).view(shape)
        # Half precision would place the samples of a large level half a cell off.
        sampled = self.kernel(value.float(), sizes, locations, weights.float())
        return self.output_proj(sampled.to(value.dtype))

    def _offsets(self, query: Tensor, sizes: Sizes) -> Tensor:
        """Sampling offsets (B, N, M * levels * K * 2) as shares of the image: dividing the weights divides them."""
        cells = torch.tensor([(w, h) for h, w in sizes], dtype=torch.float32, device=query.device)
        scale = cells[:, None].expand(self.heads, -1, self.points, -1).flatten()
        layer = self.sampling_offsets
        return F.linear(query, layer.weight / scale[:, None], layer.bias / scale)
