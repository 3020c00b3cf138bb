"""Several processes of this command train one run, a GPU each, as ``train_net.py --num-gpus`` has it."""

import os
import subprocess
import sys
from typing import TypeGuard

from experiments.launch import machine
from mpformer.config.schema import Config
from mpformer.runtime.errors import UserError
from mpformer.runtime.rank import current_rank


def on_gpus(config: Config, count: int | None) -> Config:
    """Return the configuration on ``count`` GPUs: on the CPU for 0, as it is for None or a device that it names.

    Raises UserError if there are not as many.
    """
    if count is None:
        return config
    if count == 0:
        return config.replace({"runtime.device": "cpu"})
    if config.runtime.device == "cpu":  # processes on the CPU
        return config
    there = machine.cuda_devices()
    if count > there:
        raise UserError(f"--num-gpus is {count} but there {'is' if there == 1 else 'are'} {there} here; 0 is the CPU")
    return config.replace({"runtime.device": "cuda"}) if config.runtime.device == "auto" else config


def several(count: int | None) -> TypeGuard[int]:
    """Whether this process is to start others: more than one is asked for, and it is none of them."""
    return count is not None and count > 1 and current_rank().world_size == 1


def start(count: int) -> int:
    """Execute this very command in ``count`` processes that torchrun starts; returns the exit code."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*torchrun, "-m", "experiments.cli.main", *sys.argv[1:]]
    return subprocess.run(command, env={"OMP_NUM_THREADS": "1"} | dict(os.environ), check=False).returncode
