"""Suites run on a set that `data add` registered; what was launched is known from the store alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from experiments.cli.main import cli
from experiments.store.run_dir import Store
from experiments.suites import catalogue, datasets, planning, scales
from experiments.suites.planning import Request
from mpformer.config.datasets import DATASETS
from mpformer.runtime.errors import UserError
from tests.support.own_set import OwnSet, write_own_set


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
        catalogue.place("headline", "mini", "plates")
    said = CliRunner().invoke(
        cli, ["status", "headline", "--dataset", "plates", "--root", str(store.root)], catch_exceptions=False
    )
    assert "plates" in said.output
    assert catalogue.place("headline", "mini", "plates") == ("mini", "plates")
    assert scales.base("mini", "plates").dataset.crop == 64


def test_what_a_store_recorded_gives_way_to_a_data_root(root: Path, store: Store) -> None:
    plan = planning.make(Request("headline", dataset="plates"), root)
    planning.write_record(plan, store, "mpformer launch headline --dataset plates")
    before = DATASETS["plates"]
    datasets.recall(store)
    assert DATASETS["plates"] is before
