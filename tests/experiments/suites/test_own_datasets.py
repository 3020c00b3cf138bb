"""Suites run on a set that `data add` registered; what was launched is known from the store alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from experiments.cli.main import cli
from experiments.runs import single
from experiments.store.run_dir import Store
from experiments.suites import catalogue, datasets, planning, scales
from experiments.suites.planning import Request
from mpformer.config.datasets import DATASETS, added, know
from mpformer.config.paper_settings import setting
from mpformer.data.own import registration
from mpformer.data.validation import validation_items
from mpformer.runtime.errors import UserError
from tests.support.own_set import HEIGHT, WIDTH, OwnSet, write_own_set


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> OwnSet:
    return write_own_set(tmp_path_factory.mktemp("own") / "export")


@pytest.fixture(scope="module")
def root(own: OwnSet) -> Path:
    """A data root with the set."""
    root = own.root.parent / "datasets"
    words = ["data", "add", "plates", *own.options, "--panoptic-from-instances", "largest-first", "--stuff", "wall"]
    done = CliRunner().invoke(cli, [*words, "--crop", "64", "--data-root", str(root)], catch_exceptions=False)
    assert "6 and 3 tiles of 64 px" in done.output
    return root


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    forget()


def forget() -> None:
    for name in [name for name, entry in DATASETS.items() if entry.added]:
        del DATASETS[name]


def test_suites_plan_on_it_at_scale_mini(root: Path) -> None:
    plan = planning.make(Request("headline", dataset="plates"), root)
    assert not plan.missing
    config = plan.base
    assert (config.dataset.task, config.dataset.crop, config.model.train_points) == ("panoptic", 64, 256)
    assert all(run.run_id.startswith("plates-panoptic-") for run in plan.runs)
    assert config.evaluation.object_mask_threshold == 0.2
    assert scales.column_reasons("plates", config.evaluation) == {}
    applying = {name for name, suite in catalogue.all_suites().items() if not suite.why_not("plates")}
    assert {"headline", "components", "flip-noise", "convergence", "overhead"} <= applying
    assert not applying & {"coco-instance", "stress", "released"}


def test_another_content_is_another_run(own: OwnSet, root: Path, tmp_path: Path) -> None:
    before = planning.make(Request("headline", dataset="plates"), root)
    words = ["data", "add", "plates", *own.options, "--panoptic-from-instances", "largest-first", "--stuff", "wall"]
    CliRunner().invoke(cli, [*words, "--crop", "64", "--min-pixels", "20", "--data-root", str(tmp_path)])
    after = planning.make(Request("headline", dataset="plates"), tmp_path)
    assert {run.run_id for run in before.runs}.isdisjoint(run.run_id for run in after.runs)


def test_the_store_knows_it_without_its_data_root(root: Path, store: Store) -> None:
    plan = planning.make(Request("headline", dataset="plates"), root)
    planning.write_record(plan, store, "mpformer launch headline --dataset plates")
    forget()
    with pytest.raises(UserError, match="unknown dataset at scale 'mini' 'plates'; valid: shapes, nuclei"):
        catalogue.check("headline", "mini", "plates")
    said = CliRunner().invoke(
        cli, ["status", "headline", "--dataset", "plates", "--root", str(store.root)], catch_exceptions=False
    )
    assert "plates" in said.output
    assert catalogue.check("headline", "mini", "plates") == ("mini", "plates")
    assert scales.base("mini", "plates").dataset.crop == 64


def test_what_a_store_recorded_gives_way_to_a_data_root(root: Path, store: Store) -> None:
    plan = planning.make(Request("headline", dataset="plates"), root)
    planning.write_record(plan, store, "mpformer launch headline --dataset plates")
    before = DATASETS["plates"]
    datasets.recall(store)
    assert DATASETS["plates"] is before


BASE = "coco/panoptic/r50-12ep"


def test_a_setting_of_the_paper_is_trained_on_whole_images(root: Path, store: Store) -> None:
    request = Request("headline", "paper", "plates", base=BASE, overrides=(("model.init_weights", ""),))
    plan = planning.make(request, root)
    assert not plan.missing
    config, usual = plan.base, setting(BASE)
    assert config.dataset.crop is None
    assert config.dataset.augmentation == usual.dataset.augmentation
    assert (config.schedule, config.model.queries) == (usual.schedule, usual.model.queries)
    (first, *_) = validation_items(config, root, limit=1)
    assert (first.truth.height, first.truth.width) == (HEIGHT, WIDTH)
    assert min(first.inputs["image"].shape[1:]) == 800
    path = planning.write_record(plan, store, "mpformer launch headline")
    assert path.name == "headline@paper+plates.json"
    again = planning.make(planning.as_launched(Request("headline", "paper", "plates"), store), root)
    assert [run.run_id for run in again.runs] == [run.run_id for run in plan.runs]
    assert f"--base {BASE}" in planning.command("launch", plan, store)


def test_the_usual_setting_is_that_of_the_ablations(root: Path) -> None:
    plan = planning.make(Request("schedule", "paper", "plates"), root)
    assert plan.base.dataset.task == "instance"
    longer = planning.make(Request("schedule", "paper", "plates", base="coco/instance/r50-50ep"), root)
    assert longer.base.schedule.max_iter > plan.base.schedule.max_iter
    assert longer.base.schedule.steps == () or max(longer.base.schedule.steps) > plan.base.schedule.max_iter


def test_a_base_that_does_not_fit_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match="suite 'convergence' has settings of its own"):
        planning.make(Request("convergence", "paper", "plates", base=BASE), root)
    with pytest.raises(UserError, match="unknown setting 'r50'"):
        planning.make(Request("headline", "paper", "plates", base="r50"), root)
    know(added("nothing_but_things", ["a", "b"], []))
    with pytest.raises(UserError, match="trains for the panoptic task, and nothing_but_things has instance alone"):
        scales.moved_to(setting(BASE), "nothing_but_things", BASE)


def test_train_takes_it_as_a_dataset(root: Path) -> None:
    registration.know_all(root)
    config = single.read_config(BASE, [], "plates")
    assert (config.dataset.name, config.dataset.task) == ("plates", "panoptic")
    assert single.read_config(BASE, []).dataset.name == "coco"
