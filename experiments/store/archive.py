"""Finished runs packed into one file each: ``runs/<run id>.zip``, with every file that the run's directory had.

The records of a packed run are read straight from its archive (:class:`experiments.store.run_dir.RunDir`), everything
else from a copy that is unpacked for the reading process; whoever changes a run unpacks it into its place first. An
archive is complete and compared with the files before they go, and a directory beside an archive comes first, so that
a process may die at any time.
"""

import contextlib
import json
import os
import shutil
import time
import uuid
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from experiments.store import records
from experiments.store.files import sync
from experiments.store.records import Record, RecordError

SUFFIX = ".zip"
_MANIFEST = "archive.json"
_PACKED_ALREADY = (".parquet", ".pth", ".pkl", ".png", ".zip")


@dataclass(frozen=True)
class ArchiveRecord(Record):
    """``archive.json`` inside an archive: when it was made, and when each file was changed."""

    remedy: ClassVar[str] = "take its archive from a backup"

    run_id: str
    time: float
    changed: Mapping[str, Any] = field(default_factory=dict)
    """Nanoseconds since 1970 by file."""


def pack(folder: Path, target: Path, without: Collection[Path] = ()) -> None:
    """Pack a run's directory into the file ``target`` and remove it; hidden files, and those of ``without``, go.

    Raises OSError, leaving the directory as it was.
    """
    temporary = _beside(target)
    try:
        _write(folder, temporary, without)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    aside = _beside(folder)
    folder.rename(aside)
    shutil.rmtree(aside)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def _write(folder: Path, archive: Path, without: Collection[Path]) -> None:
    """Write an archive to the disk and read it again; raises OSError if it is not what was meant to be written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    names = {path.relative_to(folder).as_posix(): path for path in files if path not in without}
    about = ArchiveRecord(folder.name, time.time(), {name: path.stat().st_mtime_ns for name, path in names.items()})
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as packed:
        for name, path in names.items():
            packed.write(path, name, zipfile.ZIP_STORED if path.suffix in _PACKED_ALREADY else None)
        packed.writestr(_MANIFEST, json.dumps(records.encode(about)))
    sync(archive)
    with zipfile.ZipFile(archive) as packed:
        if packed.testzip() is not None or set(packed.namelist()) != {*names, _MANIFEST}:
            raise OSError(f"{archive} is not what was written")


def read(archive: Path, name: str) -> Any:
    """Return the JSON file ``name`` of an archive; None if there is no archive, or no such file in it.

    Raises RecordError for a damaged archive.
    """
    try:
        with _opened(archive) as packed:
            return json.loads(packed.read(name))
    except (FileNotFoundError, KeyError):
        return None


def unpack(archive: Path, target: Path, without: Collection[str] = ()) -> None:
    """Unpack an archive as the directory ``target``, but for what lies in the folders ``without``.

    A directory that is there already is left alone. Raises RecordError for a damaged archive, and OSError.
    """
    aside = _beside(target)
    try:
        with _opened(archive) as packed:
            about = records.decode(ArchiveRecord, json.loads(packed.read(_MANIFEST)), f"{archive}: {_MANIFEST}")
            for name in about.changed:
                if name.partition("/")[0] not in without:
                    packed.extract(name, aside)
                    os.utime(aside / name, ns=(about.changed[name],) * 2)
        aside.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise somebody was faster
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(archive) as packed:
            yield packed
    except (zipfile.BadZipFile, ValueError) as error:
        raise RecordError(f"{archive} is damaged ({error}): {ArchiveRecord.remedy}") from None
