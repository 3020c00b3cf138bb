import itertools
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.launch import costs
from experiments.status import standing
from experiments.status.states import State
from experiments.store.files import read_json, write_json
from experiments.store.run_dir import Store
from experiments.suites import catalogue, datasets, planning, scales
from experiments.suites import rows as rows_module
from experiments.suites.grid import grid
from experiments.suites.planning import Request, make, parse_override, parse_seeds
from experiments.suites.rows import Row, Suite
from mpformer.config.paper_settings import setting
from mpformer.runtime.errors import UserError


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("headlin"), r"unknown suite 'headlin'; valid: headline, components"),
        (Request("headline", scale="huge"), r"unknown scale 'huge'; valid: mini"),
        (Request("headline", dataset="coc"), r"unknown dataset at scale 'mini' 'coc'; valid: shapes, nuclei"),
        (Request("headline", rows=("mp",)), r"unknown row of suite 'headline' 'mp'; valid: mask2former, mp-former"),
        (
            Request("headline", overrides=(("toggles.noise", 1),)),
            r"unknown configuration key 'toggles\.noise'; nearest",
        ),
        (Request("headline", overrides=(("toggles.guided_layers", "last"),)), r"unknown value 'last'; valid: first"),
        (Request("headline", overrides=(("schedule.max_iter", -5),)), r"invalid value for schedule\.max_iter"),
        (
            Request("headline", overrides=(("toggles.mp_queries", False),)),
            r"'mask2former' and 'mp-former' are one",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_choices(request_: Request, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        make(request_, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("0-1000000000", "more than 1000, which is the most"),
        ("0-999,1000", "more than 1000, which is the most"),
        ("4294967296", "seed 4294967296 is too large; seeds go up to 4294967295"),
        ("0-99999999999999999999", "seeds go up to 4294967295"),
    ],
)
def test_seeds_without_bound_are_refused_with_it(text: str, bound: str) -> None:
    """Issue 12, 5.9: nothing is made before the bound is looked at, so that this costs no memory."""
    with pytest.raises(UserError, match=bound):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("evaluation.val_images", 501, "evaluation.val_images is 501, but shapes has 500 validation images"),
        ("runtime.device", "tpu", "unknown device; valid: auto, cpu, cuda, cuda:0"),
        ("runtime.device", "cuda:x", "unknown device; valid: auto, cpu, cuda, cuda:0"),
    ],
)
def test_a_value_beyond_its_bound_is_refused_with_it(key: str, value: Any, bound: str, tmp_path: Path) -> None:
    """Issue 12, 5.9."""
    with pytest.raises(UserError, match=bound):
        make(Request("headline", overrides=((key, value),)), tmp_path)
    make(Request("headline", overrides=(("evaluation.val_images", 500), ("runtime.device", "cuda:1"))), tmp_path)


@pytest.mark.parametrize(
    ("base", "size"),
    [
        ("coco/instance/r50-12ep", 5000),
        ("ade20k/panoptic/r50-160k-poly", 2000),
        ("cityscapes/instance/r50-90k-step", 500),
    ],
)
def test_more_validation_images_than_a_release_has_are_refused(base: str, size: int, tmp_path: Path) -> None:
    """Issue 12, 5.9."""
    config = setting(base)
    datasets.check_val_images(config.replace({"evaluation.val_images": size}), tmp_path)
    with pytest.raises(UserError, match=f"has {size} validation images"):
        datasets.check_val_images(config.replace({"evaluation.val_images": size + 1}), tmp_path)


def test_more_validation_images_than_a_prepared_set_has_are_refused(tmp_path: Path) -> None:
    """Issue 12, 5.9: how many it has is in its manifest."""
    splits = {"train": {"images": 20}, "val": {"images": 5}}
    write_json(tmp_path / "nuclei/0123456789ab/manifest.json", {"fingerprint": "0123456789abcdef", "splits": splits})
    config = scales.base("mini", "nuclei").replace({"dataset.fingerprint": "0123456789abcdef"})
    datasets.check_val_images(config.replace({"evaluation.val_images": 5}), tmp_path)
    with pytest.raises(UserError, match="nuclei has 5 validation images"):
        datasets.check_val_images(config.replace({"evaluation.val_images": 6}), tmp_path)


