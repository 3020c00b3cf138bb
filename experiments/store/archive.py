"""Finished runs packed into one file each: ``runs/<run id>.zip``, with every file that the run's directory had.

Less may be kept of a run (:class:`Keeping`): the archive's manifest then names each file that was left out, with its
checksum and size.

The records of a packed run are read straight from its archive (:class:`experiments.store.run_dir.RunDir`), everything
else from a copy that is unpacked for the reading process; whoever changes a run unpacks it into its place first. An
archive is complete and compared with the files before they go, and a directory beside an archive comes first, so that
a process may die at any time.
"""

import contextlib
import io
import json
import lzma
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from experiments.store import records
from experiments.store.files import hidden_beside, replacing, sync, unless_kept
from experiments.store.records import Record, RecordError
from mpformer.runtime.disk import sha256

SUFFIX = ".zip"
_MANIFEST = "archive.json"
_PACKED_ALREADY = (".parquet", ".pth", ".pkl", ".png", ".zip")


class Keeping(StrEnum):
    """What an archive keeps of a run. All but the first write tables anew, so that they take less space."""

    WHOLE = "whole"
    """Every file as it is."""
    NO_IMAGES = "no-images"
    """All but the images on which the stored masks lie."""
    LIGHT = "light"
    """What happened and what came out of it: without weights, per-image tables and stored masks."""

    def leaves_out(self, name: PurePosixPath) -> bool:
        """Whether a file, by its path in the run's directory, is not kept."""
        if self is Keeping.LIGHT:
            return not _HEAVY.isdisjoint(name.parts)
        return self is Keeping.NO_IMAGES and name.suffix == ".png"


WEIGHTS = "checkpoints"
_HEAVY = frozenset({WEIGHTS, "per_image.parquet", "layer_masks", "further_masks"})


@dataclass(frozen=True)
class LeftOut:
    """A file that an archive was made without."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ArchiveRecord(Record):
    """``archive.json`` inside an archive: when it was made, when each file was changed, and what is not in it."""

    remedy: ClassVar[str] = "take its archive from a backup"

    run_id: str
    time: float
    changed: Mapping[str, Any] = field(default_factory=dict)
    """Nanoseconds since 1970 by file."""
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    """The run's other files."""
    rewritten: Mapping[str, Any] = field(default_factory=dict)
    """Checksums of the tables that were written anew, as they were; their content is the same."""

    def without(self, part: str) -> bool:
        """Whether a file or folder of this name was left out."""
        return any(part in PurePosixPath(name).parts for name in self.left_out)


def remove(folder: Path) -> None:
    """Remove a directory in whose place an archive stands: at once for everybody who looks."""
    aside = hidden_beside(folder)
    folder.rename(aside)
    shutil.rmtree(aside)


def write(folder: Path, target: Path, without: Collection[Path] = (), keeping: Keeping = Keeping.WHOLE) -> None:
    """Pack a run's directory into the file ``target``; hidden files, and those of ``without``, are no part of it.

    Raises OSError, leaving no file.
    """
    with replacing(target) as temporary:
        _write(folder, temporary, without, keeping)


def copy(archive: Path, target: Path) -> None:
    """Copy an archive to the file ``target``.

    Raises RecordError for one that is not what its manifest says, OSError, leaving no file.
    """
    with _as_said(archive) as (packed, _):
        if (damaged := packed.testzip()) is not None:
            raise RecordError(f"{archive} is damaged ({damaged}): {ArchiveRecord.remedy}")
    with replacing(target) as temporary:
        shutil.copy2(archive, temporary)
        sync(temporary)


