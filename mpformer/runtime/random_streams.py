"""Named random streams: one per purpose, each a function of (seed, purpose, iteration, slot) alone.

Two runs with the same seed therefore share every random number that a toggle does not touch, and a
resumed run draws exactly what the uninterrupted one would have drawn. No generator carries state
from one iteration to the next, so there is nothing to store in a checkpoint.
"""

from typing import TYPE_CHECKING, Literal
from zlib import crc32

import numpy as np

from mpformer.runtime.errors import choices

if TYPE_CHECKING:
    import torch

Purpose = Literal["initialisation", "data", "noise", "points"]
PURPOSES: tuple[Purpose, ...] = ("initialisation", "data", "noise", "points")


def generator(
    seed: int, purpose: Purpose, iteration: int, device: "str | torch.device" = "cpu", slot: int = 0
) -> "torch.Generator":
    """Return a fresh torch generator on `device`.

    `slot` separates consumers within one iteration (a micro-batch, a process). Raises UserError for
    an unknown purpose.
    """
    import torch

    result = torch.Generator(device=device)
    result.manual_seed(int(_sequence(seed, purpose, iteration, slot).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return result


def numpy_generator(seed: int, purpose: Purpose, iteration: int, slot: int = 0) -> np.random.Generator:
    """Return a fresh numpy generator; `slot` is, for example, the image's index in the batch."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, purpose, iteration, slot)))


def _sequence(seed: int, purpose: Purpose, iteration: int, slot: int) -> np.random.SeedSequence:
    if purpose not in PURPOSES:
        raise choices("random stream", purpose, PURPOSES)
    return np.random.SeedSequence([seed, crc32(purpose.encode()), iteration, slot])
