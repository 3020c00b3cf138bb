"""What a plan is expected to cost: measured where it was measured, declared otherwise, and labelled."""

from pathlib import Path
from typing import Any

import pytest

from experiments.launch import costs
from experiments.launch.costs import Capacity
from experiments.store.files import write_json
from experiments.store.run_dir import RunDir, Store
from experiments.suites import scales
from experiments.suites.planning import Plan, PlannedRun
from mpformer.runtime.errors import UserError

CPU = Capacity("local", "cpu", 1, 0, 1, 2)
EIGHT = Capacity("a100", "cuda", 8, 8, 64, 4)


def trained(store: Store, run: PlannedRun, seconds: float, launch: str = "", **more: Any) -> RunDir:
    found = store.run(run.run_id)
    found.create(run.config, run.row.name)
    content = {"iterations": run.config.schedule.max_iter, "seconds": seconds, "weights": "w", "weights_sha256": "0"}
    write_json(found.path / "trained.json", {**content, "device": "cpu", "world_size": 1, **more})
    if launch:
        write_json(found.attempt(1).path / "stage.json", {"launch": launch, "outcome": "trained"})
    return found


def test_declared_until_a_run_like_it_has_measured(plan: Plan, store: Store) -> None:
    scoring = 500 * scales.DECLARED_IMAGE_SECONDS["mini"]
    first, last = plan.runs[0], plan.runs[-1]
    before = costs.estimates(plan, store, CPU)[first.run_id]
    assert (before.source, before.seconds) == (
        "declared",
        pytest.approx(12 * scales.declared_seconds("mini", "shapes")[0] + scoring),
    )
    trained(store, first, 24.0)
    found = costs.estimates(plan, store, CPU)
    same_row = [run for run in plan.runs if run.row.name == first.row.name]
    assert {found[run.run_id].source for run in same_row} == {"measured, scoring declared"}
    assert found[same_row[1].run_id].seconds == pytest.approx(24.0 + scoring)
    assert found[last.run_id].source == "declared"


def test_a_laptops_seconds_say_nothing_of_eight_gpus(plan: Plan, store: Store) -> None:
    first = plan.runs[0]
    trained(store, first, 24.0)
    assert costs.estimates(plan, store, EIGHT)[first.run_id].source == "declared"
    write_json(store.launches / "h100" / "launch.json", {"profile": "h100"})
    trained(store, first, 1.2, "h100", device="cuda:0", world_size=8)
    found = costs.estimates(plan, store, EIGHT)[first.run_id]
    assert found.source == "measured on h100, scoring declared"
    write_json(store.launches / "x" / "launch.json", {"profile": "a100"})
    trained(store, plan.runs[1], 2.4, "x", device="cuda:0", world_size=8)
    assert costs.estimates(plan, store, EIGHT)[first.run_id].source == "measured, scoring declared"


def test_smoke_runs_feed_the_estimate_of_iterations_and_images(plan: Plan, store: Store) -> None:
    write_json(store.launches / "l" / "launch.json", {"profile": "a100"})
    inner = Store(store.launches / "l" / "smoke")
    run = trained(inner, plan.runs[0], 12 * 0.5, device="cuda", world_size=8)
    result = {"schema": 1, "seconds": 4.0, "images": 8, "complete": True, "metrics": {"AP": 1.0}}
    result |= {"run_id": run.run_id, "eval_id": "e"}
    write_json(run.path / "evals" / "e" / "result.json", result)
    expected = costs.estimates(plan, store, EIGHT)
    found = expected[plan.runs[0].run_id]
    assert (found.source, found.seconds) == ("measured", pytest.approx(12 * 0.5 + 500 * 0.5))
    assert "(measured)" in costs.of_plan([plan.runs[0].run_id], expected, EIGHT).lines()[0]
    assert found.disk.source == "declared", "a smoke run's files are not a run's"


def test_files_of_finished_runs_are_counted(plan: Plan, store: Store) -> None:
    run = trained(store, plan.runs[0], 24.0)
    assert costs.estimates(plan, store, CPU)[plan.runs[0].run_id].disk.source == "declared"
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints" / "final.pth").write_bytes(b"w" * 1000)
    write_json(run.path / "evals" / "e" / "result.json", {})
    found = costs.estimates(plan, store, CPU)[plan.runs[1].run_id]
    assert (found.disk.source, found.disk.files, found.disk.weights) == ("measured", 4, 1000)
    assert found.disk.bytes > 1000


def test_the_cost_of_a_plan_at_the_width_of_a_profile(plan: Plan, store: Store) -> None:
    expected = costs.estimates(plan, store, EIGHT)
    left = [run.run_id for run in plan.unique]
    each = expected[left[0]].seconds
    cost = costs.of_plan(left, expected, EIGHT)
    assert cost.gpu_hours == pytest.approx(4 * each * 8 / 3600)
    assert cost.wall_seconds == pytest.approx(each), "four at a time"
    assert costs.of_plan(left, expected, CPU).wall_seconds == pytest.approx(2 * each)
    assert cost.bytes == 4 * scales.DECLARED_DISK["mini"][1]
    assert cost.peak_bytes == cost.bytes + 4 * 2 * 3 * scales.DECLARED_DISK["mini"][2]
    text = " ".join(cost.lines())
    assert "4 runs to do" in text
    assert "4 at a time on a100 (declared)" in text
    assert costs.of_plan([], expected, CPU).lines() == ["0 runs to do"]


def test_the_capacity_comes_from_the_profile(tmp_path: Path) -> None:
    assert costs.capacity("a100", 100) == Capacity("a100", "cuda", 8, 8, 64, 4)
    path = tmp_path / "two.yaml"
    path.write_text("executor: slurm\ntime: 10\nnodes: 2\ntasks_per_node: 2\ncpus: 3\nparallelism: 7\n")
    assert costs.capacity(str(path), 5) == Capacity(str(path), "cpu", 4, 0, 12, 5)
    with pytest.raises(UserError, match="unknown profile"):
        costs.capacity("nowhere", 1)


def test_a_damaged_run_costs_an_estimate_not_the_plan(plan: Plan, store: Store) -> None:
    run = trained(store, plan.runs[0], 24.0)
    (run.path / "run.json").write_text('{"config": {"model": 3}}')
    assert costs.estimates(plan, store, CPU)[plan.runs[0].run_id].source == "declared"
