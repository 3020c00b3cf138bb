"""What a training or evaluation sets in its process: threads, deterministic kernels, the device."""

import resource

import torch

from mpformer.config.schema import Config
from mpformer.runtime.distributed import place
from mpformer.runtime.errors import UserError


def prepare_process(config: Config) -> torch.device:
    """Set threads and deterministic kernels; returns the device (``auto``: CUDA where there is one).

    Operators without a deterministic kernel (CUDA's ``grid_sample`` backward) warn and run anyway.
    """
    torch.set_num_threads(config.runtime.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # filling new memory is for finding bugs, not for determinism, and takes a few per cent of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    name = config.runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"runtime.device is {name!r} but there is no CUDA here; valid: auto, cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown runtime.device {name!r}; valid: auto, cpu, cuda, cuda:0 ...") from None
    if device.type == "cuda" and device.index is None:
        torch.cuda.set_device(place().local_rank)
    return device


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the CUDA allocator, or the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
