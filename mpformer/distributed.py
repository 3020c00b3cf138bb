"""One process or several: rank and size from the environment (torchrun's variables, or Slurm's).

Nothing here is needed by a single process; every function then does nothing and returns its input.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """This process among those that train one run together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """True in the one process that writes files."""
        return self.rank == 0


def place() -> Place:
    """Read rank, size and local rank from ``RANK``/``WORLD_SIZE``/``LOCAL_RANK`` or Slurm's step variables."""
    size = _number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1)
    if size == 1:
        return Place()
    return Place(_number("RANK", "SLURM_PROCID"), size, _number("LOCAL_RANK", "SLURM_LOCALID"))


@contextmanager
def process_group(device: torch.device) -> Iterator[Place]:
    """Join the process group for the body (nccl on CUDA, gloo else); one process joins nothing."""
    here = place()
    ours = here.size > 1 and not dist.is_initialized()
    if ours:
        os.environ.setdefault("MASTER_ADDR", _first_host(os.environ.get("SLURM_STEP_NODELIST", "")))
        os.environ.setdefault("MASTER_PORT", str(20000 + _number("SLURM_JOB_ID", default=9500) % 20000))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=here.rank, world_size=here.size)
    try:
        yield here
    finally:
        if ours:
            dist.destroy_process_group()


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes (same shape)."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def agree(reason: str | None) -> str | None:
    """Return the reason to stop of the first process that has one, in every process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return reason
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next((r for r in reasons if r), None)


def _first_host(nodes: str) -> str:
    """The first name of Slurm's compressed list: ``gpu[03-05,9],cpu1`` → ``gpu03``; this machine if it is empty."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    return f"{match[1]}{match[2] or ''}" if match else "127.0.0.1"


def _number(*names: str, default: int = 0) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)
