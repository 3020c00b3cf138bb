import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from experiments.store import identity
from experiments.store.identity import canonical, eval_id, part_of, run_id, run_identity
from experiments.suites.scales import base
from mpformer.config.listing import Key, keys
from mpformer.config.schema import Config, Section, Toggles, plain, validate
from mpformer.runtime.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden" / "identity.json"
BASE = base("mini").replace({"dataset.fingerprint": "f" * 64, "model.init_weights": "whole.pth"})

CHANGES: dict[str, Any] = {
    "dataset.fingerprint": "e" * 64,
    "dataset.train_images": 7,
    "dataset.shapes.blur": 0.5,
    "dataset.augmentation.flip": False,
    "model.queries": 31,
    "model.backbone.norm": "FrozenBN",
    "model.attention_strides": (32, 16, 8),
    "model.init_checksum": "a" * 64,
    "model.reinit_class_head": True,
    "model.init_classes": "coco/panoptic",
    "toggles.mp_queries": True,
    "toggles.query_position": False,
    "schedule.max_iter": 1201,
    "schedule.batch_size": 6,
    "schedule.clip_norm": 0.0,
    "seed": 1,
}
NO_CHANGES: dict[str, Any] = {
    "runtime.workers": 3,
    "runtime.threads": 2,
    "runtime.accumulation": 4,
    "runtime.device": "cuda",
    "runtime.deterministic": False,
    "runtime.tf32": False,
    "runtime.slow_attention": True,
    "model.init_weights": "/somewhere/else.pkl",
    "evaluation.val_images": 5,
    "toggles.point_noise": 0.4,  # mp_queries is off
    "toggles.mp_groups": "budget-100",
}
PILOTED = BASE.replace({"toggles.mp_queries": True})
PILOT_CHANGES: dict[str, Any] = {
    "guided_layers": "first-5",
    "point_noise": 0.4,
    "mask_noise": "shift",
    "flip_noise": 0.1,
    "mp_groups": 2,
    "class_embedding": "learnt",
    "class_embedding_layers": "every",
    "query_position": False,
    "pilot_padding": "reference",
    "redraw": "once",
    "layer0_supervision": False,
}


def test_committed_ids_never_change() -> None:
    """A field was added: declare its legacy value; a rule changed: raise SCHEME and these are orphans on purpose."""
    for case in json.loads(GOLDEN.read_text()):
        config = validate(case["config"])
        assert (run_id(config), eval_id(config)) == (case["run_id"], case["eval_id"])


@pytest.mark.parametrize("key", CHANGES)
def test_what_can_change_the_weights_changes_the_id(key: str) -> None:
    assert run_id(BASE.replace({key: CHANGES[key]})).split("-")[-1] != run_id(BASE).split("-")[-1]


@pytest.mark.parametrize("key", NO_CHANGES)
def test_what_cannot_change_the_weights_leaves_the_id(key: str) -> None:
    assert run_id(BASE.replace({key: NO_CHANGES[key]})) == run_id(BASE)


@pytest.mark.parametrize("name", Toggles.model_fields)
def test_every_toggle_is_part_of_the_id(name: str) -> None:
    value = PILOT_CHANGES[name] if name != "mp_queries" else False
    assert run_id(PILOTED.replace({f"toggles.{name}": value})) != run_id(PILOTED)


@pytest.mark.parametrize(("value", "same"), [("first-6", True), ("first-99", True), ("first-5", False)])
def test_guiding_at_least_all_layers_is_guiding_every_layer(value: str, same: bool) -> None:
    assert (run_id(PILOTED.replace({"toggles.guided_layers": value})) == run_id(PILOTED)) is same


def test_first_1_is_first() -> None:
    one, other = (PILOTED.replace({"toggles.guided_layers": value}) for value in ("first", "first-1"))
    assert run_id(one) == run_id(other)


def test_evaluation_has_an_id_of_its_own() -> None:
    other = BASE.replace({"evaluation.val_images": 5})
    assert eval_id(other) != eval_id(BASE)
    assert eval_id(BASE.replace({"seed": 3, "runtime.threads": 2})) == eval_id(BASE)


class _Before(Section):
    noise: float = 0.0


