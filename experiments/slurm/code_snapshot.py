"""The code that jobs run: copied at submission, so that editing the checkout changes nothing that waits in a queue.

A snapshot lies in the store, ``code/<digest>``, one for each state of the code, whatever number of launches run from
it. It holds the four packages, the profiles, pyproject.toml, in which the command line finds the commands of other
packages, and ``snapshot.json`` with the commit and the uncommitted difference that it was taken from
(:func:`experiments.execution.provenance.git` reads it there).
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from experiments.execution import provenance
from experiments.store.attempt_dir import Git, write_git
from experiments.store.files import replacing
from experiments.store.run_dir import Store
from mpformer.runtime.code import PACKAGES, ROOT

_FOLDERS = (*PACKAGES, "slurm/profiles")
_LEFT_OUT = ("__pycache__", ".pyc")


def take(store: Store) -> Path:
    """Return the snapshot of the code as it is now, made if it is not there; raises OSError if it cannot be."""
    files = _files()
    target = folder(store, files)
    try:
        if not target.is_dir():
            with replacing(target) as temporary:
                _write(temporary, files, provenance.git())
    except OSError:
        if not target.is_dir():  # otherwise another launch was faster
            raise
    return target


def folder(store: Store, files: dict[str, bytes] | None = None) -> Path:
    """Return where the snapshot of the code as it is now (``files``, if they were read) lies, or would lie."""
    files = _files() if files is None else files
    digest = hashlib.sha256(str(provenance.git().sha).encode())
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return store.root.resolve() / "code" / digest.hexdigest()[:16]


def _files() -> dict[str, bytes]:
    return {str(path.relative_to(ROOT)): path.read_bytes() for path in _paths()}


def _paths() -> Iterator[Path]:
    for path in (ROOT / "pyproject.toml", *(path for name in _FOLDERS for path in sorted((ROOT / name).rglob("*")))):
        if path.is_file() and not any(part.endswith(_LEFT_OUT) for part in path.parts):
            yield path


def _write(folder: Path, files: dict[str, bytes], origin: Git) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    write_git(folder, origin)
