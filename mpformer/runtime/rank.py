"""Which process this is among those that train one run together, from the environment; no torch here."""

import os
from dataclasses import dataclass


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


def _number(*names: str, default: int = 0) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)
