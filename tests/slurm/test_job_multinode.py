"""One run over two nodes of two tasks each, from Slurm's own variables: the numbers of one process, and one fate."""

import json
import math
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.store.files import read_json
from experiments.store.run_dir import RunDir, Store
from tests.support import tiny_jobs
from tests.support.small_runs import Paced
from tests.support.tiny_jobs import job, lines, on_node, parent_of, stages, submit, until

pytestmark = pytest.mark.slurm


def attempt_on(conf: Path, node: str) -> int:
    """A process on the node whose parent is a process on the node too: the attempt, not what watches it."""
    there = [pid for pid in on_node(conf, node) if b"submitit.core._submit" in cmdline(pid)]
    return next((pid for pid in there if parent_of(pid) in there), 0)


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_four_tasks_on_two_nodes_train_as_one_process(devcluster: Callable[..., Any], tmp_path: Path) -> None:
    """And when one of the tasks that only help is killed on the way, the job starts again and goes on."""
    cluster = devcluster()
    data, store = tmp_path / "data", Store(tmp_path / "store")
    # no running statistics: each process would keep those of its own images
    changes: dict[str, Any] = {"schedule__max_iter": 16, "runtime__checkpoint_period": 4, "model__backbone__norm": "GN"}
    (run,) = tiny_jobs.tiny_plan(data, **changes).runs
    directory = tiny_jobs.planned(run, store)
    made = job(run, store, data, runner=Paced(0.5))
    number = submit(made, store.root / "jobs", nodes=2, ntasks_per_node=2)
    seen = lambda: tiny_jobs.client("squeue") + tiny_jobs.logs(directory, store.root / "jobs")  # noqa: E731
    until(lambda: lines(directory) >= 12, 300, seen)
    os.kill(attempt_on(cluster.conf, "n1"), signal.SIGKILL)
    until(lambda: directory.result(run.eval_id), 400, seen)
    until(lambda: tiny_jobs.state(number) == "COMPLETED", 60, lambda: tiny_jobs.state(number))

    first, last = stages(directory)
    assert (first["outcome"], first["failure_class"]) == ("lost", "killed"), seen()
    assert "killed by SIGKILL" in str(first["detail"])
    assert [rank["rank"] for rank in map(read_json, (directory.attempt(1).path / "ranks").glob("*.json"))]
    assert last["execution"]["restarts"] == 1
    assert {path.name for path in directory.attempt(2).path.glob("log*")} == {
        "log.txt",
        *(f"log.{n}.txt" for n in (1, 2, 3)),
    }
    assert json.loads((directory.attempt(2).path / "rendezvous.json").read_text())["size"] == 4
    assert len([path for path in (directory.path / "claims").iterdir() if path.name.isdigit()]) == 2, (
        "the main task alone"
    )
    origin = read_json(directory.attempt(2).path / "provenance.json")
    assert (origin["world_size"], origin["nodes"]) == (4, "n[0-1]")

    # the same images and random numbers, one after the other: four micro-batches of one image
    alone = replace(run, config=run.config.replace({"runtime.accumulation": 4}))
    other = Store(tmp_path / "alone")
    tiny_jobs.undisturbed(alone, other, data)
    weights = [torch.load(s.run(run.run_id).path / "checkpoints" / "final.pth")["model"] for s in (store, other)]
    for name, value in weights[0].items():
        # a bias before a group normalisation has no gradient but rounding, of which AdamW makes whole steps
        free = 5e-3 if re.fullmatch(r".*input_proj\.\d\.0\.bias", name) else 2e-4
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=free, msg=partial("{}: {}".format, name))
    curves = [curve(s.run(run.run_id)) for s in (store, other)]
    assert [iteration for iteration, _ in curves[0]] == list(range(1, 17)), "each once, by the main task"
    for (_, ours), (_, alone_) in zip(*curves, strict=True):
        assert math.isclose(ours, alone_, rel_tol=1e-3)


def curve(directory: RunDir) -> list[tuple[int, float]]:
    """Iterations and losses as logged."""
    entries = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    return [(entry["iteration"], entry["loss"]) for entry in entries if entry["kind"] == "train"]
