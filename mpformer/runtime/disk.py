"""Checksums of files, and one clear failure for a disk that is full, read-only or broken. No torch."""

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpformer.runtime.errors import RunFailure

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
DISK = frozenset({*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG})
"""Errors of a disk that is full, and of one that does not take what is written."""


def sha256(path: Path) -> str:
    """Checksum of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_failures(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into ``RunFailure("disk", one line)``."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        reason = f"cannot write {path.name}: {error.strerror}; free space or choose a writable --root"
        raise RunFailure("disk", reason) from error
