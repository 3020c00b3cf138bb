"""A mini suite on a Slurm that everything happens to, launched as a user launches it; then everything is counted.

    .venv/bin/python tests/support/chaos.py --minutes 15 --seed 1

Starts a private cluster (slurm/devcluster), launches the suite once in peace and once while daemons, nodes, jobs and
processes die at random times, and launches again what was cancelled, as its user would. Prints one JSON object with
the counts; exits with 1 unless every run is done with the numbers of the undisturbed launch, none was ever trained by
two processes at a time, and `status --json` never contradicted squeue and the process table. `test_chaos.py` is the
short form.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.launch import profiles
from experiments.slurm import submission
from experiments.slurm.batches import Target
from experiments.status.states import State, derive
from experiments.store import claims
from experiments.store.files import read_json
from experiments.store.run_dir import RunDir, Store
from experiments.suites.planning import Plan
from mpformer.runtime.errors import UserError
from tests.support import tiny_jobs
from tests.support.small_runs import Paced, numbers
from tests.support.tiny_jobs import ROOT, client, fail_node, kill_attempt, parent_of, tiny_plan
from tests.support.truth import Watch

ROWS = ("mask2former", "mp-former")
CALM_SECONDS = 900.0
"""Time to finish in, once nothing happens any more."""


@dataclass
class Cluster:
    """The devcluster, as :func:`tiny_jobs.fail_node` wants it."""

    folder: Path

    @property
    def conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    def call(self, *arguments: str, check: bool = True) -> str:
        command = [sys.executable, str(ROOT / "slurm" / "devcluster"), *arguments, "--dir", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.call("status", "--json", check=False)))


@dataclass
class Chaos:
    """A plan, launched into a store on a cluster, and what is done to it."""

    cluster: Any
    plan: Plan
    store: Store
    data: Path
    target: Target
    pace: float
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    launched_at: float = 0.0

    def launch(self) -> None:
        """Launch what is missing; a controller that is away says so, and the user tries again later."""
        self.launched_at = time.monotonic()
        try:
            made = submission.launch(self.plan, self.store, self.target, runner=Paced(self.pace))
        except UserError as error:
            print(f"  launch refused: {str(error)[:150]}", flush=True)
            self.counts["launches refused"] += 1
            return
        self.counts["launches that submitted"] += bool(made.started)
        self.counts["runs submitted"] += len(made.started)

    def all_done(self) -> bool:
        """Whether every run is DONE, by its files."""
        return all(self.directory(run.run_id).result(run.eval_id) for run in self.plan.unique)

    def directory(self, run_id: str) -> RunDir:
        return self.store.run(run_id)

    def disturb(self, seconds: float, every: float) -> None:
        """One disturbance after the other at random times, some ``every`` seconds; every kind comes to pass in turn."""
        end = time.monotonic() + seconds
        deck: list[tuple[str, Callable[[], bool]]] = []
        while time.monotonic() < end and not self.all_done():
            time.sleep(self.rng.expovariate(1 / every))
            deck = deck or self.rng.sample(self.acts(), len(self.acts()))
            name, act = deck.pop()
            with contextlib.suppress(subprocess.SubprocessError, OSError):
                if act():
                    self.counts[name] += 1
                    print(f"  {time.strftime('%H:%M:%S')} {name}", flush=True)
            self.care()

    def calm(self) -> None:
        """Let everything come to its end.

        A controller that was killed before it had saved the end of a job believes that it runs until the node
        registers again: by itself within some minutes (20 pings), here at once, since its daemon is started again.
        """
        for name in self.nodes():
            self.signal(f"slurmd-{name}", signal.SIGTERM)
        self.mend()
        end = time.monotonic() + CALM_SECONDS
        while not self.all_done():
            assert time.monotonic() < end, f"not done in time:\n{self.picture()}"
            time.sleep(2)
            self.care()

    def care(self) -> None:
        """What people do now and then: bring daemons and nodes back, release held jobs, launch again what stopped."""
        if time.monotonic() - self.launched_at < 20:
            return
        self.mend()
        for line in client("squeue", "-h", "-o", "%i %r", check=False).splitlines():
            if "held" in line.lower():
                client("scontrol", "release", line.split()[0], check=False)
                self.counts["held jobs released"] += 1
        self.launch()

    def mend(self) -> None:
        """What an administrator does: daemons that died run again, nodes that Slurm has drained take jobs again."""
        self.cluster.call("up", check=False)
        for line in client("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T %E", check=False).splitlines():
            name, state, *reason = line.split()
            if state.startswith(("down", "drain")):
                print(f"  {name} is {state} ({' '.join(reason)}): resumed", flush=True)
                client("scontrol", "update", f"nodename={name}", "state=resume", check=False)
                self.counts["nodes resumed by hand"] += 1

    # --- what happens ------------------------------------------------------------------------------------------------

    def acts(self) -> list[tuple[str, Callable[[], bool]]]:
        """Everything that can happen, the frequent ones several times."""
        return [
            *[("attempts killed (SIGKILL)", self.kill_attempt)] * 3,
            *[("watching processes killed (SIGKILL)", self.kill_job)] * 2,
            *[("preemptions by the high partition", self.preempt)] * 2,
            *[("warnings by scancel --signal=USR2", lambda: self.on_job("scancel", "--signal=USR2"))] * 2,
            *[("external requeues", lambda: self.on_job("scontrol", "requeue"))] * 2,
            ("jobs cancelled", lambda: self.on_job("scancel", states="all")),
            ("slurmctld killed (SIGKILL)", self.kill_controller),
            ("slurmd killed (SIGKILL)", self.kill_daemon),
            ("nodes lost", self.lose_node),
            ("launches in between", self.launch_again),
        ]

    def running(self) -> list[RunDir]:
        directories = [self.directory(run.run_id) for run in self.plan.unique]
        return [one for one in directories if claims.holder(one.path / "claims") is not None]

    def kill_attempt(self) -> bool:
        found = self.running()
        return bool(found) and kill_attempt(self.rng.choice(found))

    def kill_job(self) -> bool:
        found = self.running()
        if not found:
            return False
        directory = self.rng.choice(found)
        claim = read_json(directory.path / "claims" / str(claims.holder(directory.path / "claims"))) or {}
        parent = parent_of(int(claim.get("pid", 0)))
        if parent <= 1 or b"submitit" not in Path(f"/proc/{parent}/cmdline").read_bytes():
            return False
        os.kill(parent, signal.SIGKILL)
        return True

    def preempt(self) -> bool:
        node = self.rng.choice(self.nodes())
        client("sbatch", "-p", "high", "-w", node, "--exclusive", "-o", "/dev/null", "-J", "other", "--wrap", "sleep 2")
        return True

    def on_job(self, *command: str, states: str = "R") -> bool:
        jobs = client("squeue", "-h", "-r", "-t", states, "-o", "%i %j").splitlines()
        ours = [line.split()[0] for line in jobs if self.plan.suite.name in line.split()[1]]
        if not ours:
            return False
        client(*command, self.rng.choice(ours))
        return True

    def kill_controller(self) -> bool:
        return self.kill("slurmctld")

    def kill_daemon(self) -> bool:
        return self.kill(f"slurmd-{self.rng.choice(self.nodes())}")

    def signal(self, name: str, number: signal.Signals) -> bool:
        """Send a signal to a daemon and wait for its end; False if it does not run."""
        pid = self.cluster.status()["daemons"].get(name)
        if pid is None:
            return False
        os.kill(pid, number)
        end = time.monotonic() + 20
        while self.cluster.status()["daemons"].get(name) == pid and time.monotonic() < end:
            time.sleep(0.2)
        return True

    def kill(self, name: str) -> bool:
        if not self.signal(name, signal.SIGKILL):
            return False
        time.sleep(self.rng.uniform(1, 8))
        self.cluster.call("up", check=False)
        return True

    def lose_node(self) -> bool:
        fail_node(self.cluster, self.rng.choice(self.nodes()))
        return True

    def launch_again(self) -> bool:
        self.launch()
        return True

    def nodes(self) -> list[str]:
        return [name.removeprefix("slurmd-") for name in self.cluster.status()["daemons"] if "slurmd-" in name]

    # --- what came of it ----------------------------------------------------------------------------------------------

    def picture(self) -> str:
        """Every run's state, its last attempt, and Slurm's queue."""
        rows = [client("squeue", "-a", check=False)]
        for run in self.plan.unique:
            state = derive(self.directory(run.run_id), run.eval_id)
            rows.append(f"{run.run_id} {state.label} attempt {state.attempt}: {state.detail}")
        return "\n".join(rows)

    def overlaps(self) -> list[str]:
        """Runs that two processes trained at the same time, by what the processes themselves noted."""
        return [
            run.run_id for run in self.plan.unique if overlapping(self.directory(run.run_id).path / "witness.jsonl")
        ]

    def attempts(self) -> Counter[str]:
        """How the attempts ended."""
        found: Counter[str] = Counter()
        for run in self.plan.unique:
            for stage in tiny_jobs.stages(self.directory(run.run_id)):
                kind = f" ({stage['failure_class']})" if (stage or {}).get("failure_class") else ""
                found[f"{(stage or {}).get('outcome')}{kind}"] += 1
        return found


def overlapping(witness: Path) -> bool:
    """Whether the spans of two processes in a witness file overlap."""
    spans: dict[str, list[float]] = {}
    for line in witness.read_text().splitlines() if witness.exists() else ():
        entry = json.loads(line)
        spans.setdefault(entry["process"], []).append(entry["time"])
    ordered = sorted((min(times), max(times)) for times in spans.values())
    return any(later[0] <= earlier[1] for earlier, later in itertools.pairwise(ordered))


def unleash(
    cluster: Any,
    base: Path,
    *,
    seconds: float,
    every: float,
    seeds: Sequence[int],
    iterations: int,
    pace: float,
    seed: int,
    rows: Sequence[str] = ROWS,
    parallelism: int = 3,
) -> dict[str, Any]:
    """Launch in peace, launch in chaos, and return the counts; ``ok`` says whether all is as it should be."""
    period = max(2, iterations // 12)
    changes = {"schedule__max_iter": iterations, "runtime__checkpoint_period": period}
    plan = tiny_plan(base / "data", tuple(seeds), tuple(rows), **changes)
    profile = profiles.load("devcluster").model_copy(
        update={"parallelism": parallelism, "memory": "2GB", "report": False}
    )
    target = Target("devcluster", profile)  # type: ignore[arg-type]
    peace = Chaos(cluster, plan, Store(base / "peace"), base / "data", target, 0.0, random.Random(seed))
    peace.launch()
    peace.calm()
    chaos = Chaos(cluster, plan, Store(base / "chaos"), base / "data", target, pace, random.Random(seed))
    chaos.launch()
    began = time.monotonic()
    with Watch(chaos.store, plan.suite.name) as watch:
        chaos.disturb(seconds, every)
        disturbed = time.monotonic() - began
        chaos.calm()
    return _report(chaos, peace, watch, disturbed, time.monotonic() - began)


def _report(chaos: Chaos, peace: Chaos, watch: Watch, disturbed: float, took: float) -> dict[str, Any]:
    runs = chaos.plan.unique
    done = [run for run in runs if derive(chaos.directory(run.run_id), run.eval_id).state is State.DONE]
    same = [run for run in done if _numbers(chaos, run) == _numbers(peace, run)]
    overlaps = chaos.overlaps()
    return {
        "ok": len(same) == len(runs) and not overlaps and not watch.contradictions,
        "runs": len(runs),
        "done": len(done),
        "numbers of the undisturbed launch": len(same),
        "trained by two processes at a time": len(overlaps),
        "samples of status": watch.samples,
        "runs called UNKNOWN in them": watch.unknown,
        "contradictions by kind": dict(watch.kinds),
        "contradictions": watch.contradictions,
        "disturbed for (s)": round(disturbed),
        "took (s)": round(took),
        "what happened": dict(sorted(chaos.counts.items())),
        "attempts": dict(sorted(chaos.attempts().items())),
    }


def _numbers(chaos: Chaos, run: Any) -> dict[str, Any]:
    return numbers(chaos.directory(run.run_id), run)


@contextlib.contextmanager
def _cluster(nodes: int, accounting: bool) -> Iterator[Cluster]:
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="devcluster-chaos-")))
    cluster.call("up", "--nodes", str(nodes), *(["--accounting"] if accounting else []))
    os.environ["SLURM_CONF"] = str(cluster.conf)
    try:
        yield cluster
    finally:
        cluster.call("down", check=False)
        shutil.rmtree(cluster.folder, ignore_errors=True)


def main() -> int:
    """The long form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="time in which things happen (default 15)")
    parser.add_argument("--every", type=float, default=8, help="mean seconds between two disturbances (default 8)")
    parser.add_argument("--runs", type=int, default=8, help="runs of the suite, an even number (default 8)")
    parser.add_argument("--iterations", type=int, default=120, help="iterations a run (default 120)")
    parser.add_argument("--pace", type=float, default=0.5, help="seconds of pause a line of metrics (default 0.5)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the random disturbances")
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder for the stores; default: a temporary one")
    asked = parser.parse_args()
    base = asked.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    with _cluster(asked.nodes, asked.accounting) as cluster:
        found = unleash(
            cluster,
            base,
            seconds=60 * asked.minutes,
            every=asked.every,
            seeds=range(asked.runs // len(ROWS)),
            iterations=asked.iterations,
            pace=asked.pace,
            seed=asked.seed,
        )
    print(json.dumps({"seed": asked.seed, "accounting": asked.accounting, **found}, indent=1))
    if asked.keep is None:
        shutil.rmtree(base, ignore_errors=True)
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
