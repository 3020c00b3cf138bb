"""How long planning, status and the command line's start take: `python -m benchmarks.status_speed`.

Targets, on one idle core: 1,000 runs planned in under 2 s, `status` over 2,000 run directories in under 2 s cold and
linear in runs, the command started in under 1 s. Every figure is that of a fresh process, `mpformer` as users call it.
Run directories are complete (record, attempts, claims, metrics, layers' files); a third each is done, at work on
another machine, and failed or waiting in Slurm, which is asked through small scripts in place of its clients.
``--latency 1`` instead measures `status` of 1,000 runs where each open and each listing of a directory of the store
takes a millisecond more, as on a busy file server, and counts them (an audit hook of the interpreter sees both).
Cold means that the kernel's caches were dropped before each call, which needs root; without it only the warm figures
are printed.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.launch import begin
from experiments.store.files import write_json
from experiments.store.journal import BatchRun, Submission, of_launch
from experiments.store.run_dir import Store
from experiments.suites import planning
from experiments.suites.planning import Plan, PlannedRun
from mpformer.runtime.code import ROOT

SIZES = (500, 1000, 2000)
LAUNCH, NAME, ARRAY = "20260101-120000-abcdef", "components.20260101-120000-abcdef.0", "1234"
CLIENTS = ("squeue", "sacct", "scontrol")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--repeats", type=int, default=5)
    asked.add_argument("--latency", type=float, metavar="MS")
    given = asked.parse_args()
    repeats = given.repeats
    if given.latency is not None:
        slow_disk(given.latency, repeats)
        return
    print(f"load {os.getloadavg()[0]:.1f}, median of {repeats}; wall seconds, processor seconds in brackets")
    with tempfile.TemporaryDirectory() as folder:
        line("start of the command (--version)", ["--version"], Path(folder), repeats)
        line("list of the suites", ["suites"], Path(folder), repeats)
        where = ["--root", f"{folder}/none", "--data-root", f"{folder}/data"]
        line("plan of 1,000 runs", ["plan", "components", "--seeds", "0-199", *where], Path(folder), repeats)
        for size in SIZES:
            root = Path(folder) / str(size)
            make_store(root, size)
            for form in ([], ["--json"]):
                command = ["status", *form, "--root", str(root)]
                line(f"status {' '.join(form)} of {size} runs, warm", command, root, repeats)
                if may_drop_caches():
                    line(f"status {' '.join(form)} of {size} runs, cold", command, root, repeats, cold=True)
        where = ["--root", f"{folder}/2000", "--data-root", f"{folder}/data"]
        line(
            "plan of 1,000 runs, 2,000 in the store", ["plan", "components", "--seeds", "0-199", *where], root, repeats
        )


SLOW = """
import atexit, os, runpy, sys, time
root, seconds, seen = sys.argv.pop(1), float(sys.argv.pop(1)) / 1000, []
def wait(event, found):
    if event in ("open", "os.listdir", "os.scandir") and str(found[0]).startswith(root):
        seen.append(event)
        time.sleep(seconds)
sys.addaudithook(wait)
atexit.register(lambda: print(len(seen), file=sys.stderr))
runpy.run_module("experiments.cli.main", run_name="__main__", alter_sys=True)
"""


def slow_disk(milliseconds: float, repeats: int, size: int = 1000) -> None:
    """Print what `status` takes where opening a file or listing a directory of the store takes this much longer."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_store(root, size)
        environment = {**os.environ, "PATH": f"{root}/bin:{os.environ['PATH']}", "COLUMNS": "200"}
        for latency in (0.0, milliseconds):
            times, count = [], 0
            for _ in range(repeats):
                began = time.perf_counter()
                command = [sys.executable, "-c", SLOW, folder, str(latency), "status", "--root", folder]
                done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
                times.append(time.perf_counter() - began)
                count = int(done.stderr.split()[-1])
            found = f"{statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})"
            print(f"status of {size} runs, {latency:g} ms on each of {count} opens and listings: {found}", flush=True)


def line(what: str, arguments: list[str], clients: Path, repeats: int, cold: bool = False) -> None:
    """Print the medians over fresh processes."""
    found = [once(arguments, clients, cold) for _ in range(repeats)]
    wall, processor = (statistics.median(column) for column in zip(*found, strict=True))
    low, high = min(wall for wall, _ in found), max(wall for wall, _ in found)
    print(f"{what:<42} {wall:6.2f} s ({processor:.2f})   {low:.2f} to {high:.2f}", flush=True)


def once(arguments: list[str], clients: Path, cold: bool) -> tuple[float, float]:
    """Wall and processor seconds of one process."""
    environment = {**os.environ, "PATH": f"{clients}/bin:{os.environ['PATH']}", "COLUMNS": "200"}
    if cold:
        drop_caches()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "experiments.cli.main", *arguments], cwd=ROOT, env=environment, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def may_drop_caches() -> bool:
    return os.access("/proc/sys/vm/drop_caches", os.W_OK)


