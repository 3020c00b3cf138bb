"""The last job of a launch: the report of what there is, when every other job has ended, however it ended.

Then it launches the runs that the site's limits left over, if there are any, and where the profile says so those that
Slurm ended to make room for others; and it looks at the suite's status, which tells whoever the profile names that the
suite has ended.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.slurm.job import check_code
from experiments.store.attempt_dir import FailureClass
from mpformer.runtime.errors import RunFailure


@dataclass(frozen=True)
class ReportJob:
    """Builds a suite's report; pickled by submitit."""

    root: Path
    suite: str
    scale: str
    dataset: str
    code: Path
    arguments: tuple[str, ...] = ()
    """The rest of the command line of a further launch of the plan."""
    left_over: bool = False
    """Whether there are runs that did not fit in the queue."""
    resubmit: bool = False
    """Whether what was preempted is launched again."""

    def __call__(self) -> str:
        """Build the report; returns what the command printed, raises RunFailure with its last line if it failed."""
        check_code(self.code)
        where = ("--scale", self.scale, "--dataset", self.dataset, "--root", str(self.root))
        report = self._run("report", self.suite, *where)
        if self.left_over:
            self._run("launch", self.suite, *where, "--new", *self.arguments)
        if self.resubmit:
            self._run("retry", self.suite, *where, "--class", FailureClass.PREEMPTED, *self.arguments)
        self._run("status", self.suite, *where)
        if report.returncode:
            raise RunFailure("report", (report.stderr.strip().splitlines() or ["no word"])[-1])
        return report.stdout

    def _run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run a command of ours, argument by argument: no shell reads them."""
        done = subprocess.run(
            [sys.executable, "-m", "experiments.cli.main", *arguments], capture_output=True, text=True
        )
        print(done.stdout, done.stderr, sep="", flush=True)
        return done
