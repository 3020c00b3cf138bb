"""Checkpoints that survive anything: atomic, checksummed, the last two kept; and the metrics file's end cut to fit.

A checkpoint is written beside its final name, flushed to the disk, confirmed (the caller may have lost
its claim on the run meanwhile) and renamed; its sha256 is written first, so that a file with its
final name always has a checksum to answer to. Reading takes the newest file whose bytes match.
"""

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mpformer.runtime.disk import disk_failures, sha256

FINAL = "final.pth"
_NAME = re.compile(r"iteration_(\d+)\.pth")
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, in ``directory``.

    ``confirm`` is called between writing a file and giving it its final name; whatever it raises
    leaves the previous checkpoints as they are.
    """

    def __init__(self, directory: Path, confirm: Callable[[], None] = lambda: None, keep: int = 2) -> None:
        self.directory = directory
        self._confirm = confirm
        self._keep = keep

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        """Write the state after `iteration` steps and forget all but the last ``keep``; raises RunFailure("disk")."""
        path = self.directory / f"iteration_{iteration:07d}.pth"
        write(path, state, self._confirm)
        for old in self._files()[self._keep :]:
            _remove(old)
        return path

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Return (iteration, state) of the newest sound checkpoint, or None to start from the beginning.

        A file that does not match its checksum is skipped with a warning, never deleted.
        """
        files = self._files()
        for path in files:
            if verify(path):
                return _iteration(path), torch.load(path, map_location="cpu", weights_only=True)
            _log.warning("checkpoint %s does not match its checksum: skipped", path.name)
        if files:
            _log.warning("no checkpoint in %s is sound: training starts from iteration 0", self.directory)
        return None

    def finish(self, weights: dict[str, torch.Tensor]) -> tuple[Path, str]:
        """Write the weights alone as ``final.pth``; returns the path and its sha256."""
        path = self.directory / FINAL
        return path, write(path, {"model": weights}, self._confirm)

    def clear(self) -> None:
        """Forget every resumable checkpoint (the final weights stay): called when the run is done."""
        for path in self._files():
            _remove(path)

    def _files(self) -> list[Path]:
        """Newest first."""
        return sorted((p for p in self.directory.glob("iteration_*.pth") if _NAME.fullmatch(p.name)), reverse=True)


def write(path: Path, state: dict[str, Any], confirm: Callable[[], None] = lambda: None) -> str:
    """Save `state` atomically with a ``.sha256`` beside it; returns the checksum.

    Raises RunFailure("disk") on a full, read-only or failing disk; a half-written file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_failures(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            checksum = _dump(temporary, state)
            confirm()
            _write_text(sidecar(path), f"{checksum}  {path.name}\n")
            os.replace(temporary, path)
            _sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return checksum


def verify(path: Path) -> bool:
    """True if `path` has a checksum file and its bytes match it."""
    try:
        return sidecar(path).read_text().split()[0] == sha256(path)
    except (OSError, IndexError):
        return False


def sidecar(path: Path) -> Path:
    """Where the checksum of `path` is kept."""
    return path.with_name(path.name + ".sha256")


def cut_back(path: Path, iteration: int) -> int:
    """Cut a ``metrics.jsonl`` after the last line of `iteration` or earlier; returns the number of lines kept.

    The file is truncated in place (its lines are in order of iteration), so that a writer that
    appends to it stays valid. A half-written last line goes too. A missing file is fine.
    """
    if not path.exists():
        return 0
    kept = end = 0
    with path.open("rb+") as file:
        for line in file:
            if not _belongs(line, iteration):
                break
            kept, end = kept + 1, end + len(line)
        file.truncate(end)
    return kept


def _belongs(line: bytes, iteration: int) -> bool:
    try:
        return line.endswith(b"\n") and int(json.loads(line)["iteration"]) <= iteration
    except (ValueError, KeyError, TypeError):
        return False


def _iteration(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match[1])


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    sidecar(path).unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Hashing(io.RawIOBase):
    """A file that hashes what is written to it, and remembers an OSError that torch would wrap."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return memoryview(data).nbytes


def _dump(path: Path, state: dict[str, Any]) -> str:
    with path.open("wb") as file:
        out = _Hashing(file)
        try:
            torch.save(state, out)  # type: ignore[arg-type]
        except RuntimeError:
            if out.error is None:
                raise
            raise out.error from None
        file.flush()
        os.fsync(file.fileno())
        return out.digest.hexdigest()
