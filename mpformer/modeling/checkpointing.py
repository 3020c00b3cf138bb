"""Activation checkpointing on GPUs: what is cheap to compute again is not kept for the backward pass."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def checkpointed(function: Callable[[Tensor], T], inputs: Tensor) -> T:
    """Call the function; on a GPU its inner values are computed again in the backward pass, not kept until then.

    A CPU has more memory than time, and of a small model's layers the bookkeeping takes longer than the layers.
    """
    if inputs.device.type == "cpu":
        return function(inputs)
    result: T = checkpoint(function, inputs, use_reentrant=False, preserve_rng_state=False)
    return result
