"""What a caption calls the parts of a model."""

from dataclasses import replace
from typing import Any

import pytest

from experiments.store.suite_record import SuiteRecord
from mpformer.config.paper_settings import BACKBONES, setting
from mpformer.config.presets import PRESETS, changes
from reports import caption
from reports.collect import RowRuns, tick_columns


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
    assert caption.preset_toggles(toggles, {"schedule.class_mean": "per-rank"}) == "mp-former/release"
    assert caption.preset_toggles(toggles) == ""
    assert caption.preset_toggles({**toggles, "pilot_padding": "masked"}, {"schedule.class_mean": "per-rank"}) == ""


RECORD = SuiteRecord("points", "paper", "coco", ())


def preset_of(
    given: dict[str, Any], overrides: dict[str, Any] | None = None, name: str = "coco/instance/r50-12ep"
) -> str:
    config = setting(name).replace(given)
    record = replace(RECORD, overrides=overrides or {})
    return caption.preset(record, config.toggles.model_dump(mode="json"), given, config.model_dump(mode="json"))


MP_FORMER = {f"toggles.{key}": value for key, value in PRESETS["mp-former/paper"].model_dump().items()}


def test_a_preset_is_claimed_only_if_everything_that_it_fixes_is_equal() -> None:
    assert preset_of(MP_FORMER) == "mp-former/paper"
    assert preset_of(MP_FORMER | {"runtime.workers": 2}) == "mp-former/paper", "what changes no result"
    assert preset_of(MP_FORMER | {"toggles.point_noise": 0.3}) == ""
    assert preset_of(MP_FORMER | {"model.queries": 50}) == ""
    assert preset_of(MP_FORMER | {"schedule.base_lr": 2e-4}) == ""
    fifty = setting("coco/instance/r50-50ep").schedule.model_dump()
    published = {f"schedule.{key}": value for key, value in fifty.items()}
    assert preset_of(MP_FORMER | published) == "mp-former/paper", "another setting of the paper"
    assert preset_of(MP_FORMER | {"model.queries": 50}, {"model.queries": 50}) == ""
    given, config = MP_FORMER | published, setting("coco/instance/r50-50ep").replace(MP_FORMER).model_dump(mode="json")
    del config["model"]["reinit_class_head"]
    assert caption.preset(RECORD, config["toggles"], given, config) == "mp-former/paper", (
        "stored before the key was added"
    )
    assert preset_of(changes("mp-former/release")) == "mp-former/release"
    assert preset_of(published | changes("mp-former/release")) == "mp-former/release"


def test_a_run_from_before_a_toggle_was_added_still_has_its_preset() -> None:
    stored = PRESETS["mp-former/paper"].model_dump(mode="json")
    assert caption.preset_toggles(stored) == "mp-former/paper"
    del stored["redraw"]
    assert caption.preset_toggles(stored) == "mp-former/paper"
    assert caption.preset_toggles({**stored, "point_noise": 0.3}) == ""
    rows = [RowRuns("row", "row", toggles, {}, ()) for toggles in (stored, {**stored, "redraw": "once"})]
    assert [column.key for column in tick_columns(rows)] == ["redraw"]
