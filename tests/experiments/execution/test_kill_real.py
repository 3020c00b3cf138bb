"""The real trainer on a tiny dataset: SIGKILL at any moment, launch again, and the numbers are the undisturbed ones."""

import io
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.launch import choosing, inputs, watching
from experiments.launch.local import launch
from experiments.launch.machine import Width
from experiments.status.states import State
from experiments.store.claims import process_born
from experiments.store.files import read_json
from experiments.store.launches import LaunchDir
from experiments.store.run_dir import RunDir, Store
from experiments.suites import planning
from experiments.suites.planning import Plan, Request
from tests.support import small_runs
from tests.support.run_directory_page import unknown_files

TINY = small_runs.TINY | {"schedule.batch_size": 2, "runtime.checkpoint_period": 5}
ONE = Width(1, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def tiny(data: Path) -> Plan:
    """One piloted run of 24 iterations, its dataset prepared."""
    request = Request("headline", rows=("mp-former",), seeds=(0,), overrides=tuple(TINY.items()))
    return inputs.prepare_data(planning.make(request, data))


@pytest.fixture(scope="module")
def undisturbed(tiny: Plan, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run comes to when nothing happens to it."""
    store = Store(tmp_path_factory.mktemp("undisturbed"))
    _finish(tiny, store, data)
    return _numbers(tiny, store)


def _finish(plan: Plan, store: Store, data: Path) -> None:
    text = io.StringIO()
    watching.follow(plan, store, launch(plan, store, width=ONE), Console(file=text, width=200))
    assert [state.state for state in choosing.snapshot(plan, store)] == [State.DONE], text.getvalue() + _log(
        plan, store
    )
    assert unknown_files(store.root) == [], "docs/run_directory.md names every file"


def _log(plan: Plan, store: Store) -> str:
    run = store.run(plan.runs[0].run_id)
    return "\n".join(path.read_text()[-2000:] for path in sorted(run.path.glob("attempts/*/log.txt")))


def _numbers(plan: Plan, store: Store) -> dict[str, Any]:
    return small_runs.numbers(store.run(plan.runs[0].run_id), plan.runs[0])


def _kill_when(plan: Plan, store: Store, data: Path, moment: Callable[[RunDir], bool], delay: float = 0.0) -> bool:
    """Launch, and SIGKILL worker and attempt at the moment; False if the run was done before it came."""
    started = launch(plan, store, width=ONE)
    run = store.run(plan.runs[0].run_id)
    end = time.monotonic() + 240
    while not moment(run):
        if not started.working():
            return False
        assert time.monotonic() < end, "the moment never came\n" + _log(plan, store)
        time.sleep(0.005)
    time.sleep(delay)
    for worker in LaunchDir(started.directory).live_workers():
        os.kill(worker, signal.SIGSTOP)  # so that it does not start another attempt, nor end this one gently
    _kill_attempt(run)
    started.kill()
    while started.working():
        time.sleep(0.05)
    return True


def _kill_attempt(run: RunDir) -> None:
    number = max(run.attempts(), default=0)
    claim = read_json(run.path / "claims" / str(number))
    if claim and not (run.path / "claims" / f"{number}.released").exists():
        os.kill(claim["pid"], signal.SIGKILL)
        while process_born(claim["pid"]):  # the kernel takes a moment to tear a big process down
            time.sleep(0.01)


def _lines(run: RunDir) -> int:
    return run.metrics.read_text().count("\n") if run.metrics.exists() else 0


def _has_lines(count: int, run: RunDir) -> bool:
    return _lines(run) >= count


def _evaluating(run: RunDir) -> bool:
    """The evaluation follows the training in the same attempt (its progress is written once a second: too rarely)."""
    return run.trained() is not None


def test_killed_while_training_with_a_truncated_checkpoint_and_while_evaluating(
    tiny: Plan, data: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    run = store.run(tiny.runs[0].run_id)
    assert _kill_when(tiny, store, data, lambda run: _lines(run) >= 13)
    assert choosing.snapshot(tiny, store)[0].label == "LOST(killed)"
    newest = max((run.path / "checkpoints").glob("iteration_*.pth"))
    newest.write_bytes(newest.read_bytes()[:1000])
    assert _kill_when(tiny, store, data, _evaluating)
    _finish(tiny, store, data)
    assert "does not match its checksum" in (run.attempt(2).path / "log.txt").read_text()
    assert _numbers(tiny, store) == undisturbed
    assert run.attempts() == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(
    tiny: Plan, data: Path, undisturbed: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    store = Store(tmp_path)
    random_ = random.Random(seed)
    for _ in range(6):
        wanted = random_.randrange(0, 26)
        if not _kill_when(tiny, store, data, partial(_has_lines, wanted), random_.uniform(0, 1.5)):
            break
    _finish(tiny, store, data)
    assert _numbers(tiny, store) == undisturbed


def test_a_non_finite_loss_fails_the_run_as_nan(data: Path, tiny: Plan, tmp_path: Path) -> None:
    overrides = {**TINY, "schedule.base_lr": 1e30, "schedule.clip_norm": 0.0, "runtime.eval_period": 0}
    request = Request("headline", rows=("mask2former",), seeds=(0,), overrides=tuple(overrides.items()))
    plan = planning.make(request, data)
    store = Store(tmp_path)
    watching.follow(plan, store, launch(plan, store, width=ONE), Console(file=io.StringIO()))
    (state,) = choosing.snapshot(plan, store)
    assert state.label == "FAILED(nan)"
    assert "non-finite loss at iteration" in state.detail


def test_a_corrupted_image_fails_the_run_as_data(data: Path, tiny: Plan, tmp_path: Path) -> None:
    damaged = tmp_path / "datasets"
    shutil.copytree(data, damaged)
    for image in damaged.glob("shapes/*/train/*.png"):
        image.write_bytes(image.read_bytes()[:200])
    store = Store(tmp_path / "store")
    watching.follow(
        tiny, store, launch(replace(tiny, data_root=damaged), store, width=ONE), Console(file=io.StringIO())
    )
    (state,) = choosing.snapshot(tiny, store)
    assert state.label == "FAILED(data)", _log(tiny, store)
    assert ".png" in state.detail
    _finish(tiny, store, data)  # with the dataset mended, launching again is all it takes
