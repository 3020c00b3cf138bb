"""What a job can ask of Slurm and of the kernel about itself."""

import contextlib
import math
import os
import re
import time
from pathlib import Path

from experiments.execution import provenance
from experiments.launch import profiles
from experiments.slurm.batch_shell import DEATHS
from experiments.status import failures, slurm_client
from experiments.status.slurm_client import SlurmError
from experiments.store import launches
from experiments.store.attempt_dir import Ending, FailureClass, Outcome
from experiments.store.files import tail
from experiments.store.launches import Death


def deaths() -> tuple[Death, ...]:
    """Return the starts of this launch's jobs that the infrastructure ended, as their batch shells noted them."""
    return launches.deaths(Path(os.environ[DEATHS])) if DEATHS in os.environ else ()


def time_left() -> str:
    """Return the time to the job's limit as Slurm writes it, empty if it is not known.

    In a container without Slurm's clients it is the time to the limit that the job began with.
    """
    with contextlib.suppress(SlurmError):
        return slurm_client.call("squeue", "-h", "-j", provenance.execution().job, "-o", "%L").strip()
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    minutes, rest = divmod(max(0, int(end) - int(time.time())), 60) if end.isdigit() else (0, 0)
    return f"{minutes}:{rest:02d}" if end.isdigit() else ""


def seconds(left: str) -> float:
    """Return a time as Slurm writes it in seconds; infinity if it is none."""
    found = profiles.seconds(left)
    return math.inf if found is None else found


def oom_kills(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return how many processes the kernel has killed for memory in this process's control group and those above.

    0 where there are none. The root group's count is the machine's, and is left out.
    """
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                return _kills(root, path, "memory.events")
            if "memory" in controllers.split(","):
                return _kills(root / "memory", path, "memory.oom_control")
    return 0


def _kills(top: Path, path: str, file: str) -> int:
    count = 0
    group = Path(path.strip("/"))
    for level in [group, *group.parents][:-1]:
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", (top / level / file).read_text(), re.MULTILINE)
            count = max(count, int(found[1]) if found else 0)
    return count


def said_by_slurm(words: str) -> Ending | None:
    """Return how an attempt ended by what Slurm left in the job's log; None if that says nothing of it."""
    found = failures.classify(words)
    if found.kind not in (FailureClass.OOM, FailureClass.NODE, FailureClass.TIMEOUT, FailureClass.KILLED):
        return None
    outcome = Outcome.FAILED if found.kind is FailureClass.OOM else Outcome.LOST
    return Ending(outcome, found.kind, found.lines[0])


def last_words() -> str:
    """Return what the earlier start of this job left in its log, empty if there is none."""
    if "SUBMITIT_FOLDER" not in os.environ:
        return ""
    from submitit import JobEnvironment

    parts = tail(JobEnvironment().paths.stdout, 65536).split(failures.START)
    return parts[-2] if len(parts) > 2 else ""
