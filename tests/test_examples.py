"""The examples run as they are printed."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.support.own_set import write_own_set

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NUMBERS = ", ".join(rf"{name} (?:[\d.]+|none)" for name in ("loss", "IoU-gt", "mIoU-L", "Util", "jump-rate"))


def test_training_with_and_without_piloting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_own_set(tmp_path)
    files = [str(own.root / "train.json"), str(own.root / "val.json")]
    folders = ["--images", str(own.root / "train"), "--val-images", str(own.root / "val")]
    small = ["--minutes", "0", "--side", "64", "--queries", "5", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", ["huggingface_piloting.py", *files, *folders, *small])
    runpy.run_path(str(EXAMPLES / "huggingface_piloting.py"), run_name="__main__")
    without, with_piloting = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"without piloting: 1 steps, {NUMBERS}", without)
    assert re.fullmatch(rf"   with piloting: 1 steps, {NUMBERS}", with_piloting)
