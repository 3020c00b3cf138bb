"""1x1 convolutions as one matrix product, for float32 on CPU: the pixel decoder's projections.

3x3 convolutions are the library's. On transformed tiles (Lavin and Gray, CVPR 2016) they took 161 instead of 284 ms of
an R50 step of 3.4 s at 256² on CPU, and the mini scale's model has none: too little for the code that it took.
"""

import torch
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` of stride 1, padded to keep the size, in the form that is fastest for what it is given."""

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h, w)."""
        if self.kernel_size != (1, 1) or _ordinary(maps) or torch.compiler.is_compiling():
            return super().forward(maps)
        weight, flat = self.weight.flatten(1).expand(len(maps), -1, -1), maps.flatten(2)
        product = torch.bmm(weight, flat) if self.bias is None else torch.baddbmm(self.bias[:, None], weight, flat)
        return product.unflatten(2, maps.shape[2:])


def _ordinary(maps: Tensor) -> bool:
    """Whether maps are for the library's convolution: on a GPU, in another precision."""
    return maps.device.type != "cpu" or maps.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
