"""The last job of a launch: the report of what there is, when every other job has ended, however it ended."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.slurm_job import check_code
from mpformer.errors import RunFailure


@dataclass(frozen=True)
class ReportJob:
    """Builds a suite's report; pickled by submitit."""

    root: Path
    suite: str
    scale: str
    dataset: str
    code: Path

    @property
    def command(self) -> list[str]:
        """The report command, argument by argument: no shell reads it."""
        where = ["--scale", self.scale, "--dataset", self.dataset, "--root", str(self.root)]
        return [sys.executable, "-m", "experiments.cli", "report", self.suite, *where]

    def __call__(self) -> str:
        """Build the report; returns what the command printed, raises RunFailure with its last line if it failed."""
        check_code(self.code)
        done = subprocess.run(self.command, capture_output=True, text=True)
        print(done.stdout, done.stderr, sep="", flush=True)
        if done.returncode:
            raise RunFailure("report", (done.stderr.strip().splitlines() or ["no word"])[-1])
        return done.stdout

    def checkpoint(self) -> Any:
        """Return what submitit is to execute after a requeue: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
