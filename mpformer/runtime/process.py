"""What a training or evaluation sets in its process: threads, deterministic kernels, the device."""

import resource

import torch

from mpformer.runtime.errors import UserError
from mpformer.runtime.rank import current_rank


def prepare_process(device: str, threads: int) -> torch.device:
    """Set threads and deterministic kernels; returns the device of that name (``auto``: CUDA where there is one).

    Raises UserError for an unknown device, or for CUDA where there is none.
    Operators without a deterministic kernel (CUDA's ``grid_sample`` backward) warn and run anyway.
    """
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # filling new memory is for finding bugs, not for determinism, and takes a few per cent of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"runtime.device is {device!r} but there is no CUDA here; valid: auto, cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown runtime.device {device!r}; valid: auto, cpu, cuda, cuda:0 ...") from None
    if found.type == "cuda" and found.index is None:
        torch.cuda.set_device(current_rank().local)
    return found


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the CUDA allocator, or the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