def test_set_refuses_only_rows_that_it_makes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 12, 3: rows that coincide without it, such as one reference under two names, may do so with it too."""
    rows = [Row("plain", "", {"toggles.mp_queries": False}), Row("reference", "", {"toggles.mp_queries": False})]
    rows += [Row(name, "", {"model.mask_weight": weight}) for name, weight in (("two", 2.0), ("three", 3.0))]
    monkeypatch.setitem(rows_module.SUITES, "twins", Suite("twins", "", lambda *_: rows, "plain"))
    plan = make(Request("twins", overrides=(("schedule.max_iter", 12),), seeds=(0,)), tmp_path)
    assert [run.run_id == plan.runs[0].run_id for run in plan.runs] == [True, True, False, False]
    with pytest.raises(
        UserError, match=r"with --set model\.mask_weight the rows 'plain' and 'two' are one and the same"
    ):
        make(Request("twins", overrides=(("model.mask_weight", 4.0),)), tmp_path)


@pytest.mark.parametrize("place", ["mini", "paper"])
def test_a_printed_command_works_in_any_folder(place: str, data_root: Path, store: Store) -> None:
    """Issue 12, 3: place, root and data root are in it."""
    suite = "headline" if place == "mini" else "ade20k-panoptic"
    plan = make(Request(suite, place), data_root)
    words = shlex.split(planning.command("retry", plan, store))
    where = [] if place == "mini" else ["--scale", "paper"]
    ends = ["--root", str(store.root.resolve()), "--data-root", str(data_root.resolve())]
    assert words == ["mpformer", "retry", suite, *where, *ends]
    assert "--data-root" not in planning.command("status", plan, store)


@pytest.mark.parametrize("text", ["max_iter", "=3", ""])
def test_an_override_without_key_and_value_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write KEY=VALUE"):
        parse_override(text)


def test_overrides_are_json_where_they_parse() -> None:
    parsed = [parse_override(text)[1] for text in ("a=3", "a=1e-4", "a=true", "a=[16, 8]", "a=first-4", "a=a=b")]
    assert parsed == [3, 1e-4, True, [16, 8], "first-4", "a=b"]


def test_seeds() -> None:
    assert parse_seeds("0,2,2") == (0, 2)
    assert parse_seeds("1-3,7") == (1, 2, 3, 7)
    for text in ("", "a", "1,", "3-1", "-1"):
        with pytest.raises(UserError, match="write 0,1,2 or 0-4"):
            parse_seeds(text)


@pytest.mark.parametrize("dataset", scales.datasets("mini"))
@pytest.mark.parametrize("name", catalogue.all_suites())
def test_every_suite_resolves_and_its_rows_differ(name: str, dataset: str, tmp_path: Path) -> None:
    suite = catalogue.find(name)
    if all(row.not_applicable for row in suite.rows("mini", dataset)):
        pytest.skip("no row applies")
    plan = make(Request(name, dataset=dataset), tmp_path)
    applicable = sum(not row.not_applicable for row in plan.rows)
    assert len(plan.unique) == len(plan.runs) == applicable * len(suite.seeds["mini"])
    keys = {key for row in plan.rows for key in row.changes}
    assert not {key for key in keys if key.startswith(("runtime.", "evaluation."))}


def test_rows_about_classes_say_why_they_do_not_apply_on_nuclei() -> None:
    rows = catalogue.find("components").rows("mini", "nuclei")
    assert [row.name for row in rows if row.not_applicable] == ["mp-flip"]
    assert "one class" in rows[-1].not_applicable
    assert all(row.not_applicable for row in catalogue.find("flip-noise").rows("mini", "nuclei"))


def test_components_are_cumulative() -> None:
    rows = catalogue.find("components").rows("mini", "shapes")
    for above, below in itertools.pairwise(rows[1:]):
        changed = {key for key in below.changes if above.changes.get(key) != below.changes[key]}
        assert len(changed) == 1, f"{below.name} changes {changed}"


def test_the_headline_comparison_holds_position_and_schedule_equal(tmp_path: Path) -> None:
    one, other = make(Request("headline", seeds=(0,)), tmp_path).runs
    assert one.config.schedule == other.config.schedule
    assert one.config.toggles.query_position is other.config.toggles.query_position is True


def test_the_headline_row_is_the_preset() -> None:
    from mpformer.config.presets import PRESETS

    _, row = catalogue.find("headline").rows("mini", "shapes")
    assert scales.base("mini").replace(dict(row.changes)).toggles == PRESETS["mp-former/paper"]


def test_a_row_in_two_suites_is_one_run(tmp_path: Path) -> None:
    headline = {run.run_id for run in make(Request("headline"), tmp_path).runs}
    components = {run.run_id for run in make(Request("components"), tmp_path).runs}
    assert headline < components


def test_milestones_move_along_with_the_number_of_iterations(tmp_path: Path) -> None:
    request = Request("schedule", rows=("mp-former,step",), seeds=(0,))
    full = make(request, tmp_path).runs[0].config
    half = full.schedule.max_iter // 2
    shorter = replace(request, overrides=(("schedule.max_iter", half),))
    config = make(shorter, tmp_path).runs[0].config
    shares = [step / full.schedule.max_iter for step in full.schedule.steps]
    assert [step / half for step in config.schedule.steps] == pytest.approx(shares, abs=1 / half)
    assert config.runtime.eval_period == pytest.approx(full.runtime.eval_period / 2, abs=0.5)
    given = replace(shorter, overrides=(*shorter.overrides, ("schedule.steps", [100, 200])))
    assert make(given, tmp_path).runs[0].config.schedule.steps == (100, 200)


def test_a_grid_is_a_product_with_readable_names() -> None:
    axes: dict[str, Any] = {"point_noise": [0, 0.2], "toggles.guided_layers": ["first", "every"], "seed": [3, 4]}
    rows = grid(axes, common={"toggles.mp_queries": True})
    names = [row.name for row in rows]
    assert names[:2] == ["point_noise=0,guided_layers=first", "point_noise=0,guided_layers=every"]
    assert len(set(names)) == 4
    labels = ["point noise 0, guided layers first", "point noise 0, guided layers every"]
    assert [row.label for row in rows[:2]] == labels, "what differs in two settings names both"
    assert rows[-1].changes == {
        "toggles.mp_queries": True,
        "toggles.point_noise": 0.2,
        "toggles.guided_layers": "every",
    }
    assert rows[-1].seeds == (3, 4)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("noise", "unknown axis 'noise'; valid: mp_queries"),
        ("redraw", "no values"),
        ("extra_cfg.SOLVER.NESTEROV", "nothing here reads SOLVER.NESTEROV"),
    ],
)
def test_a_grid_refuses_unknown_and_empty_axes(axis: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid({axis: []})


def test_a_suite_with_two_rows_of_one_name_or_no_baseline_is_refused() -> None:
    def twice(scale: str, dataset: str) -> list[Row]:
        return [Row("a", "A"), Row("a", "A again")]

    with pytest.raises(UserError, match="row 'a' twice"):
        Suite("s", "S", twice, "a").rows("mini", "shapes")
    with pytest.raises(UserError, match="unknown baseline row 'b'; valid: a"):
        Suite("s", "S", lambda scale, dataset: [Row("a", "A")], "b").rows("mini", "shapes")


def test_missing_data_is_said_with_its_remedy(tmp_path: Path) -> None:
    shapes = make(Request("headline"), tmp_path)
    assert shapes.data.preparable
    assert "mpformer data prepare shapes" in shapes.missing[0]
    nuclei = make(Request("headline", dataset="nuclei"), tmp_path)
    assert not nuclei.data.preparable
    assert "mpformer data prepare nuclei SRC" in nuclei.missing[0]


def _cropped(monkeypatch: pytest.MonkeyPatch, *crops: int | None) -> None:
    """A suite on nuclei whose rows say these crops."""
    changes = [{} if crop is None else {"dataset.crop": crop} for crop in crops]
    rows = [Row(f"row-{i}", "A row", {**of, "schedule.max_iter": 10 + i}) for i, of in enumerate(changes)]
    headline = rows_module.SUITES["headline"]
    made = replace(headline, name="crops", make=lambda scale, dataset: rows, baseline="row-0")
    monkeypatch.setitem(rows_module.SUITES, "crops", made)


def test_what_all_rows_say_of_the_set_is_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _cropped(monkeypatch, 96, 96)
    plan = make(Request("crops", dataset="nuclei"), tmp_path)
    assert plan.missing == (
        f"nuclei with 96-px crops is not in {tmp_path}; run: mpformer data prepare nuclei SRC --crop 96",
    )
    assert {run.config.dataset.crop for run in plan.runs} == {96}
    other = make(Request("crops", dataset="nuclei", overrides=(("dataset.crop", 64),)), tmp_path)
    assert {run.config.dataset.crop for run in other.runs} == {64}, "--set is the last word, as for every other key"


def test_rows_of_several_sets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _cropped(monkeypatch, 96, None)
    with pytest.raises(UserError, match=r"row 'row-0' has another dataset\.crop than other rows: the rows of a suite"):
        make(Request("crops", dataset="nuclei"), tmp_path)


def test_missing_initial_weights_are_said(data_root: Path) -> None:
    plan = make(Request("headline", overrides=(("model.init_weights", "/nowhere/r50.pkl"),)), data_root)
    assert "initial weights /nowhere/r50.pkl are not there; put the file at" in plan.missing[0]


def test_initial_weights_enter_the_id_by_their_checksum_not_their_place(data_root: Path, tmp_path: Path) -> None:
    (data_root / "weights").mkdir()
    for place in (tmp_path / "r50.pkl", data_root / "weights" / "r50.pkl"):
        place.write_bytes(b"weights")
    names = (str(tmp_path / "r50.pkl"), "detectron2://somewhere/r50.pkl", "")
    ids = [make(Request("headline", overrides=(("model.init_weights", n),)), data_root).runs[0].run_id for n in names]
    assert ids[0] == ids[1] != ids[2]
    (data_root / "weights" / "r50.pkl").write_bytes(b"other weights")
    assert make(Request("headline", overrides=(("model.init_weights", names[1]),)), data_root).runs[0].run_id != ids[1]


def test_a_record_gains_rows_and_seeds_and_keeps_another_setting_aside(data_root: Path, store: Store) -> None:
    short = (("schedule.max_iter", 12),)
    planning.write_record(
        make(Request("headline", rows=("mp-former",), seeds=(1,), overrides=short), data_root), store, "a"
    )
    path = planning.write_record(make(Request("headline", seeds=(0,), overrides=short), data_root), store, "b")
    record = read_json(path)
    seeds = {row["name"]: [run["seed"] for run in row["runs"]] for row in record["rows"]}
    assert seeds == {"mask2former": [0], "mp-former": [0, 1]}
    assert record["rows"][0]["toggles"]["mp_queries"] is False
    planning.write_record(make(Request("headline"), data_root), store, "c")
    record = read_json(path)
    assert [len(row["runs"]) for row in record["rows"]] == [1, 1]
    assert record["overrides"] == {}
    assert len(list((path.parent / "earlier").glob("headline@mini-*.json"))) == 1
    assert [record.suite for record in store.suite_records()] == ["headline"]


def test_what_acts_on_a_launch_finds_its_rows_seeds_and_overrides(data_root: Path, store: Store) -> None:
    launched = Request("headline", rows=("mp-former",), seeds=(3, 4), overrides=(("schedule.max_iter", 12),))
    assert planning.as_launched(Request("headline"), store) == Request("headline")
    planning.write_record(make(launched, data_root), store, "")
    assert planning.as_launched(Request("headline"), store) == launched
    assert planning.as_launched(Request("headline", seeds=(4,)), store).seeds == (4,)
    runs = {run.run_id for run in make(launched, data_root).runs}
    assert {run.run_id for run in make(planning.as_launched(Request("headline"), store), data_root).runs} == runs


def test_the_record_of_another_dataset_has_a_file_of_its_own(tmp_path: Path, store: Store) -> None:
    path = planning.write_record(make(Request("components", dataset="nuclei"), tmp_path), store, "")
    assert path.name == "components@mini+nuclei.json"
    record = read_json(path)
    assert record["rows"][-1]["runs"] == []
    assert "one class" in record["rows"][-1]["not_applicable"]
    assert set(record["not_applicable_columns"]) == {"PQ", "mIoU"}


def test_a_thousand_runs_are_planned_at_once(data_root: Path, store: Store) -> None:
    catalogue.all_suites()
    plan = make(Request("components", seeds=tuple(range(200))), data_root)
    states = standing.look_at_plan(plan, store)
    costs.estimates(plan, store, costs.capacity("local", 1))
    assert len(states) == 1000
    assert {state.state for state in states.values()} == {State.PLANNED}
