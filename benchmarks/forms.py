"""``python -m benchmarks.forms [THREADS]``: fast forms beside plain ones, best of 9, forward + backward in ms."""

import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mpformer.modeling import deformable_attention as deformable
from mpformer.modeling.pixel_decoder import EncoderLayer, PixelDecoderSettings
from mpformer.modeling.sparse_sampling import sparse_kernel

REPEATS = 9


def milliseconds(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Best forward and backward time."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        out = function(*leaves)
        middle = time.perf_counter()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        times.append((middle - start, time.perf_counter() - middle))
    return min(f for f, _ in times) * 1e3, min(b for _, b in times) * 1e3


def show(name: str, forms: dict[str, Callable[..., Tensor]], inputs: Sequence[Tensor]) -> None:
    found = {form: milliseconds(function, inputs) for form, function in forms.items()}
    print(f"| {name} | " + ", ".join(f"{form} {f:.0f} + {b:.0f}" for form, (f, b) in found.items()) + " |", flush=True)


def samples(side: int) -> list[Tensor]:
    """Values, places some three cells around each token, weights: R50, batch 2."""
    sizes = [side // s for s in (32, 16, 8)]
    tokens = sum(s * s for s in sizes)
    spread = torch.tensor([3 / s for s in sizes])[:, None, None]
    places = torch.rand(2, tokens, 1, 1, 1, 2) + torch.randn(2, tokens, 8, 3, 4, 2) * spread
    return [torch.randn(2, tokens, 8, 32), places, torch.rand(2, tokens, 8, 3, 4)]


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    torch.manual_seed(0)
    kernels = {"sparse": sparse_kernel, "grid_sample": deformable.grid_sample_kernel}
    if deformable._package_serves("cpu"):
        kernels["package"] = deformable.package_kernel
    for side in (256, 512):
        sizes = tuple((side // s, side // s) for s in (32, 16, 8))
        forms = {n: lambda v, x, w, k=k, s=sizes: k(v, s, x, w) for n, k in kernels.items()}
        show(f"deformable attention's samples, {side}²", forms, samples(side))
        layer = EncoderLayer(PixelDecoderSettings())
        whole = lambda x, b=layer: b.linear2(F.relu(b.linear1(x)))  # noqa: E731
        tokens = torch.randn(2, sum(h * w for h, w in sizes), 256)
        show(f"feed-forward block, {side}²", {"in parts": layer._feed_forward, "whole": whole}, [tokens])


if __name__ == "__main__":
    main()
