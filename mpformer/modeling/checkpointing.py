"""Activation checkpointing: what is cheap to compute again is not kept for the backward pass."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def checkpointed(function: Callable[[Tensor], T], inputs: Tensor) -> T:
    """Call the function; its inner values are computed again in the backward pass, not kept until then."""
    result: T = checkpoint(function, inputs, use_reentrant=False, preserve_rng_state=False)
    return result
