"""Where this code lies (a checkout, or a snapshot of one), and what a process needs that is to run it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Folder of the packages that this process runs."""

PACKAGES = ("analysis", "mpformer", "experiments", "reports")

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Variables that say how many threads a process may use; libraries read them when they are loaded."""


def environment(threads: int) -> dict[str, str]:
    """Return the variables by which a new process imports this very code, and uses that many threads."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**dict.fromkeys(THREADS, str(threads)), "PYTHONPATH": path}


@contextmanager
def variables(given: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process, which its children inherit, while the block runs."""
    before = dict(os.environ)
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
