"""The trainer's own step on the pretend device."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpformer.config.schema import Config
from mpformer.modeling import criterion, deformable_attention
from mpformer.modeling.criterion import Criterion
from mpformer.modeling.points import cell_centres
from mpformer.modeling.position import sine_position
from mpformer.modeling.sparse_sampling import Sizes, sparse_kernel
from mpformer.runtime import random_streams
from mpformer.runtime.callbacks import TrainCallbacks
from mpformer.runtime.rank import Rank
from mpformer.training import accumulation, optimisation
from mpformer.training.trainer import Trainer
from tests.pretend_device.device import PretendDevice, PretendGenerator, PretendTensor, device

_CACHES = (sine_position, cell_centres, deformable_attention._cells, deformable_attention._level_table)
"""What the model keeps on a device from one step to the next."""
Batch = list[dict[str, Any]]
PHASES = ("backbone", "pixel decoder", "decoder", "piloting", "matching", "losses", "backward", "clipping", "optimiser")


@contextmanager
def pretending(values: bool = True) -> Iterator[PretendDevice]:
    """The device, with deformable attention and the random streams of a GPU."""
    with PretendDevice(values) as pretend, ExitStack() as patches:
        kernel = _counted_kernel(pretend)
        patches.enter_context(mock.patch.object(deformable_attention, "kernel_of", return_value=kernel))
        patches.enter_context(mock.patch.object(Trainer, "_stream", _stream))
        for cached in _CACHES:
            cached.cache_clear()
            patches.callback(cached.cache_clear)
        yield pretend


def make_trainer(config: Config, directory: Path, **callbacks: Any) -> Trainer:
    """A trainer whose model is on the device and whose batches are to be given."""
    return Trainer(config, directory, directory, TrainCallbacks(**callbacks), device(), Rank())


def step(pretend: PretendDevice, made: Trainer, batch: Batch, iteration: int = 0) -> None:
    """One step of the trainer, in phases."""
    made.iter, made.parts = iteration, accumulation.micro_batches(iter([batch]), made.config)
    with pretend.phase("rest"), pretend.saving(), _phases(pretend, made):
        made.run_step()


@contextmanager
def _phases(pretend: PretendDevice, made: Trainer) -> Iterator[None]:
    """Name the phases of a step; what is in none of them is ``rest``."""
    head = made.core.sem_seg_head
    places = [
        (made.core.backbone, "forward", "backbone"),
        (head.pixel_decoder, "forward", "pixel decoder"),
        (head.predictor, "forward", "decoder"),
        (made.core, "pilot", "piloting"),
        (Criterion, "by_layer", "losses"),
        (criterion, "match", "matching"),
        (Tensor, "backward", "backward"),
        (optimisation, "clip", "clipping"),
        (made.optimizer, "step", "optimiser"),
    ]
    with ExitStack() as stack:
        for owner, name, phase in places:
            stack.enter_context(pretend.watched(owner, name, phase))
        yield


def _stream(self: Trainer, purpose: random_streams.Purpose, slot: int) -> torch.Generator:
    """As the trainer's, of a generator that says it lives on the device."""
    slot += self.rank.number * self.config.runtime.accumulation
    seed = random_streams.generator(self.config.seed, purpose, self.iter, slot=slot).initial_seed()
    return PretendGenerator().manual_seed(seed)


def _counted_kernel(pretend: PretendDevice) -> Any:
    class Sampled(torch.autograd.Function):
        """Deformable attention as a GPU's kernel does it: one operator forward, one backward."""

        @staticmethod
        def forward(ctx: Any, value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
            ctx.sizes = sizes
            ctx.save_for_backward(value, locations, weights)
            with pretend.one_operator("deformable attention"):
                if pretend.home.type == "meta":
                    return value.new_empty(*weights.shape[:2], value.shape[2] * value.shape[3])
                return _like(value, sparse_kernel(_plain(value)[0], sizes, *_plain(locations, weights)))

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            with pretend.one_operator("deformable attention, backward"):
                if pretend.home.type == "meta":
                    found = [torch.empty_like(x) for x in ctx.saved_tensors]
                else:
                    inputs = [x.detach().requires_grad_() for x in _plain(*ctx.saved_tensors)]
                    with torch.enable_grad():
                        out = sparse_kernel(inputs[0], ctx.sizes, *inputs[1:])
                    found = [_like(grad, x) for x in torch.autograd.grad(out, inputs, _plain(grad))]
            return found[0], None, found[1], found[2]

    return Sampled.apply


def _plain(*tensors: Tensor) -> list[Tensor]:
    return [x.inner for x in tensors if isinstance(x, PretendTensor)]


def _like(_: Tensor, value: Tensor) -> Tensor:
    return PretendTensor(value)