class _After(Section):
    noise: float = 0.0
    kind: Literal["point", "line"] = Field("line", json_schema_extra={"legacy": "point"})
    shape: tuple[int, ...] = Field((), json_schema_extra={"legacy": []})


def test_a_field_added_later_orphans_no_old_run() -> None:
    assert plain(_After(kind="point")) == plain(_Before())
    assert plain(_After()) == {"noise": 0.0, "kind": "line"}
    assert plain(_After(kind="point", shape=(1,))) == {"noise": 0.0, "shape": [1]}


def test_a_toggle_added_later_orphans_no_old_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(Toggles):
        smoothing: float = Field(0.0, json_schema_extra={"legacy": 0.0})

    before = run_id(PILOTED)
    old = Later(**PILOTED.toggles.model_dump())
    assert identity._digest(run_identity(PILOTED.model_copy(update={"toggles": old}))) == before[-12:]
    new = old.model_copy(update={"smoothing": 0.5})
    assert identity._digest(run_identity(PILOTED.model_copy(update={"toggles": new}))) != before[-12:]


def other(value: Any, text: str) -> Any:
    """A value that the key's type admits and that is not its own."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float) and "|" not in text:
        return value / 2 if isinstance(value, float) and value else value + 1
    names = [name for name in text.split(" | ") if name not in ("text", "integer", "null", str(value))]
    return names[0] if names else value


@pytest.mark.parametrize("key", keys(PILOTED), ids=lambda key: key.name)
def test_what_the_listing_says_of_ids_is_so(key: Key) -> None:
    """Issue 12, 3: `mpformer config` says of each key which id it changes."""
    changed = {"seed": 7, **CHANGES, **NO_CHANGES, **{f"toggles.{name}": v for name, v in PILOT_CHANGES.items()}}
    value = changed.get(key.name, other(key.default, key.type))
    try:
        config = PILOTED.replace({key.name: value})
    except UserError:
        pytest.skip("has one valid value, or hangs on another key")
    if config == PILOTED:
        pytest.skip("no other value was found")
    ids = {"run": run_id(config) != run_id(PILOTED), "evaluation": eval_id(config) != eval_id(PILOTED)}
    said = part_of(key.name).removeprefix("piloted ")
    assert ids == {name: name == said for name in ids}


@pytest.mark.parametrize("name", PILOT_CHANGES)
def test_piloting_toggles_are_part_of_piloted_runs_ids_alone(name: str) -> None:
    plain_run = BASE.replace({f"toggles.{name}": PILOT_CHANGES[name]})
    assert (part_of(f"toggles.{name}") == "piloted run") == (run_id(plain_run) == run_id(BASE))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_what_json_cannot_say_cannot_be_part_of_an_id(value: object) -> None:
    with pytest.raises(UserError, match="plain JSON"):
        run_id(BASE.model_copy(update={"extra_cfg": {"A": value}}))


_values = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "schedule.max_iter": st.integers(1, 10**6),
        "schedule.base_lr": st.floats(1e-8, 1, allow_nan=False),
        "toggles.mp_queries": st.booleans(),
        "toggles.point_noise": st.floats(0, 2, allow_nan=False),
        "toggles.flip_noise": st.floats(0, 1, allow_nan=False),
        "toggles.guided_layers": st.sampled_from(["first", "first-3", "every"]),
    }
)


@given(_values)
def test_the_id_survives_a_round_trip_through_a_file(changes: dict[str, Any]) -> None:
    config = BASE.replace(changes)
    again = validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert (run_id(again), eval_id(again)) == (run_id(config), eval_id(config))


@given(_values, _values)
def test_two_configurations_share_an_id_only_if_they_train_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = BASE.replace(one), BASE.replace(other)
    assert (run_id(first) == run_id(second)) == (_trains(first) == _trains(second))


def _trains(config: Config) -> str:
    """What trains, said independently of the hash."""
    toggles = config.toggles.model_dump() if config.toggles.mp_queries else {"mp_queries": False}
    return canonical([config.seed, config.schedule.model_dump(), toggles])


@given(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8), max_size=5))
def test_the_order_of_keys_does_not_matter(tree: dict[str, Any]) -> None:
    assert canonical(tree) == canonical(dict(reversed(tree.items())))
