"""What a job can ask of Slurm and of the kernel about itself."""

import contextlib
import os
import re
import time
from pathlib import Path

from experiments.status import failures, slurm_client
from experiments.status.slurm_client import SlurmError
from experiments.store.attempt_dir import Ending, FailureClass, Outcome
from experiments.store.files import tail
from mpformer.runtime.errors import RunFailure

REQUEUE_SECONDS = 600.0
"""Time in which the controller has to answer when the job wants to be requeued."""


def requeue() -> None:
    """Ask Slurm to queue this job again; tries for a while, since the controller may be away.

    Raises RunFailure("killed") with Slurm's answer if it does not let itself be asked.
    """
    end = time.monotonic() + REQUEUE_SECONDS
    while True:
        try:
            slurm_client.call("scontrol", "requeue", os.environ.get("SLURM_JOB_ID", ""))
            return
        except SlurmError as error:
            if time.monotonic() > end or "disabled" in error.said:
                why = f"the job could not be requeued: {error.said}; launch again to continue"
                raise RunFailure("killed", why) from None
            time.sleep(5)


def time_left() -> str:
    """Return the time to the job's limit as Slurm writes it, empty if it cannot be asked."""
    try:
        return slurm_client.call("squeue", "-h", "-j", os.environ.get("SLURM_JOB_ID", ""), "-o", "%L").strip()
    except SlurmError:
        return ""


def seconds(left: str) -> float:
    """Return a time as Slurm writes it, ``[[days-]hours:]minutes:seconds``, in seconds; infinity if it is none."""
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d\d)", left)
    if found is None:
        return float("inf")
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + rest


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
    """Return what the earlier start of this job left in submitit's log, empty if there is none."""
    if "SUBMITIT_FOLDER" not in os.environ:
        return ""
    from submitit import JobEnvironment

    parts = tail(JobEnvironment().paths.stdout, 65536).split("Starting with JobEnvironment(")
    return parts[-2] if len(parts) > 2 else ""
