"""Files as the store writes and reads them: whole or not at all, in as few system calls as it takes."""

import contextlib
import errno
import json
import math
import os
import resource
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a file so that readers see the old or the new content, never a part; raises OSError, leaving the old.

    Not ``durable``: without waiting for the disk, for what can be made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a hidden path beside ``target``, in whose place the file or folder comes that the block makes there.

    If the block raises, or a folder is there already (OSError), nothing of it is left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden_beside(target)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def hidden_beside(path: Path) -> Path:
    """Return a path beside another one that nobody has and that lists of runs leave out; the ending stays."""
    return path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")


def write_json(path: Path, content: Any) -> None:
    """Write plain data atomically; NaN and infinity are refused with ValueError."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the parsed file, or None if it is absent or damaged."""
    return unless_kept(path, "json", lambda: _read_json(path), None)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_content(path))
    except (OSError, ValueError):
        return None


_kept: dict[tuple[Path, object], tuple[tuple[int, int, int], Any]] | None = None
"""What was made of files and directories, with their inode, size and time of change; None: nothing is kept."""

SETTLED = 5.0
"""Seconds after which what changed a directory, and may do so again within the same tick of a clock, is the past."""


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Read a file while the block runs only if it has changed since it was read: for tables that are watched.

    What :func:`read_json`, :func:`json_lines` and the like return must not be changed meanwhile.
    """
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def unless_kept(path: Path, kind: object, read: Callable[[], T], absent: T) -> T:
    """Return what a file was read as, where that is kept and the file still the same; else what it is read as now.

    ``absent`` is what a missing one is read as.
    """
    if _kept is None:
        return read()
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return absent
    except OSError:
        return read()
    mark = (found.st_ino, found.st_size, found.st_mtime_ns)
    known = _kept.get((path, kind))
    if known is not None and known[0] == mark:
        return cast(T, known[1])
    made = read()
    if not stat.S_ISDIR(found.st_mode) or found.st_mtime < time.time() - SETTLED:
        _kept[path, kind] = (mark, made)
    return made


def _content(path: Path) -> bytes:
    """The file's bytes, in as few system calls as it takes: thousands of small files are looked at at a time."""
    descriptor = os.open(path, os.O_RDONLY)
    parts = []
    try:
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
    finally:
        os.close(descriptor)
    return b"".join(parts)


def append_json(path: Path, line: Mapping[str, Any], *, durable: bool = False) -> None:
    """Append one line of JSON in a single write; ``durable``: and wait for the disk.

    A line that a crash cut short is ended first, so that it spoils no other. Raises OSError, also for a line of which
    a full disk took a part only: the part is taken back.
    """
    append_line(path, json.dumps(dict(line)), durable=durable)


def append_line(path: Path, line: str, *, durable: bool = False) -> None:
    """The same of a line of any text."""
    data = f"{line}\n".encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data
        try:
            write_whole(descriptor, data, path)
        except OSError:
            if size <= os.fstat(descriptor).st_size < size + len(data):  # otherwise somebody has appended meanwhile
                os.ftruncate(descriptor, size)
            raise
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(descriptor: int, data: bytes, path: Path) -> None:
    """Write in a single write; raises OSError too where a full disk takes a part only."""
    if os.write(descriptor, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def sync(path: Path) -> None:
    """Wait until the disk has what was written to a file; nothing to do where there is none. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_lines(path: Path, holding: bytes = b"") -> tuple[dict[str, Any], ...]:
    """Return the objects of a file with one JSON object a line, of the lines that hold a text.

    Damaged lines are left out, an absent file is empty.
    """
    return unless_kept(path, holding, lambda: _json_lines(path, holding), ())


def _json_lines(path: Path, holding: bytes) -> tuple[dict[str, Any], ...]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return ()
    parsed = (_parsed(line) for line in lines if holding in line)
    return tuple(line for line in parsed if isinstance(line, dict))


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


PATIENCE = 16
"""Waits for a disk after which it counts as a slow one."""


def side_by_side(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return what ``work`` makes of each item, in their order, from four threads once it has waited for a slow disk.

    Files in the kernel's cache are read faster by one thread; more than four keep each other from running.
    """
    rest, waits, made = iter(items), _waits(), []
    for item in rest:
        made.append(work(item))
        if _waits() - waits >= PATIENCE:
            break
    with ThreadPoolExecutor(4) as pool:
        return made + list(pool.map(work, rest))


def _waits() -> int:
    """How often this process has waited for something, by the kernel's count of voluntary switches."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


_NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "gluster", "afs", "9p", "panfs", "fuse.")


def on_network(directory: Path, table: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether a directory is on a network file system, by Linux' table of mounts; False without one."""
    try:
        device = directory.stat().st_dev
        mounts = [line.split() for line in table.read_text().splitlines()]
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    kinds = [mount[mount.index("-") + 1] for mount in mounts if mount[2] == number]
    return bool(kinds) and kinds[-1].startswith(_NETWORK)


def tail(path: Path, size: int) -> str:
    """Return the last ``size`` bytes of a text file, empty if there is none."""
    return unless_kept(path, size, lambda: _tail(path, size), "")


def _tail(path: Path, size: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - size))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def is_finite(value: Any) -> bool:
    """Whether every number inside plain data is finite."""
    if isinstance(value, Mapping):
        return all(is_finite(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(is_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def modified(path: Path) -> float:
    """Return when a file was changed last, in seconds since 1970; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def names_in(directory: Path) -> list[str]:
    """Return the names in a directory but for hidden ones, in no order; none if it is absent."""
    return unless_kept(directory, "names", lambda: _names_in(directory), [])


def _names_in(directory: Path) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
