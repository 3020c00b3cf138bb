"""The typed configuration: a backbone chosen by name."""

import pytest

from experiments.store.identity import run_id
from experiments.suites.scales import base
from mpformer.config.schema import Config, SwinConfig, TimmConfig
from mpformer.runtime.errors import UserError

MINI = base("mini")
NAME = "model.backbone.name"


def test_a_name_chooses_a_timm_backbone_and_leaves_the_other_keys_of_the_model() -> None:
    chosen = MINI.replace({"model.backbone.freeze_at": 2, NAME: "timm/convnext_tiny"})
    assert chosen.model.backbone == TimmConfig(name="timm/convnext_tiny", freeze_at=2)
    assert chosen.model.backbone.title == "convnext_tiny"
    assert chosen.replace({"model.backbone": MINI.model.backbone.model_dump()}) == MINI
    other = chosen.replace({NAME: "timm/convnext_atto"})
    assert other.model.backbone == TimmConfig(name="timm/convnext_atto", freeze_at=2), "one timm model after another"


def test_a_kind_chooses_a_backbone_that_begins_with_its_own_defaults() -> None:
    chosen = MINI.replace({"model.backbone.window": 4, "model.backbone.kind": "swin"})
    assert chosen.model.backbone == SwinConfig(window=4)
    assert chosen.replace({"model.backbone.kind": "swin"}) == chosen
    with pytest.raises(UserError, match=r"model\.backbone: .*'nin'.*'resnet', 'swin', 'timm'"):
        MINI.replace({"model.backbone.kind": "nin"})
    with pytest.raises(UserError, match="weights of another backbone"):
        base("paper").replace({"model.backbone.kind": "swin"})


def test_name_arguments_and_weights_of_a_backbone_are_part_of_the_run_id() -> None:
    changes: list[dict[str, object]] = [
        {},
        {NAME: "timm/convnext_tiny"},
        {NAME: "timm/convnext_atto"},
        {NAME: "timm/convnext_atto", "model.backbone.arguments": {"depths": [1, 1, 1, 1]}},
        {NAME: "timm/convnext_atto", "model.backbone.freeze_at": 1},
        {NAME: "timm/convnext_atto", "model.init_checksum": "a" * 64},
    ]
    assert len({run_id(MINI.replace(change)) for change in changes}) == len(changes)


def test_weights_of_the_backbone_before_are_not_kept() -> None:
    r50 = base("paper")
    with pytest.raises(UserError, match=r"R-50\.pkl are weights of another backbone: .*set model\.init_weights too"):
        r50.replace({NAME: "timm/convnext_tiny"})
    random = r50.replace({NAME: "timm/convnext_tiny", "model.init_weights": ""})
    assert random.replace({NAME: "timm/convnext_atto"}).model.init_weights == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NAME: "convnext_tiny"}, "valid: timm/ and the name of a model, such as timm/convnext_tiny"),
        ({NAME: "timm/convnext_tiny.in12k"}, "timm/convnext_tiny with timm://convnext_tiny.in12k there"),
        ({NAME: "timm/x", "model.backbone.depth": 50}, "unknown configuration key"),
        ({NAME: "timm/x", "model.backbone.arguments": {"num_classes": 3}}, "num_classes cannot be given"),
        ({NAME: "timm/x", "model.backbone.arguments": 3}, "invalid value for model.backbone.timm.arguments"),
    ],
)
def test_mistakes_in_a_backbone_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MINI.replace(changes)


def test_a_timm_backbone_survives_the_way_through_a_cfg_node() -> None:
    from mpformer.config.mask2former_yaml import from_cfg, to_cfg

    config: Config = MINI.replace({NAME: "timm/test_convnext", "model.backbone.arguments": {"depths": [1, 1, 1, 1]}})
    assert from_cfg(to_cfg(config)) == config
