"""Convolutions as matrix products, for float32 on CPU: the pixel decoder's largest operations.

A 1x1 convolution is one product. A 3x3 convolution is 36 products with a quarter of the multiplications (Lavin and
Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, section 4.3: F(4x4, 3x3)), which the CPU library
lacks: a tile of 4x4 outputs needs 6x6 inputs, and between linear maps of input tiles, kernels and output tiles it is a
product per place of the transformed tile. Exact but for rounding: errors are some 2e-6 of the values' size.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_TILE = 4
_INPUT = torch.tensor(
    [
        [4.0, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_KERNEL = torch.tensor(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
_OUTPUT = torch.tensor([[1.0, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
_CHANNELS = 128
"""With fewer channels the transforms cost what the products save."""
_TILES = 512
"""Tiles transformed at a time, so that they stay in the cache."""


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` of stride 1, padded to keep the size, in the form that is fastest for what it is given."""

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h, w)."""
        if _ordinary(maps) or torch.compiler.is_compiling():
            return super().forward(maps)
        if self.kernel_size == (1, 1):
            return self._product(maps)
        if self.bias is None and _tiles_pay(maps, self.weight):
            return conv3x3(maps, self.weight)
        return super().forward(maps)

    def _product(self, maps: Tensor) -> Tensor:
        weight, flat = self.weight.flatten(1).expand(len(maps), -1, -1), maps.flatten(2)
        product = torch.bmm(weight, flat) if self.bias is None else torch.baddbmm(self.bias[:, None], weight, flat)
        return product.unflatten(2, maps.shape[2:])


def _ordinary(maps: Tensor) -> bool:
    """Whether maps are for the library's convolution: on a GPU, in another precision."""
    return maps.device.type != "cpu" or maps.dtype != torch.float32 or torch.is_autocast_enabled("cpu")


def _tiles_pay(maps: Tensor, weight: Tensor) -> bool:
    whole = maps.shape[2] % _TILE == 0 and maps.shape[3] % _TILE == 0
    return whole and weight.shape[2:] == (3, 3) and min(weight.shape[:2]) >= _CHANNELS


def conv3x3(maps: Tensor, weight: Tensor) -> Tensor:
    """Convolve maps (B, C, H, W) with kernels (O, C, 3, 3), stride 1, one cell of zeros around; H and W in fours."""
    convolved: Tensor = _Convolution.apply(maps, weight)
    return convolved


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(maps, weight)
        return _convolve(maps, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        maps, weight = ctx.saved_tensors
        of_maps, of_weight = ctx.needs_input_grad
        turned = weight.flip(2, 3).transpose(0, 1)
        return (
            _convolve(grad, turned) if of_maps else None,
            _weight_gradient(maps, grad).view_as(weight) if of_weight else None,
        )


def _convolve(maps: Tensor, weight: Tensor) -> Tensor:
    kernels = (torch.kron(_KERNEL, _KERNEL) @ weight.flatten(2).flatten(0, 1).T).view(36, *weight.shape[:2])
    back = torch.kron(_OUTPUT, _OUTPUT)
    batch, _, height, width = maps.shape
    result = maps.new_empty(batch, len(weight), height // _TILE, _TILE, width // _TILE, _TILE)
    for rows, tiles in _transformed_inputs(maps):
        products = torch.bmm(kernels, tiles)
        part = result[:, :, rows]
        shape = (_TILE, _TILE, len(weight), batch, part.shape[2], part.shape[4])
        part.copy_((back @ products.flatten(1)).view(shape).permute(3, 2, 4, 0, 5, 1))
    return result.view(batch, len(weight), height, width)


def _weight_gradient(maps: Tensor, grad: Tensor) -> Tensor:
    """Gradient (O * C, 9) of the kernels, from maps (B, C, H, W) and the gradient (B, O, H, W) of the output."""
    back = torch.kron(_OUTPUT, _OUTPUT).T
    outputs = grad.unflatten(3, (-1, _TILE)).unflatten(2, (-1, _TILE)).permute(3, 5, 1, 0, 2, 4)
    total = maps.new_zeros(36, grad.shape[1], maps.shape[1])
    for rows, tiles in _transformed_inputs(maps):
        part = outputs[..., rows, :].reshape(_TILE * _TILE, -1)
        total.baddbmm_((back @ part).view(36, grad.shape[1], -1), tiles.transpose(1, 2))
    return total.flatten(1).T @ torch.kron(_KERNEL, _KERNEL)


def _transformed_inputs(maps: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of tiles, and these tiles transformed (36, C, tiles), a few rows at a time."""
    forth = torch.kron(_INPUT, _INPUT)
    tiles = F.pad(maps, (1, 1, 1, 1)).unfold(2, _TILE + 2, _TILE).unfold(3, _TILE + 2, _TILE).permute(4, 5, 1, 0, 2, 3)
    step = max(1, _TILES // (tiles.shape[3] * tiles.shape[5]))
    for first in range(0, tiles.shape[4], step):
        rows = slice(first, first + step)
        part = tiles[..., rows, :].reshape(36, -1)
        yield rows, (forth @ part).view(36, maps.shape[1], -1)
