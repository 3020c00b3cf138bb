"""What one image costs: operations of a training and of an inference pass, and the seconds of inference."""

import statistics
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mpformer.config.schema import Config
from mpformer.data.validation import ValidationItems
from mpformer.modeling.meta_arch import MPFormer
from mpformer.runtime import random_streams

_REPEATS = 5
_BILLION = 1e9


def costs(model: MPFormer, config: Config, items: ValidationItems) -> dict[str, float]:
    """Measure on the first validation image that has an object; {} if none has. Parameters stay what they are.

    Returns ``train_gflops`` and ``inference_gflops`` (two operations a multiply-add, of matrix products, attention
    and convolutions; the deformable kernel's sampling is not counted) and ``inference``, the median seconds of a
    forward pass of that image alone, the first one left out.
    """
    item = next((item for item in items if len(item.inputs["instances"])), None)
    if item is None:
        return {}
    return {
        "train_gflops": _train_operations(model, config, item.inputs) / _BILLION,
        "inference_gflops": _inference_operations(model, item.inputs) / _BILLION,
        "inference": _seconds(model, item.inputs),
    }


def _train_operations(model: MPFormer, config: Config, inputs: dict[str, Any]) -> int:
    """Forward with piloting where the toggles say so, losses and backward, in 32 bits."""
    kept = {name: value.clone() for name, value in model.named_buffers()}  # running statistics of normalisations
    was_training = model.training
    model.train()
    try:
        with _counter() as counter:
            noise, points = (
                random_streams.generator(config.seed, kind, 0, model.device) for kind in ("noise", "points")
            )
            losses = model([inputs], noise=noise, points=points)
            torch.stack(list(losses.values())).sum().backward()
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        for name, value in model.named_buffers():
            value.copy_(kept[name])
    return counter.get_total_flops()


def _inference_operations(model: MPFormer, inputs: dict[str, Any]) -> int:
    with _counter() as counter:
        model.eval().layer_outputs([inputs])
    return counter.get_total_flops()


class _NoModules:
    """Stands for the counter's module tracker, whose hooks fail on parameters that are inputs of modules."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _counter() -> FlopCounterMode:
    """Counts all operations together."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


def _seconds(model: MPFormer, inputs: dict[str, Any]) -> float:
    taken = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        model.eval().layer_outputs([inputs])
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])
