"""Which process this is among those that train one run together, from the environment; no torch here."""

import os
from dataclasses import dataclass

RENDEZVOUS = "MPFORMER_RENDEZVOUS"
"""Variable with the file of the rendezvous: rank 0 writes its address and port there, the others read them."""


@dataclass(frozen=True)
class Rank:
    """This process among the ``world_size`` processes of a run; ``local`` counts those of its own node."""

    number: int = 0
    world_size: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """True in the one process that writes files."""
        return self.number == 0


def current_rank() -> Rank:
    """Read the rank of this process from ``RANK``/``WORLD_SIZE``/``LOCAL_RANK`` or Slurm's step variables."""
    world_size = _number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1)
    if world_size == 1:
        return Rank()
    return Rank(_number("RANK", "SLURM_PROCID"), world_size, _number("LOCAL_RANK", "SLURM_LOCALID"))


def _number(*names: str, default: int = 0) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)
