"""Which arrays a launch is made of: under the limits of a site, each after what it depends on."""

from pathlib import Path
from typing import Any

import pytest

from experiments.slurm.batches import Target, divide
from experiments.slurm.limits import Limits
from experiments.store.files import write_json
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan
from tests.support import counting_jobs
from tests.support.counting_jobs import plan, profile


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return counting_jobs.data_root(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def shape(made: Plan, store: Store, limits: Limits, **keys: Any) -> list[tuple[Any, ...]]:
    """Stage, runs, dependencies and cap of each array."""
    smoke_too = keys.pop("smoke_too", False)
    batches, _ = divide(made.unique, store, Target("test", profile(**keys), smoke_too), limits)
    return [(one.stage, len(one.runs), one.after, one.parallelism) for one in batches]


def train(store: Store, made: Plan, count: int) -> None:
    for run in made.unique[:count]:
        write_json(store.run(run.run_id).path / "trained.json", {"weights_sha256": "x", "weights": "w"})


def test_one_array_by_default_and_a_report_after_everything(data: Path, store: Store) -> None:
    made = plan(data, seeds=(0, 1, 2))
    assert shape(made, store, Limits(array=1000), parallelism=3) == [("all", 6, (), 3)]
    (_, report) = shape(made, store, Limits(array=1000), report=True)
    assert report == ("report", 0, (("afterany", (0,)),), 1)


def test_arrays_stay_under_the_sites_size_and_the_cap_is_shared(data: Path, store: Store) -> None:
    made = plan(data, seeds=tuple(range(5)))
    assert shape(made, store, Limits(array=4), parallelism=8) == [
        ("all", 4, (), 3), ("all", 4, (), 3), ("all", 2, (), 2),
    ]  # fmt: skip
    few = shape(made, store, Limits(array=3), parallelism=2)
    assert [one[2] for one in few] == [(), (), (("afterany", (0,)),), (("afterany", (1,)),)], "two at a time in all"
    assert sum(one[1] for one in few) == 10


def test_split_stages_pair_arrays_over_identical_indices(data: Path, store: Store) -> None:
    made = plan(data, seeds=(0, 1, 2))
    train(store, made, 2)
    target = Target("test", profile(evaluate={"gpus": 1, "parallelism": 6}))
    batches, left = divide(made.unique, store, target, Limits(array=2))
    assert left == ()
    assert [(one.stage, one.after, len(one.runs)) for one in batches] == [
        ("train", (), 2), ("evaluate", (("aftercorr", (0,)),), 2),
        ("train", (), 2), ("evaluate", (("aftercorr", (2,)),), 2),
        ("evaluate", (), 2),
    ]  # fmt: skip
    assert batches[0].runs == batches[1].runs
    assert batches[2].runs == batches[3].runs
    assert batches[4].runs == made.unique[:2], "what is trained waits for nothing"


def test_everything_waits_for_the_smoke_runs(data: Path, store: Store) -> None:
    made = plan(data, seeds=(0, 1, 2))
    train(store, made, 1)
    found = shape(made, store, Limits(array=1000), smoke_too=True, evaluate={}, report=True)
    assert [one[:3] for one in found] == [
        ("smoke", 2, ()),
        ("train", 5, (("afterok", (0,)),)),
        ("evaluate", 5, (("aftercorr", (1,)),)),
        ("evaluate", 1, (("afterok", (0,)),)),
        ("report", 0, (("afterany", (0, 1, 2, 3)),)),
    ]


@pytest.mark.parametrize(("room", "started"), [(0, 0), (1, 0), (2, 1), (3, 2), (6, 5), (7, 6), (100, 6)])
def test_what_does_not_fit_under_the_submit_limit_is_left_over(
    data: Path, store: Store, room: int, started: int
) -> None:
    made = plan(data, seeds=(0, 1, 2))
    batches, left = divide(made.unique, store, Target("t", profile(report=True)), Limits(submit=room))
    assert sum(one.count for one in batches) <= room
    assert sum(len(one.runs) for one in batches) == started
    assert len(left) == 6 - started


def test_trained_runs_go_first_where_room_is_short_and_a_fresh_one_needs_two_jobs(data: Path, store: Store) -> None:
    made = plan(data, seeds=(0, 1, 2))
    train(store, made, 2)
    batches, left = divide(made.unique, store, Target("t", profile(evaluate={})), Limits(submit=5))
    assert [(one.stage, len(one.runs)) for one in batches] == [("train", 1), ("evaluate", 1), ("evaluate", 2)]
    assert len(left) == 3
