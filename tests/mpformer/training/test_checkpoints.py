"""Checkpoints: atomic, checksummed, fall back, name their failures; metrics cut back to them."""

import errno
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from mpformer.runtime.disk import sha256
from mpformer.runtime.errors import RunFailure
from mpformer.training import checkpoints
from mpformer.training.checkpoints import Checkpoints, cut_back, sidecar, verify


def state(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((1000,), value)}, "seconds": value}


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def names(store: Checkpoints) -> list[str]:
    return sorted(p.name for p in store.directory.iterdir())


def test_last_two_are_kept_and_the_newest_is_loaded(store: Checkpoints) -> None:
    for iteration in (2, 4, 10):
        store.save(iteration, state(iteration))
    assert [n for n in names(store) if n.endswith(".pth")] == ["iteration_0000004.pth", "iteration_0000010.pth"]
    assert len(names(store)) == 4  # each with its checksum, nothing temporary left
    loaded = store.load()
    assert loaded is not None
    assert loaded[0] == 10
    assert torch.equal(loaded[1]["model"]["w"], torch.full((1000,), 10.0))


def test_empty_directory_starts_from_zero(store: Checkpoints) -> None:
    assert store.load() is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "no checksum"])
def test_damaged_file_falls_back_with_a_warning(
    store: Checkpoints, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.save(2, state(2))
    newest = store.save(4, state(4))
    data = newest.read_bytes()
    if damage == "truncate":
        newest.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        newest.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    else:
        sidecar(newest).unlink()
    with caplog.at_level(logging.WARNING):
        loaded = store.load()
    assert loaded is not None
    assert loaded[0] == 2
    assert "iteration_0000004.pth" in caplog.text
    assert newest.exists()


def test_no_sound_file_starts_from_zero_with_a_warning(store: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    store.save(2, state(2)).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert store.load() is None
    assert "starts from iteration 0" in caplog.text


def test_lost_claim_leaves_the_previous_checkpoints(tmp_path: Path) -> None:
    claims = iter([None, RuntimeError("claim lost")])

    def confirm() -> None:
        if (error := next(claims)) is not None:
            raise error

    store = Checkpoints(tmp_path, confirm)
    first = store.save(1, state(1))
    with pytest.raises(RuntimeError, match="claim lost"):
        store.save(2, state(2))
    assert names(store) == sorted([first.name, sidecar(first).name])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_full_or_read_only_disk_is_named(store: Checkpoints, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store.save(1, state(1))

    def failing(self: Any, data: Any) -> int:
        self.error = OSError(code, "no room")
        raise self.error

    monkeypatch.setattr(checkpoints._Hashing, "write", failing)
    with pytest.raises(RunFailure, match="writable --root") as failure:
        store.save(2, state(2))
    assert failure.value.failure_class == "disk"
    monkeypatch.undo()
    loaded = store.load()
    assert loaded is not None
    assert loaded[0] == 1
    assert len(names(store)) == 2


def test_really_full_disk() -> None:
    with pytest.raises(OSError) as error:
        checkpoints._dump(Path("/dev/full"), state(1))
    assert error.value.errno == errno.ENOSPC


def test_final_weights_are_alone_checksummed_and_reproducible(store: Checkpoints) -> None:
    store.save(3, state(3))
    path, checksum = store.finish(state(3)["model"])
    assert path.name == "final.pth"
    assert verify(path)
    assert checksum == sha256(path)
    assert set(torch.load(path, weights_only=True)) == {"model"}
    again = Checkpoints(store.directory / "again")
    assert again.finish(state(3)["model"])[1] == checksum
    store.clear()
    assert [n for n in names(store) if n.startswith("iteration")] == []
    assert verify(path)


def line(iteration: int) -> str:
    return json.dumps({"kind": "train", "iteration": iteration}) + "\n"


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2) + line(3) + '{"kind": "tr')
    with path.open("a") as writer:  # a writer that was open before stays valid
        assert cut_back(path, 2) == 2
        writer.write(line(3))
    assert path.read_text() == line(1) + line(2) + line(3)


def test_half_written_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2)[:-1])
    assert cut_back(path, 5) == 1
    assert path.read_text() == line(1)


def test_cut_back_of_a_missing_file(tmp_path: Path) -> None:
    assert cut_back(tmp_path / "metrics.jsonl", 5) == 0
