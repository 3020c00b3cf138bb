"""prune: what it offers, with its reasons, and what it never touches."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.execution.attempt import Options
from experiments.runs import pruning
from experiments.store import claims
from experiments.store.files import write_json
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan
from tests.support.executed_runs import eval_id_of, execute

Make = Callable[..., Any]


def test_prune_offers_leavings_with_reasons_and_removes_nothing_by_itself(
    plan: Plan, store: Store, options: Options, counter: Make
) -> None:
    (run,) = execute(plan, store, options, counter())
    leavings = {
        "checkpoints/iteration_000005.pth": "checkpoint of a run that is done; its final weights stay",
        "voided/1/trained.json": "set aside when the run was declared void and done again",
        "superseded/20260101/x/result.json": "set aside by reevaluate",
        "attempts/1/evaluation/layers.parquet": "an evaluation by reevaluate that did not complete",
        "attempts/1/.reserve": "space reserved by an attempt that died",
    }
    for name in leavings:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("x" * 100)
    before = sorted(store.root.rglob("*"))
    found, kept = pruning.find(store)
    assert sorted(one.reason for one in found) == sorted(leavings.values())
    assert {one.bytes for one in found} == {100}
    assert kept == []
    assert sorted(store.root.rglob("*")) == before
    assert pruning.remove(found, store) == 5
    assert run.result(eval_id_of(run)) is not None
    assert (run.path / "checkpoints" / "final.pth").exists()
    assert pruning.find(store)[0] == []


def test_prune_never_offers_a_run_because_no_suite_names_it(
    plan: Plan, store: Store, options: Options, counter: Make
) -> None:
    run, other = execute(plan, store, options, counter(), 2)
    shutil.rmtree(store.root / "suites")
    assert pruning.find(store)[0] == []
    (leaving,), _ = pruning.find(store, [run])
    assert (leaving.path, leaving.reason) == (run.path, "you named it")
    claim = claims.acquire(run.path / "claims")
    assert claim is not None
    found, kept = pruning.find(store, [run])
    assert found == []
    assert "kept: something works on it" in kept[0]
    assert pruning.remove([leaving], store) == 0, "somebody began to use it between the two looks"
    claim.release()
    assert pruning.remove([leaving], store) == 1
    assert [left.run_id for left in store.runs() if left.trained()] == [other.run_id]


def test_prune_keeps_code_and_smoke_runs_of_launches_that_are_not_over(store: Store) -> None:
    old = time.time() - 2 * pruning.OLD
    for name in ("new", "old"):
        write_json(store.launches / name / "launch.json", {"runs": [], "code": str(store.root / "code" / name)})
        (store.launches / name / "smoke" / "runs" / "r").mkdir(parents=True)
        (store.root / "code" / name).mkdir(parents=True)
    _age(store.root / "code" / "new", old)
    _age(store.root / "code" / "old", old)
    _age(store.launches / "old" / "launch.json", old)
    assert {one.path.relative_to(store.root).as_posix() for one in pruning.find(store)[0]} == {
        "launches/old/smoke/runs",
        "code/old",
    }


def _age(path: Path, at: float) -> None:
    import os

    os.utime(path, (at, at))
