"""Files of the store: what is waited for, and what is not."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.store import attempt_dir
from experiments.store.attempt_dir import AttemptDir
from experiments.store.files import PATIENCE, json_lines, names_in, on_network, read_json, remembering, side_by_side


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
    """Each of the last four waits until all four were begun, which one after the other would never end."""
    together = threading.Barrier(4, timeout=30)

    def work(item: int) -> int:
        time.sleep(0.001) if item < PATIENCE else together.wait()
        return item * item

    items = range(PATIENCE + 4)
    assert side_by_side(work, items) == [item * item for item in items]


def test_what_needs_no_waiting_is_done_by_one_thread() -> None:
    threads = set(side_by_side(lambda _: threading.get_ident(), range(40)))
    assert threads == {threading.get_ident()}


def test_what_is_watched_is_read_again_once_it_has_changed(tmp_path: Path) -> None:
    """Files, directories that did not change lately, and what is not there."""
    metrics, seen = tmp_path / "metrics.jsonl", []
    metrics.write_text('{"kind": "evaluation", "iteration": 1}\n')
    os.utime(tmp_path, (1, 1))
    sys.addaudithook(lambda event, found: seen.append(event) if event in ("open", "os.listdir") else None)

    def look() -> tuple[list[str], int, object]:
        seen.clear()
        return names_in(tmp_path), len(json_lines(metrics)), read_json(tmp_path / "none.json")

    with remembering():
        before = look()
        assert before == (["metrics.jsonl"], 1, None)
        assert seen.count("os.listdir") == 1
        assert look() == before
        assert not seen
        with metrics.open("a") as file:
            file.write('{"kind": "evaluation", "iteration": 2}\n')
        (tmp_path / "none.json").write_text("{}")
        assert (sorted(look()[0]), look()[1:]) == (["metrics.jsonl", "none.json"], (2, {}))
        assert seen == ["os.listdir"], "a directory that has just changed may change again in the same moment"
