"""Where a dataset's files come from, who reads them, and what makes them complete: one ``SOURCE`` a dataset. No torch.

The entry of a dataset (:mod:`mpformer.config.datasets`) names the module whose ``SOURCE`` is a :class:`Release` (the
layout of an official download) or a :class:`Prepared` set (written by this project, see
:mod:`mpformer.data.coco_layout`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mpformer.config.datasets import dataset
from mpformer.config.schema import DatasetConfig
from mpformer.data.chunks import Progress

Read = Callable[[Path, str, frozenset[str]], Sequence[dict[str, Any]]]
"""Takes the directory, ``train`` or ``val``, and tasks; returns the records of :mod:`mpformer.data.catalog`, packed in
the order of image ids, or in any order as a list."""


@dataclass(frozen=True)
class Expected:
    """A file, or a folder that holds ``count`` files with a suffix (also in its subfolders), and what needs it."""

    path: str
    needed_for: str
    count: int = 0
    suffix: str = ""


@dataclass(frozen=True)
class Release:
    """An official download below the data root. Its identity is the release, not the files' checksums."""

    identity: str
    read: Read
    files: tuple[Expected, ...]
    """What a complete one has, paths below the data root."""
    advice: str
    """Where to get it."""
    labels: Callable[[Path, Path], Path]
    """Takes the data root and a validation image; where the image's semantic labels are."""
    convert: Callable[[Path, Progress | None, int | None], dict[str, str]]
    """Writes what training reads and the download lacks; returns the checksums of the files that it wrote."""


@dataclass(frozen=True)
class Prepared:
    """A set that this project writes, one directory a version."""

    read: Read
    prepare: Callable[[DatasetConfig, Path, Path | None, Progress | None, int | None], Path]
    """Takes the configuration, the data root, the user's source, progress and the number of processes."""
    command: str
    """The command that makes it."""
    advice: str = ""
    """More on the command."""
    fingerprint: Callable[[DatasetConfig], str] | None = None
    """The identity that its parameters alone give it: `launch` makes such a set by itself. None: from its files."""
    crop: int = 0
    """Default side of its crops."""
    current: Callable[[DatasetConfig, Path], str] | None = None
    """The fingerprint of the version under a data root that a configuration means; None: the only one of its crop."""


def source_of(name: str) -> Release | Prepared:
    """Return the ``SOURCE`` of a dataset; UserError, with the names that there are, for an unknown one.

    The module of the sets that users add makes one for each name.
    """
    source: Release | Prepared | Callable[[str], Prepared] = import_module(dataset(name).module).SOURCE
    return source if isinstance(source, Release | Prepared) else source(name)
