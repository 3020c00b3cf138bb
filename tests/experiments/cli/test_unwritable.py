"""The line names the file that could not be written, and the option that chose its place (issue 12, 5.10)."""

import errno
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from experiments.cli import unwritable

Usage = namedtuple("Usage", "total used free")


def test_the_option_whose_folder_it_is_is_named(tmp_path: Path) -> None:
    words = ("report", "headline", "--out", str(tmp_path / "out"), f"--root={tmp_path / 'store'}")
    read_only = OSError(errno.EROFS, "Read-only file system", str(tmp_path / "out" / "table.md"))
    assert unwritable.line(read_only, words) == (
        f"cannot write {tmp_path}/out/table.md: Read-only file system; choose a folder that can be written with --out"
    )
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "store" / "runs"))
    assert unwritable.line(denied, words).endswith("choose a folder that can be written with --root")


def test_a_copy_names_what_is_written_not_what_is_read(tmp_path: Path) -> None:
    copying = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "from"), None, str(tmp_path / "store/to"))
    assert unwritable.line(copying, ("import-runs", "x", "--root", str(tmp_path / "store"))) == (
        f"cannot write {tmp_path}/store/to: No space left on device; free some space there, or choose another folder "
        "with --root"
    )


def test_a_full_disk_that_names_no_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: Usage(9, 9, 0) if Path(path).name == "full" else Usage(9, 0, 9)
    )
    said = unwritable.line(
        OSError(errno.ENOSPC, "No space left on device"), ("x", "--data-root", str(tmp_path / "full"))
    )
    assert said.startswith(f"cannot write into {tmp_path}/full: No space left on device; free some space there")
    assert said.endswith("with --data-root")
