"""Multi-scale deformable attention (Deformable DETR, Zhu et al., ICLR 2021, section 4.1).

The sampling is a product with a sparse matrix on CPU. On GPUs it runs in a package's kernel: ``deformops``' Triton
kernels (Stolle, TMLR 2026) where that is installed, else those of ``torch-ms-deform-attn``; ``grid_sample`` is for who
asks for it (:func:`require_kernel`). All give the same numbers up to rounding.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpformer.modeling.sparse_sampling import Sizes, sparse_kernel
from mpformer.runtime.errors import UserError

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


def deformops_kernel(value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute what :func:`grid_sample_kernel` computes in the ``deformops`` package's Triton kernels.

    Its choice by itself may fall on CUDA kernels, which want a compiler, so Triton is named.
    """
    from deformops.registry import Backend, msda

    return msda(value, *_level_table(sizes, value.device), locations, weights, backend=Backend.TRITON)


def package_kernel(value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute what :func:`grid_sample_kernel` computes in the ``torch-ms-deform-attn`` package's kernel."""
    from torch_ms_deform_attn import ms_deform_attn

    shapes, starts = (table.long() for table in _level_table(sizes, value.device))
    return ms_deform_attn(value.contiguous(), shapes, starts, locations.contiguous(), weights.contiguous())


@lru_cache(maxsize=64)
def _level_table(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """(levels, 2) int32 heights and widths, and (levels,) int32 index of each level's first token; copied once."""
    starts = accumulate((h * w for h, w in sizes[:-1]), initial=0)
    shapes, first = (torch.tensor(table, dtype=torch.int32, device=device) for table in (sizes, list(starts)))
    return shapes, first


def kernel_name(device: str) -> str:
    """Name the kernel of a type of device (``cpu``, ``cuda``), such as ``deformops 3.0.1 (Triton)``."""
    return _NAMES[kernel_of(device)]


def kernel_of(device: str) -> Kernel:
    """Kernel for a type of device: the first that is there, when compiling the first that can be compiled."""
    if device == "cpu" and not torch.compiler.is_compiling():
        return sparse_kernel
    if _deformops_serves(device):
        return deformops_kernel
    return package_kernel if _package_serves(device) else grid_sample_kernel


def require_kernel(device: torch.device, slow: bool) -> None:
    """Raise UserError for a GPU without a kernel, unless ``slow`` (``runtime.slow_attention``) allows grid_sample."""
    if device.type == "cuda" and not slow and kernel_of("cuda") is grid_sample_kernel:
        raise UserError(
            "no kernel of deformable attention for this GPU: set up with Python 3.12 or 3.13 (make setup"
            " PYTHON=python3.12 installs deformops, nothing is compiled) or compile torch-ms-deform-attn (make setup"
            " KERNEL=yes); runtime.slow_attention=true goes on with grid_sample, which is slower and keeps twice"
            " the pixel decoder's memory"
        )


@torch.compiler.assume_constant_result
@cache
def _deformops_serves(device: str) -> bool:
    """Whether the package is installed and its Triton kernels run on this machine's GPU."""
    if device != "cuda" or find_spec("deformops") is None:
        return False
    from deformops.registry import Backend, msda

    return msda.is_registered(Backend.TRITON) and torch.cuda.get_device_capability() >= (7, 0)


@torch.compiler.assume_constant_result
@cache
def _package_serves(device: str) -> bool:
    """Whether the package is installed and was built for this type of device."""
    if find_spec("torch_ms_deform_attn") is None:
        return False
    from torch_ms_deform_attn import _C

    return bool({"cpu": True, "cuda": _C.with_cuda, "mps": _C.with_mps}.get(device, False))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(no metadata)"


_NAMES: dict[Kernel, str] = {
    sparse_kernel: "sparse matrix",
    grid_sample_kernel: "grid_sample",
    deformops_kernel: f"deformops {_version('deformops')} (Triton)",
    package_kernel: f"torch-ms-deform-attn {_version('torch-ms-deform-attn')}",
}


class DeformableAttention(nn.Module):
    """Attention of each token to a few learnt offsets around its reference point on every level."""

    def __init__(self, channels: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
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
        weights = _softmax(self.attention_weights(query).float().view(*shape[:3], -1)).view(shape)
        # Half precision would place the samples of a large level half a cell off.
        sampled = kernel_of(value.device.type)(value.float(), sizes, locations, weights)
        return self.output_proj(sampled.to(value.dtype))

    def _offsets(self, query: Tensor, sizes: Sizes) -> Tensor:
        """Sampling offsets (B, N, M * levels * K * 2) as shares of the image: dividing the weights divides them."""
        scale = _cells(sizes, self.heads, self.points, query.device)
        layer = self.sampling_offsets
        return F.linear(query, layer.weight / scale[:, None], layer.bias / scale)


@lru_cache(maxsize=64)
def _cells(sizes: Sizes, heads: int, points: int, device: torch.device) -> Tensor:
    """Cells of its level along each offset's axis, (heads * levels * points * 2,), on the device: copied there once."""
    cells = torch.tensor([(w, h) for h, w in sizes], dtype=torch.float32)
    return cells[:, None].expand(heads, -1, points, -1).flatten().to(device)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis, written out: PyTorch's takes rows of a dozen one by one (CPU, 5 times slower)."""
    grown = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    return grown / grown.sum(-1, keepdim=True)
