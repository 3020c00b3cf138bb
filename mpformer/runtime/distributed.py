"""Several processes train one run: their rendezvous, sums and means over all of them, agreement on when to stop.

Nothing here is needed by a single process; every function then does nothing and returns its input.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from mpformer.runtime.errors import RunFailure, UserError
from mpformer.runtime.rank import RENDEZVOUS, Rank, current_rank

_PATIENCE = timedelta(minutes=10)


@contextmanager
def process_group(device: torch.device) -> Iterator[Rank]:
    """Join the process group for the body (nccl for what lies on a GPU, gloo else); one process joins nothing.

    Their rendezvous is the file that the variable ``MPFORMER_RENDEZVOUS`` names, or ``MASTER_ADDR`` and ``MASTER_PORT``
    as under torchrun. Raises UserError if neither is set, RunFailure("node") if the others do not come.
    """
    rank = current_rank()
    ours = rank.world_size > 1 and not dist.is_initialized()
    if ours:
        # counts and reasons to stop lie on the CPU, which nccl does not know
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with contact_lost():
            dist.init_process_group(backend, store=_store(rank), rank=rank.number, world_size=rank.world_size)
    try:
        with contact_lost():
            yield rank
    finally:
        if ours:
            dist.destroy_process_group()


@contextmanager
def contact_lost() -> Iterator[None]:
    """Turn the errors of a broken connection to another process into ``RunFailure("node")``."""
    try:
        yield
    except dist.DistError as error:
        raise RunFailure("node", _lost(error)) from error
    except RuntimeError as error:
        if "gloo" not in str(error):  # gloo has no exception of its own
            raise
        raise RunFailure("node", _lost(error)) from error


def _lost(error: BaseException) -> str:
    return f"lost contact with another process of the run: {' '.join(str(error).split())[:200]}"


def _store(rank: Rank) -> Any:
    """The key-value store of the rendezvous; None: torch makes one from its own variables."""
    file = os.environ.get(RENDEZVOUS)
    if file:
        return _open(Path(file), rank) if rank.main else _join(Path(file), rank)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(
            f"{rank.world_size} processes are to train one run but have no rendezvous: set MASTER_ADDR and"
            " MASTER_PORT (torchrun does), or launch with a profile of tasks_per_node"
        )
    return None


def _open(file: Path, rank: Rank) -> Any:
    """Listen on a port that the system picks, so that no two jobs of a node can collide, and say which."""
    host = socket.gethostname()
    # listening comes before the file says so, and waiting for the others after it
    store = TCPStore(host, 0, rank.world_size, True, _PATIENCE, wait_for_workers=False)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"host": host, "port": store.port, "size": rank.world_size}) + "\n")
    temporary.replace(file)
    return store


def _join(file: Path, rank: Rank) -> Any:
    end = time.monotonic() + _PATIENCE.total_seconds()
    while not file.exists():
        if time.monotonic() > end:
            raise RunFailure("node", f"rank {rank.number} waited {_PATIENCE} for rank 0 to write its address")
        time.sleep(0.2)
    where = json.loads(file.read_text())
    return TCPStore(where["host"], where["port"], rank.world_size, False, _PATIENCE)


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes (same shape)."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def mean(values: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all processes (same shape)."""
    return total(values) / dist.get_world_size() if dist.is_initialized() else values


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
