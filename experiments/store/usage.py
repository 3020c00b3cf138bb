"""``usage.json``: what Slurm's accounting said of jobs that are over.

A launch has one file, whose jobs are named by their batch and index. A run has one of its own only where it was
imported, or comes from a store older than the launches' files; there jobs are named by their Slurm ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.store import records
from experiments.store.records import Record

FILE = "usage.json"


@dataclass(frozen=True)
class Usage(Record):
    """The accounted jobs of one launch, or of one run."""

    jobs: Mapping[str, Any] = field(default_factory=dict)
    """What accounting said, by job: seconds, memory, GPUs, exit code; a launch's jobs say their run too."""
    unknown: tuple[str, ...] = ()
    """Jobs that accounting does not know and never will."""


def read(folder: Path) -> Usage:
    """Return what is written in a launch's or a run's directory; empty if there is nothing, or a damaged file."""
    return records.load_sound(Usage, folder / FILE) or Usage()


def write(folder: Path, usage: Usage) -> None:
    """Replace what is written in a launch's or a run's directory."""
    records.save(folder / FILE, usage)
