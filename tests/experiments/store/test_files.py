"""Files of the store: what is waited for, and what is not."""

import os
import threading
from pathlib import Path

import pytest

from experiments.store import attempt_dir
from experiments.store.attempt_dir import AttemptDir
from experiments.store.files import on_network, side_by_side


@pytest.mark.parametrize(("kind", "network"), [("nfs4", True), ("lustre", True), ("ext4", False), ("tmpfs", False)])
def test_a_network_file_system_is_known_by_the_table_of_mounts(tmp_path: Path, kind: str, network: bool) -> None:
    device = tmp_path.stat().st_dev
    table = tmp_path / "mountinfo"
    lines = [
        "21 1 0:19 / /proc rw - proc proc rw",
        f"40 1 {os.major(device)}:{os.minor(device)} / / rw shared:1 - {kind} s rw",
    ]
    table.write_text("\n".join(lines) + "\n")
    assert on_network(tmp_path, table) is network
    assert not on_network(tmp_path, tmp_path / "none"), "where there is no such table"


def test_progress_waits_for_no_disk_and_spares_file_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(os, "fsync", waited.append)
    attempt = AttemptDir(tmp_path / "1")
    attempt.write_progress({"stage": "train", "iteration": 3})
    assert (attempt.progress().iteration, waited) == (3, [])
    for network, seconds in ((True, 10.0), (False, 1.0)):
        monkeypatch.setattr(attempt_dir, "on_network", lambda _, answer=network: answer)
        assert attempt.progress_seconds == seconds


def test_slow_files_are_waited_for_together() -> None:
    """Each of four waits until all four were begun, which one after the other would never end."""
    together = threading.Barrier(4, timeout=30)

    def work(item: int) -> int:
        together.wait()
        return item * item

    assert side_by_side(work, range(4)) == [0, 1, 4, 9]
