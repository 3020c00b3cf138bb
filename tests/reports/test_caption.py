"""What a caption calls the parts of a model."""

from typing import Any

import pytest

from mpformer.config.paper_settings import BACKBONES
from mpformer.config.presets import PRESETS
from reports import caption


@pytest.mark.parametrize(
    ("stored", "title"),
    [
        *((BACKBONES[name].config.model_dump(), title) for name, title in
          {"r50": "R50", "r101": "R101", "swin-t": "Swin-T", "swin-l": "Swin-L"}.items()),
        ({"kind": "resnet", "depth": 18, "res2_channels": 32}, "R18 (narrow)"),
        ({"kind": "swin", "embed_dim": 32, "depths": [2, 2, 2, 2]}, "Swin-32"),
        ({"kind": "of a later version", "width": 8}, "of a later version"),
    ],
)  # fmt: skip
def test_backbones_have_the_fields_names(stored: dict[str, Any], title: str) -> None:
    assert caption.backbone(stored) == title


def test_the_release_is_its_toggles_and_its_class_mean() -> None:
    """Issue 12, 5.13."""
    toggles = PRESETS["mp-former/release"].model_dump(mode="json")
    assert caption.preset(toggles, {"schedule.class_mean": "per-rank"}) == "mp-former/release"
    assert caption.preset(toggles) == ""
    assert caption.preset({**toggles, "pilot_padding": "masked"}, {"schedule.class_mean": "per-rank"}) == ""


def test_a_run_from_before_a_toggle_was_added_still_has_its_preset() -> None:
    stored = PRESETS["mp-former/paper"].model_dump(mode="json")
    assert caption.preset(stored) == "mp-former/paper"
    del stored["redraw"]
    assert caption.preset(stored) == "mp-former/paper"
    assert caption.preset({**stored, "point_noise": 0.3}) == ""
