"""Scripts in place of squeue, sacct and scontrol: they print what Slurm 22.05 printed, or fail as it fails."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.status import standing
from experiments.status.states import RunState
from experiments.store.files import write_json
from experiments.store.journal import BatchRun, Submission, of_launch
from experiments.store.run_dir import RunDir, Store
from experiments.store.suite_record import SuiteRecord, SuiteRow, SuiteRun
from experiments.suites.planning import Plan

LAUNCH, NAME, ARRAY = "20260101-120000-abcdef", "headline.20260101-120000-abcdef.0", "1234"


SCRIPT = """#!/bin/sh
f={folder}/$(basename "$0")
[ -e "$f.sleep" ] && exec sleep "$(cat "$f.sleep")"
echo "$@" >> "$f.calls"
cat "$f.err" >&2
cat "$f.out"
exit "$(cat "$f.rc")"
"""


@dataclass
class FakeSlurm:
    """What the three clients answer."""

    folder: Path
    array: str = ARRAY
    queue: list[str] = field(default_factory=list)
    accounts: list[str] = field(default_factory=list)

    def say(self, client: str, out: str = "", err: str = "", code: int = 0) -> None:
        for suffix, text in (("out", out), ("err", err), ("rc", str(code))):
            (self.folder / f"{client}.{suffix}").write_text(text)

    def queued(self, index: int, state: str, reason: str = "None", name: str = NAME, start: str = "N/A") -> None:
        line = f"{self.array}_{index}|{int(self.array) + 1 + index}|{state}|{reason}|1767268800|{start}|n0|{name}"
        self.queue.append(line)
        self.say("squeue", "\n".join(self.queue) + "\n")

    def accounted(
        self, index: int, state: str, code: str = "0:0", elapsed: int = 60, rss: str = "", name: str = NAME
    ) -> None:
        head = f"{self.array}_{index}|{int(self.array) + 1 + index}"
        times = f"1767268800|1767268810|1767268870|{elapsed}"
        tres = "billing=1,cpu=4,gres/gpu=2,mem=500M,node=1"
        self.accounts.append(f"{head}|{state}|{code}|{times}||{tres}|n0|{name}")
        if rss:
            self.accounts.append(f"{self.array}_{index}.0||{state}|{code}|{times}|{rss}|{tres}|n0|python")
        self.say("sacct", "\n".join(self.accounts) + "\n")

    def no_accounting(self) -> None:
        self.say("sacct", err="Slurm accounting storage is disabled\n", code=1)

    def down(self) -> None:
        message = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
        self.say("squeue", err=f"{message}\n", code=1)
        self.say("scontrol", err=f"{message}\n", code=1)

    def calls(self, client: str) -> int:
        path = self.folder / f"{client}.calls"
        return len(path.read_text().splitlines()) if path.exists() else 0


@dataclass
class Submitted:
    """The four runs of a plan as one array."""

    plan: Plan
    store: Store

    def run(self, index: int = 0) -> RunDir:
        return self.store.run(self.plan.unique[index].run_id)

    def state(self, index: int = 0) -> RunState:
        run = self.plan.unique[index]
        return standing.look(self.store, [(run.run_id, run.eval_id)]).states[run.run_id, run.eval_id]

    def said(self, index: int = 0) -> tuple[str, str]:
        state = self.state(index)
        return state.label, state.detail

    def attempt(self, index: int = 0, launch: str = LAUNCH, log: str = "", **stage: Any) -> None:
        """Leave what an attempt leaves; without an outcome, as one that died."""
        run = self.run(index)
        number = max(run.attempts(), default=0) + 1
        about = {"stage": "all", "started": time.time() - 90, "ended": None, "outcome": None, "launch": launch}
        write_json(run.attempt(number).path / "stage.json", {**about, **stage})
        (run.attempt(number).path / "log.txt").write_text(log)


def submit(plan: Plan, store: Store, job_id: str | None = ARRAY, launch: str = LAUNCH, **changes: Any) -> None:
    for run in plan.unique:
        store.run(run.run_id).create(run.config, run.row.name)
    runs = tuple(BatchRun(run.run_id, run.eval_id) for run in plan.unique)
    values = {"stage": "all", "name": NAME, "profile": "a100", "cluster": "lab", "batch": 0, **changes}
    of_launch(store, launch).submitting(Submission(runs=runs, time=0.0, **values))
    if job_id is not None:
        of_launch(store, launch).submitted(values["batch"], job_id)


def suite_record(plan: Plan) -> SuiteRecord:
    """Return a record of a suite of one row with all runs of the plan."""
    runs = tuple(SuiteRun(run.seed, run.run_id, run.eval_id) for run in plan.unique)
    rows = (SuiteRow("mask2former", runs=runs),)
    return SuiteRecord("headline", "mini", "shapes", rows, primary="AP", baseline="mask2former")
