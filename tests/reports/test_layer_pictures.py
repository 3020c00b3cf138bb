"""RLE against pycocotools, and the gallery's rule on hand-made masks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reports import gallery, site
from reports.collect import SuiteReport
from reports.rle import decode, iou, mask_of

Gather = Callable[..., SuiteReport]


@settings(max_examples=60, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_rle_is_read_as_pycocotools_writes_it(mask: np.ndarray) -> None:
    from pycocotools import mask as coco

    written = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert (decode(written["counts"].decode(), *mask.shape) == mask).all()
    assert (mask_of({"counts": written["counts"].decode(), "size": list(mask.shape)}, 0, 0) == mask).all()


def test_rle_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="the mask has 3 x 3"):
        decode("4", 3, 3)


def test_iou_of_two_empty_masks_is_nan() -> None:
    empty = np.zeros((2, 2), bool)
    assert np.isnan(iou(empty, empty))
    assert iou(~empty, ~empty) == 1.0


def test_cases_are_the_worst_of_each_run_aligned_by_object(gather: Gather) -> None:
    found = site.find_gallery(gather("headline"))
    assert found is not None
    assert found.names == ("Mask2Former", "MP-Former")
    assert len(found.cases) == 6
    keys = [(case.image_id, case.object) for case in found.cases]
    assert len(set(keys)) == 6
    for case in found.cases:
        assert case.chosen.final_score >= 0.5
        assert case.drop == pytest.approx(1 - case.chosen.worst.iou_previous)
        ours, theirs = case.tracks
        assert ours.query != theirs.query  # never aligned by query index
        assert {len(track.steps) for track in case.tracks} == {7}
    drops = [case.drop for case in found.cases if case.chosen_by == 0]
    assert drops == sorted(drops, reverse=True)


def test_gallery_agrees_with_the_analysis(gather: Gather) -> None:
    found = site.find_gallery(gather("headline"))
    converted = gallery.as_analysis_cases(found.cases, found.names)
    for case, other in zip(found.cases, converted, strict=True):
        assert (other.layer, other.drop) == (case.layer, case.drop)
        assert {frame.layer for frame in other.strips[0].frames} == {case.layer - 1, case.layer, 6}


def test_unsure_queries_and_steady_ones_are_no_case() -> None:
    mask = np.ones((2, 2), bool)
    steps = [gallery.Step(i, mask, 0.3, "x", None if i == 0 else 0.1, 0.5) for i in range(3)]
    unsure = gallery.Track(0, tuple(steps))
    steady = gallery.Track(
        1, tuple(gallery.Step(s.layer, mask, 0.9, "x", 1.0 if s.layer else None, 1.0) for s in steps)
    )
    assert gallery._worst({7: [{0: unsure, 1: steady}]}, 0, 3, set()) == []


def test_paths_cover_the_mask() -> None:
    mask = np.array([[1, 1, 0], [0, 1, 0]], bool)
    assert gallery.fill_path(mask) == "M0 0h2v1h-2zM1 1h1v1h-1z"
    assert gallery.outline_path(mask).count("M") == 8  # the perimeter in cell edges


def test_missing_masks_mean_no_gallery(gather: Gather, store: Path) -> None:
    for index in store.glob("runs/*/evals/*/layer_masks/index.json"):
        index.unlink()
    assert site.find_gallery(gather("headline")) is None


def test_damaged_picture_is_a_grey_pixel(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("not a picture")
    assert gallery.picture_uri(tmp_path / "x.png").startswith("data:image/png;base64,")