def drop_caches() -> None:
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


def make_store(root: Path, size: int) -> None:
    """Write a suite of ``size`` runs (five rows) with all that an attempt leaves, and what Slurm says of them."""
    os.fsync = lambda _: None  # type: ignore[assignment]  # some ten thousand files
    store = Store(root)
    request = planning.Request("components", seeds=tuple(range(size // 5)))
    plan = planning.make(request, root / "data")
    begin.record(plan, store, "benchmark")
    for index, run in enumerate(plan.unique):
        make_run(store, run, index % 3)
    submit(store, plan)


def make_run(store: Store, planned: PlannedRun, kind: int) -> None:
    """One run: done (0), at work on another machine (1), failed or waiting in Slurm (2)."""
    run = store.run(planned.run_id)
    now = time.time()
    attempt = run.attempt(1).path
    failed = {"outcome": "failed", "failure_class": "error", "detail": "ValueError: surprise"}
    outcome = ({"outcome": "done"}, {"outcome": None}, failed)[kind]
    write_json(
        attempt / "stage.json", {"stage": "all", "started": now - 600, "ended": now, "launch": LAUNCH, **outcome}
    )
    write_json(attempt / "provenance.json", {"git": {"sha": "0" * 40, "diff": "x" * 20000}, "packages": {}})
    beat = {"stage": "train", "iteration": 400, "max_iter": 800, "loss": 3.2, "eta_seconds": 100.0, "time": now}
    write_json(attempt / "progress.json", beat)
    (attempt / "log.txt").write_text("2026-01-01 INFO mpformer: an iteration\n" * 2000 + "ValueError: surprise\n")
    claim = {"host": "n1", "machine": "another", "pid": 1, "born": "1", "token": "t", "job_id": "0", "time": now}
    write_json(run.path / "claims" / "1", claim)
    if kind != 1:
        (run.path / "claims" / "1.released").touch()
    scores = {"AP": 12.5, "PQ": 20.1, "mIoU": 30.2, "mIoU-L": 60.0, "Util": 70.0}
    lines = []
    for iteration in range(10, 801, 10):
        lines.append(
            {"kind": "train", "iteration": iteration, "loss": 3.2, "loss_ce": 1.0, "seconds": 0.3, "time": now}
        )
        if iteration % 160 == 0:
            lines.append({"kind": "evaluation", "iteration": iteration, "metrics": scores, "time": now})
    run.metrics.write_text("".join(json.dumps(one) + "\n" for one in lines))
    if kind == 0:
        _done(store, planned, scores)


def _done(store: Store, planned: PlannedRun, scores: dict[str, float]) -> None:
    run = store.run(planned.run_id)
    weights = run.path / "checkpoints" / "final.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"w" * 4096)
    about: dict[str, Any] = {"iterations": 800, "seconds": 240.0, "device": "cpu", "world_size": 1}
    write_json(run.path / "trained.json", {**about, "weights": "checkpoints/final.pth", "weights_sha256": "0"})
    layers = {name: [0.5] * 7 for name in ("AP", "PQ", "mIoU", "Util", "mIoU-L", "IoU-gt", "empty_attention_share")}
    result = {"schema": 1, "run_id": run.run_id, "eval_id": planned.eval_id, "attempt": 1, "complete": True}
    result |= {"iteration": 800, "images": 500, "seconds": 20.0, "metrics": scores, "layers": layers}
    folder = run.evaluation(planned.eval_id)
    write_json(folder / "result.json", result)
    for number in range(16):
        (folder / "layer_masks").mkdir(exist_ok=True)
        (folder / "layer_masks" / f"{number}.json").write_text("{}")


def submit(store: Store, plan: Plan) -> None:
    """Journal the runs as one array, and write clients that say that half of the failed runs wait again."""
    runs = tuple(BatchRun(run.run_id, run.eval_id) for run in plan.unique)
    journal = of_launch(store, LAUNCH)
    journal.submitting(Submission(0, "all", NAME, runs, 0.0, "a100", "lab"))
    journal.submitted(0, ARRAY)
    head = "{array}_{i}|{i}|PENDING|Priority|1767268800|N/A||{name}"
    waiting = [head.format(array=ARRAY, i=i, name=NAME) for i in range(len(runs)) if i % 6 == 2]
    times = "1767268800|1767268810|1767269410|600"
    ended = [f"{ARRAY}_{i}|{i}|COMPLETED|0:0|{times}||cpu=4|n1|{NAME}" for i in range(len(runs)) if i % 3 == 0]
    answers = {"squeue": "\n".join(waiting), "sacct": "\n".join(ended), "scontrol": "ClusterName = lab"}
    folder = store.root / "bin"
    folder.mkdir()
    for client in CLIENTS:
        (folder / f"{client}.out").write_text(answers[client] + "\n")
        (folder / client).write_text(f'#!/bin/sh\nexec cat "{folder}/{client}.out"\n')
        (folder / client).chmod(0o755)


if __name__ == "__main__":
    main()
