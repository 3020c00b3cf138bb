"""What this machine has for workers (processors, memory, GPUs; by the kernel and by control group), how many fit."""

import contextlib
import ctypes
import os
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.suites import scales


@dataclass(frozen=True)
class Width:
    """How many workers, and threads each."""

    workers: int
    threads: int


def fit(width: Width | None, runs: int) -> Width:
    """Return the width that fits the machine: a worker a core (or GPU) with one thread, as many as memory allows."""
    if width is not None:
        return replace(width, workers=max(1, min(width.workers, runs)))
    gpus = len(visible_gpus())
    by_memory = max(1, int(available_gib() // scales.DECLARED_GIB))
    return Width(max(1, min(gpus or cores(), by_memory, runs)), 1)


def cores() -> int:
    """Return the number of processors that this process may use, by affinity and by control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(int(quota) / int(period))))
    return count


def available_gib() -> float:
    """Return the memory that is free to use, in GiB, by the kernel and by control group; infinite if unknown."""
    free = float("inf")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, (limit - used) / 2**30)
    return free


def visible_gpus() -> list[int]:
    """Return the GPUs of this machine by number, without asking CUDA."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [int(part) for part in listed.split(",") if part.strip().isdigit()]
    return sorted(int(path.name[6:]) for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())


def cuda_devices() -> int:
    """Return the number of GPUs that the CUDA driver offers to this process, without torch; 0 if there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0
