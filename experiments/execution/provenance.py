"""Where a number comes from: code, command, host, packages, threads, world size, job. Outside every id."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from experiments.store.attempt_dir import Execution, Git, Provenance, read_git
from mpformer.runtime.code import ROOT
from mpformer.runtime.rank import current_rank

PACKAGES = (
    "mpformer", "torch", "torchvision", "detectron2", "numpy", "scipy", "pydantic", "submitit", "mlflow", "pycocotools",
    "hotcoco", "panopticapi", "panopticapi-lite", "cityscapesscripts", "deformops", "triton", "torch-ms-deform-attn",
    "opencv-python-headless", "pillow", "pyarrow",
)  # fmt: skip
"""Packages that can change a number."""

_CODE = ("analysis/*.py", "mpformer/*.py", "experiments/*.py", "pyproject.toml")
"""What can change a number; an edited report template does not make a run's code dirty."""

DIFF_LIMIT = 200_000
"""Characters of the working tree's difference that are kept."""


def collect(threads: int | None = None) -> Provenance:
    """Return the provenance of this process."""
    return Provenance(
        time=time.time(),
        git=git(),
        command=(Path(sys.argv[0]).name, *sys.argv[1:]),
        host=socket.gethostname(),
        platform=platform.platform(),
        processor=processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        python=platform.python_version(),
        packages=packages(),
        threads=threads,
        world_size=current_rank().world_size,
        **{**asdict(execution()), "job_id": job_id()},
        environment={key: value for key, value in os.environ.items() if key in _ENVIRONMENT},
    )


_ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG")


def job_id() -> str:
    """Return the scheduler's id of this job, empty if there is none."""
    names = ("SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID")
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def execution() -> Execution:
    """Return what tells this start of a Slurm job's step from every other, and the node; empty outside Slurm."""
    if not os.environ.get("SLURM_JOB_ID"):
        return Execution()
    array = [os.environ.get(name, "") for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")]
    return Execution(
        job_id=job_id(),
        array_id="_".join(array) if all(array) else "",
        step=os.environ.get("SLURM_STEP_ID", ""),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        nodes=os.environ.get("SLURM_JOB_NODELIST", ""),
    )


@functools.cache
def packages() -> dict[str, str]:
    """Return the versions of the installed packages that can change a number."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def git() -> Git:
    """Return commit and uncommitted difference of the code that runs; empty values outside a git checkout.

    In a snapshot (:mod:`experiments.slurm.code_snapshot`) they are those of the checkout that it was taken from.
    """
    known = read_git(ROOT)
    if known is not None:
        return known
    sha = _git("rev-parse", "HEAD")
    difference = _git("diff", "HEAD", "--no-color", "--", *_CODE) if sha else ""
    untracked = _git("ls-files", "--others", "--exclude-standard", "--", *_CODE).split() if sha else []
    dirty = bool(difference or untracked)
    return Git(sha, dirty, tuple(untracked), difference[:DIFF_LIMIT], len(difference) > DIFF_LIMIT)


def processor() -> str:
    """Return the processor's model name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            errors="replace",
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.rstrip("\n")
