"""The gallery of a page: cases of the fixture store, their pictures. The rule is tested in tests/analysis."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reports import mask_pictures, pages
from reports.collect import SuiteReport
from tests.support.present import present

Gather = Callable[..., SuiteReport]


def test_cases_are_the_worst_of_each_run_aligned_by_object(gather: Gather) -> None:
    found = pages.find_gallery(gather("headline"))
    assert found is not None
    assert found.names == ("Mask2Former", "MP-Former")
    assert len(found.cases) == 6
    keys = [(case.image_id, case.object) for case in found.cases]
    assert len(set(keys)) == 6
    for case in found.cases:
        assert case.chosen.final_score >= 0.5
        assert case.drop == pytest.approx(1 - present(present(case.chosen.worst(2)).iou_previous))
        ours, theirs = map(present, case.tracks)
        assert ours.query != theirs.query  # never aligned by query index
        assert {len(track.steps) for track in (ours, theirs)} == {7}
    drops = [case.drop for case in found.cases if case.chosen_by == 0]
    assert drops == sorted(drops, reverse=True)


def test_paths_cover_the_mask() -> None:
    mask = np.array([[1, 1, 0], [0, 1, 0]], bool)
    assert mask_pictures.fill_path(mask) == "M0 0h2v1h-2zM1 1h1v1h-1z"
    assert mask_pictures.outline_path(mask).count("M") == 8  # the perimeter in cell edges


def test_missing_masks_mean_no_gallery(gather: Gather, store: Path) -> None:
    for index in store.glob("runs/*/evals/*/layer_masks/index.json"):
        index.unlink()
    assert pages.find_gallery(gather("headline")) is None


def test_damaged_picture_is_a_grey_pixel(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("not a picture")
    assert mask_pictures.picture_uri(tmp_path / "x.png").startswith("data:image/png;base64,")
