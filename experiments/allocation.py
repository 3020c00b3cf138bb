"""What a job can ask of Slurm and of the kernel about itself."""

import contextlib
import os
import re
import subprocess
import time
from pathlib import Path

from experiments.attempt import Outcome
from mpformer.errors import RunFailure

REQUEUE_SECONDS = 600.0
"""Time in which the controller has to answer when the job wants to be requeued."""


def requeue() -> None:
    """Ask Slurm to queue this job again; tries for a while, since the controller may be away.

    Raises RunFailure("killed") with Slurm's answer if it does not let itself be asked.
    """
    end = time.monotonic() + REQUEUE_SECONDS
    while True:
        answer = _ask("scontrol", "requeue", os.environ.get("SLURM_JOB_ID", ""))
        if answer is None or answer.returncode:
            reason = "no answer" if answer is None else " ".join(answer.stderr.split())
            if time.monotonic() > end or "disabled" in reason:
                raise RunFailure("killed", f"the job could not be requeued: {reason}; launch again to continue")
            time.sleep(5)
        else:
            return


def time_left() -> str:
    """Return the time to the job's limit as Slurm writes it, empty if it cannot be asked."""
    answer = _ask("squeue", "-h", "-j", os.environ.get("SLURM_JOB_ID", ""), "-o", "%L")
    return answer.stdout.strip() if answer is not None and not answer.returncode else ""


def seconds(left: str) -> float:
    """Return a time as Slurm writes it, ``[[days-]hours:]minutes:seconds``, in seconds; infinity if it is none."""
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d\d)", left)
    if found is None:
        return float("inf")
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + rest


def _ask(*command: str) -> "subprocess.CompletedProcess[str] | None":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None


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


_CAUSES = (
    (r"exceeded memory limit|oom.?kill", "oom", "failed"),
    (r"DUE TO NODE FAILURE", "node", "lost"),
    (r"CANCELLED AT", "killed", "lost"),
)
"""What Slurm writes into a job's log, and the class and outcome of the attempt that it ended."""


def said_by_slurm(words: str) -> Outcome | None:
    """Return how an attempt ended by a job's log; None if that says nothing of it."""
    for pattern, kind, name in _CAUSES:
        for line in words.splitlines():
            if re.search(pattern, line):
                return Outcome(name, kind, line.strip()[:300])
    return None


def last_words() -> str:
    """Return what the earlier start of this job left in submitit's log, empty if there is none."""
    if "SUBMITIT_FOLDER" not in os.environ:
        return ""
    from submitit import JobEnvironment

    try:
        with JobEnvironment().paths.stdout.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 65536))
            parts = log.read().decode(errors="replace").split("Starting with JobEnvironment(")
    except OSError:
        return ""
    return parts[-2] if len(parts) > 2 else ""
