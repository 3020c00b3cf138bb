"""How long a launch of 1,000 runs takes on a real Slurm: `python benchmarks/slurm_launch.py [--runs N] [--repeats N]`.

Starts a private cluster (`slurm/devcluster`), plans the headline suite with as many seeds as it takes, submits all of
it as jobs that do nothing, asks Slurm how many it has, and cancels them. Prints wall and processor seconds of each step
(the median over repeats, with the range). Targets: planned in under 2 s, submitted in under 30 s.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.slurm import submission
from experiments.slurm.batches import Target
from experiments.status import standing
from experiments.store.run_dir import Store
from tests.support import counting_jobs
from tests.support.counting_jobs import Counting, profile

ROOT = Path(__file__).resolve().parents[1]

Times = dict[str, list[tuple[float, float]]]


def timed(times: Times, what: str, work: Callable[[], Any]) -> Any:
    """Do it, and note its wall and processor seconds (children included)."""
    wall, before = time.perf_counter(), os.times()
    found = work()
    after = os.times()
    used = sum(after[:4]) - sum(before[:4])
    times.setdefault(what, []).append((time.perf_counter() - wall, used))
    return found


def once(base: Path, runs: int, times: Times) -> None:
    """Plan and submit into an empty store; raises AssertionError unless Slurm then has every run."""
    data, store = counting_jobs.data_root(base), Store(base / "store")
    seeds = tuple(range(-(-runs // 2)))
    target = Target("devcluster", profile(parallelism=1, report=True))
    made = timed(times, "plan", lambda: counting_jobs.plan(data, seeds=seeds))
    timed(times, "states of all", lambda: standing.look_at_plan(made, store))
    timed(times, "dry run", lambda: list(submission.scripts(made, store, target)))
    done = timed(times, "launch", lambda: submission.launch(made, store, target, runner=Counting()))
    queued = subprocess.run(
        ["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True, check=True
    ).stdout.split()
    expected = sum(len(one.runs) or 1 for one in done.submissions)
    assert not done.problem, done.problem
    assert len(queued) == expected == len(made.unique) + 1, (len(queued), expected)
    again = timed(times, "launch again, all queued", lambda: submission.launch(made, store, target))
    assert again.started == ()
    subprocess.run(["scancel", *(str(one.job_id) for one in done.submissions)], check=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--accounting", action="store_true")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="slurm-launch-"))
    script = [sys.executable, str(ROOT / "slurm" / "devcluster")]
    where = ["--dir", str(folder / "cluster")]
    options = ["--accounting"] if asked.accounting else []
    try:
        subprocess.run([*script, "up", *options, *where], check=True, stdout=subprocess.DEVNULL)
        os.environ["SLURM_CONF"] = str(folder / "cluster" / "etc" / "slurm.conf")
        times: Times = {}
        for number in range(asked.repeats):
            once(folder / str(number), asked.runs, times)
        load = os.getloadavg()[0]
        print(f"{asked.runs} runs, n = {asked.repeats}, {os.cpu_count()} cores, load {load:.1f} at the end")
        for what, pairs in times.items():
            walls, used = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            spread = f"{min(walls):.2f}-{max(walls):.2f}"
            wall = f"{statistics.median(walls):6.2f} s wall ({spread})"
            print(f"{what:<26} {wall}, {statistics.median(used):6.2f} s processor")
    finally:
        subprocess.run([*script, "down", *where], check=False, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
