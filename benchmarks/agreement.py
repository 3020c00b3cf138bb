"""Before anything is timed: the implementations compute the same."""

from dataclasses import dataclass

import torch

from benchmarks.measure import Clock, step
from benchmarks.paths import DirectPath, PeerPath, ProductPath


@dataclass(frozen=True)
class Agreement:
    """How far the product is from another path, relative to the values' own size."""

    loss: float
    gradient: float
    class_logits: float
    mask_logits: float

    def check(self, what: str, tolerance: float = 5e-3) -> None:
        """Raise AssertionError if any difference is larger than ``tolerance``.

        Masked attention has a threshold: of a million mask logits of a random model some lie within rounding of it, and
        a cell that flips is seen. Models without such cells agree to 1e-4
        (tests/mpformer/modeling/test_golden_toggles.py).
        """
        for name, value in vars(self).items():
            assert value <= tolerance, f"{what}: {name} differs by {value:.1e}, more than {tolerance}"


def with_direct(direct: DirectPath, product: ProductPath) -> Agreement:
    """Training losses, gradients and evaluation outputs at the same weights, points and noise."""
    losses = [step(path, Clock()) for path in (product, direct)]
    wanted = {n: p.grad for n, p in direct.model.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in product.model.named_parameters() if p.grad is not None}
    assert wanted.keys() == found.keys()
    gradient = relative(
        torch.cat([found[n].flatten() for n in wanted]), torch.cat([g.flatten() for g in wanted.values()])
    )
    return Agreement(abs(losses[0] / losses[1] - 1), gradient, *_outputs(product, direct))


def with_peer(peer: PeerPath, product: ProductPath) -> Agreement:
    """Evaluation outputs; the peer draws its own points, so that losses agree only roughly and are not compared."""
    return Agreement(0.0, 0.0, *_outputs(product, peer))


def _outputs(product: ProductPath, other: DirectPath | PeerPath) -> tuple[float, float]:
    with torch.no_grad():
        ours = product.final(product.pixel_decoder(product.backbone()))
        theirs = other.final(other.pixel_decoder(other.backbone()))
    return relative(ours[0], theirs[0]), relative(ours[1], theirs[1])


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """L2 norm of the difference over that of ``wanted``."""
    return float((found - wanted).norm() / wanted.norm())
