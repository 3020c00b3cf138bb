"""The page's pictures: of sets whose images are not kept they show masks and outlines alone."""

import shutil
from pathlib import Path
from typing import Any

import pictures
import pytest
from answers import Kept

from analysis import failure_cases
from tests.reports.conftest import FIXTURES


@pytest.mark.parametrize("images", [True, False])
def test_no_photograph_is_drawn_unless_it_may_be(images: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FIXTURES, tmp_path / "store")
    report = Kept(tmp_path / "store").report("headline", "shapes")
    assert report is not None
    shown: list[Any] = []

    def seen(path: Path | None) -> Any:
        shown.append(failure_cases.pixels(path))
        return shown[-1]

    monkeypatch.setattr("analysis.film_strip.pixels", seen)
    assert pictures.jumps(report, images=images) is not None
    assert shown
    assert all((picture is not None) == images for picture in shown)