def _write(folder: Path, archive: Path, without: Collection[Path], keeping: Keeping) -> None:
    """Write an archive to the disk and read it again; raises OSError if it is not what was meant to be written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    names = {path.relative_to(folder).as_posix(): path for path in files if path not in without}
    left_out = {name: path for name, path in names.items() if keeping.leaves_out(PurePosixPath(name))}
    kept = {name: path for name, path in names.items() if name not in left_out}
    tables = {} if keeping is Keeping.WHOLE else _plain_tables(kept)
    about = ArchiveRecord(
        folder.name,
        time.time(),
        {name: path.stat().st_mtime_ns for name, path in kept.items()},
        {name: LeftOut(sha256(path), path.stat().st_size) for name, path in left_out.items()},
        {name: sha256(kept[name]) for name in tables},
    )
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False, compresslevel=9) as packed:
        for name, path in kept.items():
            if name in tables:
                packed.writestr(name, tables[name], zipfile.ZIP_LZMA)
            else:
                packed.write(path, name, zipfile.ZIP_STORED if path.suffix in _PACKED_ALREADY else None)
        packed.writestr(_MANIFEST, json.dumps(records.encode(about)))
    sync(archive)
    with zipfile.ZipFile(archive) as packed:
        if packed.testzip() is not None or set(packed.namelist()) != {*kept, _MANIFEST}:
            raise OSError(f"{archive} is not what was written")


def _plain_tables(files: Mapping[str, Path]) -> dict[str, bytes]:
    """The Parquet tables among the files, without dictionaries and compression of their own: LZMA takes a third more
    off them then. What is no table, or would not come back equal, stays as it is.
    """
    import pyarrow.parquet as pq

    plain = {}
    for name, path in files.items():
        if path.suffix == ".parquet":
            with contextlib.suppress(ValueError):  # pyarrow's ArrowInvalid
                table, buffer = pq.read_table(path), io.BytesIO()
                pq.write_table(table, buffer, compression="none", use_dictionary=False)
                again = pq.read_table(io.BytesIO(buffer.getvalue()))
                if again.schema.equals(table.schema, check_metadata=True) and again.to_pandas().equals(
                    table.to_pandas()
                ):
                    plain[name] = buffer.getvalue()
    return plain


def manifest(archive: Path) -> ArchiveRecord:
    """Return what an archive says of itself; raises RecordError for a damaged one."""
    content = read(archive, _MANIFEST)
    return records.decode(ArchiveRecord, content, f"{archive}: {_MANIFEST}")


def read(archive: Path, name: str) -> Any:
    """Return the JSON file ``name`` of an archive; None if there is no archive, or no such file in it.

    Raises RecordError for a damaged archive.
    """
    return unless_kept(archive, name, lambda: _read(archive, name), None)


def _read(archive: Path, name: str) -> Any:
    try:
        with _opened(archive) as packed:
            return json.loads(packed.read(name))
    except (FileNotFoundError, KeyError):
        return None


def unpack(archive: Path, target: Path, without: Collection[str] = ()) -> None:
    """Unpack an archive as the directory ``target``, but for what lies in the folders ``without``.

    A directory that is there already is left alone. Raises RecordError for a damaged archive, and OSError.
    """
    try:
        with _as_said(archive) as (packed, about), replacing(target) as aside:
            for name in about.changed:
                if name.partition("/")[0] not in without:
                    packed.extract(name, aside)
                    os.utime(aside / name, ns=(about.changed[name],) * 2)
    except OSError:
        if not target.is_dir():  # otherwise somebody was faster
            raise


@contextlib.contextmanager
def _as_said(archive: Path) -> Iterator[tuple[zipfile.ZipFile, ArchiveRecord]]:
    """An archive and its manifest; raises RecordError if it has not the files that its manifest names."""
    about = manifest(archive)
    with _opened(archive) as packed:
        if set(packed.namelist()) != {*about.changed, _MANIFEST}:
            raise RecordError(f"{archive} is damaged (not what its {_MANIFEST} says): {ArchiveRecord.remedy}")
        yield packed, about


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(archive) as packed:
            yield packed
    except (zipfile.BadZipFile, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise RecordError(f"{archive} is damaged ({error}): {ArchiveRecord.remedy}") from None
