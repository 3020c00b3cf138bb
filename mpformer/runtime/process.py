"""What a training or evaluation sets in its process: threads, kernels, the device."""

import contextlib
import ctypes
import os
import resource
import socket
import tempfile
from pathlib import Path

import torch

from mpformer.runtime.errors import UserError
from mpformer.runtime.rank import current_rank

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of malloc.h."""
_KEPT = 1 << 30
_LARGEST_KEPT = 32 << 20
"""A larger piece goes back to the system when it is freed; glibc takes no larger limit."""


def prepare_process(device: str, threads: int, *, deterministic: bool = True, tf32: bool = True) -> torch.device:
    """Set threads and kernels; returns the device of that name (``auto``: CUDA where there is one).

    ``deterministic`` and ``tf32`` are for GPUs (``runtime.deterministic``, ``runtime.tf32``); on CPUs kernels always
    repeat their sums and float32 is float32. Operators without a deterministic kernel warn and run anyway.
    Raises UserError for an unknown device, or for CUDA where there is none.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    found = device_of(device)
    deterministic = deterministic or found.type == "cpu"
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # filling new memory is for finding bugs, not for determinism, and takes a few per cent of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if found.type == "cuda":
        _prepare_cuda(found, deterministic, tf32)
    return found


def keep_freed_memory() -> None:
    """Have the C library keep up to 1 GiB of freed memory for the next step (glibc; nothing changes elsewhere).

    By itself it gives what a step frees back to the system, and the next step is given it again page by page: 3,100
    page faults a step of the mini study, a twelfth of its time on a virtual machine. Peak memory stays the same.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def device_of(name: str) -> torch.device:
    """Return the device of that name; UserError for an unknown one and for CUDA where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"runtime.device is {name!r} but there is no CUDA here; valid: auto, cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown runtime.device {name!r}; valid: auto, cpu, cuda, cuda:0 ...") from None


def _prepare_cuda(device: torch.device, deterministic: bool, tf32: bool) -> None:
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    os.environ.setdefault("TRITON_CACHE_DIR", str(triton_cache()))
    if device.index is None:
        torch.cuda.set_device(current_rank().local)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    # what is fastest is found by trying, so that two starts may choose differently
    torch.backends.cudnn.benchmark = not deterministic


def triton_cache() -> Path:
    """A directory of this node and user for compiled Triton kernels, made if it is not there.

    Homes are shared by the nodes of a cluster and slow to lock; what lies in a directory of someone else would be run.
    """
    base = Path(tempfile.gettempdir())
    path = base / f"mpformer-triton-{os.getuid()}-{socket.gethostname()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    about = path.lstat()
    ours = path.is_dir() and not path.is_symlink() and about.st_uid == os.getuid() and not about.st_mode & 0o022
    return path if ours else Path(tempfile.mkdtemp(prefix="mpformer-triton-", dir=base))


def kernel_settings(device: torch.device) -> dict[str, str | bool]:
    """How the kernels of this process compute, for the record of a run; read back from torch."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    found: dict[str, str | bool] = {"resume": _exactness(device, deterministic), "deterministic kernels": deterministic}
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
        found["TF32 products"] = torch.get_float32_matmul_precision() != "highest"
        found["TF32 convolutions"] = torch.backends.cudnn.allow_tf32
        found["search for the fastest convolutions"] = torch.backends.cudnn.benchmark
    return found


def _exactness(device: torch.device, deterministic: bool) -> str:
    if device.type == "cpu":
        return "bit-exact"
    if deterministic:
        return "not bit-exact: the gradient of deformable attention is added in any order"
    return "not bit-exact: runtime.deterministic is off"


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the CUDA allocator, or the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
