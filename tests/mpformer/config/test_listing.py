"""Every key of the configuration is listed with its type, default and meaning (issue 12, 3)."""

from mpformer.config.dotted import MISSING, leaves
from mpformer.config.listing import difference, keys
from mpformer.config.paper_settings import setting
from mpformer.config.presets import changes
from mpformer.config.schema import Config, valid_keys


def test_every_key_has_a_type_and_a_meaning() -> None:
    found = keys()
    assert [key.name for key in found] == valid_keys()
    assert not [key.name for key in found if not key.meaning or not key.type]
    assert {key.name for key in found if key.default is MISSING} == {
        "dataset.name",
        "dataset.task",
        "model.backbone.name",
    }


def test_types_say_what_may_be_written() -> None:
    types = {key.name: key.type for key in keys()}
    assert types["toggles.flip_noise"] == "number >= 0, <= 1"
    assert types["toggles.mask_noise"] == "point | shift | scale | shift-scale"
    assert types["toggles.mp_groups"] == "integer | text"
    assert types["schedule.steps"] == "list of integer"
    assert types["dataset.augmentation.crop_size"] == "2 x integer | null"
    assert {"resnet", "swin"} <= set(types["model.backbone.kind"].split(" | "))


def test_defaults_are_those_of_a_configuration() -> None:
    config = Config.model_validate({"dataset": {"name": "coco", "task": "instance"}})
    tree = dict(leaves(config.model_dump(mode="json")))
    assert {key.name: key.default for key in keys() if key.name in tree and key.default is not MISSING} == {
        name: value
        for name, value in tree.items()
        if name not in ("dataset.name", "dataset.task", "dataset.added", "extra_cfg", "dataset.shapes")
    }


def test_a_base_gives_its_values_for_the_keys_that_it_has() -> None:
    base = setting("coco/instance/swin-l-100ep")
    found = {key.name: key.default for key in keys(base)}
    assert found["model.backbone.embed_dim"] == 192
    assert "model.backbone.depth" not in found
    assert found == {name: value for name, value in leaves(base.model_dump(mode="json")) if name in valid_keys()}


def test_the_release_differs_from_the_paper_in_these_keys() -> None:
    """Issue 12, 5.13."""
    base = setting("coco/instance/r50-12ep")
    paper, release = (base.replace(changes(f"mp-former/{name}")) for name in ("paper", "release"))
    assert difference(paper, release) == {
        "toggles.point_noise": (0.2, 0.0),
        "toggles.query_position": (True, False),
        "toggles.pilot_padding": ("masked", "reference"),
        "schedule.class_mean": ("global", "per-rank"),
    }
