"""Who may work on a run: numbered claim files made with O_EXCL, a heartbeat, and a token.

``runs/<run_id>/claims/<n>`` is attempt n's claim; the owner of a run is the highest number that was not released.
Taking over a stale claim n means to create n + 1, which O_EXCL grants to one process alone; an owner that was taken
over notices, before each checkpoint's rename, that its number is no longer the highest. No claim is
renamed or deleted, nothing is locked: this works on NFS. Should somebody delete one all the same, its number is used no
second time: its ``.released`` and the attempt of that number count too.

A claim is stale when its process is dead (same host and account) or its heartbeat, the file's modification time, is
older than ``HEARTBEAT_TIMEOUT`` by the file system's own clock (any other). A job that Slurm has started again knows
that its earlier start is over, unless that node has merely lost touch and works on: two missed heartbeats are enough
there.
"""

import contextlib
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.store.attempt_dir import Execution
from experiments.store.files import names_in, write_whole
from experiments.store.records import Record, encode, load_sound
from mpformer.runtime.errors import RunFailure

HEARTBEAT_TIMEOUT = 180.0
"""Seconds without a heartbeat after which another host's claim is taken over."""

HEARTBEAT_PERIOD = 15.0

RESTART_TIMEOUT = 2 * HEARTBEAT_PERIOD
"""The same for a claim by an earlier start of this very job."""


class ClaimLost(RunFailure):
    """Another process has taken the run over: this one must write nothing more."""

    def __init__(self, message: str) -> None:
        super().__init__("claim-lost", message)


@dataclass(frozen=True)
class Owner:
    """The process behind a claim; ``machine`` tells kernels and process namespaces apart, ``born`` reused pids.

    What an unreadable record (being written, cut short) leaves is of an unknown machine.
    """

    host: str = ""
    machine: str = "unknown"
    pid: int = 0
    born: str = ""
    uid: int | None = None
    """Its account; None in records of versions that did not say."""

    def dead(self) -> bool | None:
        """Whether the process is gone; None if nobody can be asked: on another machine, or of another account.

        A system may hide the processes of others, which then seem to be gone.
        """
        if self.machine != machine() or self.uid not in (None, os.getuid()):
            return None
        born = process_born(self.pid)
        return not born or (bool(self.born) and born != self.born)


def this_process() -> Owner:
    """Return what this process is known by."""
    return Owner(socket.gethostname(), machine(), os.getpid(), process_born(os.getpid()), os.getuid())


@dataclass(frozen=True)
class ClaimRecord(Owner, Record):
    """``claims/<n>``: whose claim it is."""

    token: str = ""
    job_id: str = ""
    restarts: int = 0
    time: float = 0.0


@dataclass(frozen=True)
class Claim:
    """A claim that this process holds."""

    directory: Path
    number: int
    token: str

    @property
    def path(self) -> Path:
        """The claim's file."""
        return self.directory / str(self.number)

    def beat(self) -> None:
        """Renew the heartbeat."""
        os.utime(self.path)

    def confirm(self) -> None:
        """Raise ClaimLost unless this claim is still the owner, by its number and its token."""
        if highest(self.directory) != self.number or read(self.directory, self.number).token != self.token:
            raise ClaimLost(f"attempt {self.number} of {self.directory.parent.name} was taken over by another process")

    def release(self) -> None:
        """Give the run free; the claim's file stays, as history."""
        create(self.directory / f"{self.number}.released", "")


NO_JOB = Execution()


def acquire(directory: Path, timeout: float = HEARTBEAT_TIMEOUT, job: Execution = NO_JOB) -> Claim | None:
    """Claim the run whose claims are in ``directory``; None if another process holds it or was faster."""
    directory.mkdir(parents=True, exist_ok=True)
    attempted = highest(directory.parent / "attempts")  # before the claims: none of these can be of a later one
    names = names_in(directory)  # once: whoever claims after this is in the way of the number below
    if _live(directory, names, timeout, job) is not None:
        return None
    claim = Claim(directory, max(_highest(names), attempted) + 1, uuid.uuid4().hex)
    whose = {**asdict(this_process()), "job_id": job.job_id, "restarts": job.restarts}
    record = ClaimRecord(**whose, token=claim.token, time=time.time())
    return claim if create(claim.path, json.dumps(encode(record))) else None


def holder(directory: Path, timeout: float = HEARTBEAT_TIMEOUT, job: Execution = NO_JOB) -> int | None:
    """Return the number of the live claim on a run, None if it is free (for ``job``); changes no claim."""
    return _live(directory, names_in(directory), timeout, job)


def _live(directory: Path, names: Collection[str], timeout: float, job: Execution) -> int | None:
    """The highest claim, if it was not released and its process is alive, as far as can be known."""
    number = _highest(names)
    if not number or f"{number}.released" in names:
        return None
    claim = read(directory, number)
    if job.job_id and claim.job_id == job.job_id and claim.restarts < job.restarts:  # by an earlier start of this job
        timeout = min(timeout, RESTART_TIMEOUT)
    return number if lives(claim, directory / str(number), timeout) else None


def read(directory: Path, number: int) -> ClaimRecord:
    """Return a claim's record."""
    return load_sound(ClaimRecord, directory / str(number)) or ClaimRecord()


def lives(owner: Owner, beat: Path, timeout: float = HEARTBEAT_TIMEOUT) -> bool:
    """Whether a process is alive; on another machine, whether the file ``beat`` was touched lately."""
    dead = owner.dead()
    if dead is not None:
        return not dead
    try:
        return file_system_now(beat.parent) - beat.stat().st_mtime < timeout
    except FileNotFoundError:
        return False


class Heartbeat:
    """Renews a claim from a thread while a block runs; ``lost`` turns true if the claim was taken over."""

    def __init__(self, claim: Claim, period: float = HEARTBEAT_PERIOD) -> None:
        self._claim, self._period = claim, period
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.lost = False

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._period):
            with contextlib.suppress(OSError):  # a file server that is away for a moment
                self._claim.beat()
                self.lost = self.lost or highest(self._claim.directory) != self._claim.number


@contextlib.contextmanager
def held(claim: Claim) -> Iterator[Claim]:
    """Renew a claim while the block runs, then release it."""
    try:
        with Heartbeat(claim):
            yield claim
    finally:
        with contextlib.suppress(OSError):  # a full disk: the claim is free once this process has ended
            claim.release()


def machine() -> str:
    """Return what tells this kernel boot and process namespace from others: pids mean the same within it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process_born(pid: int) -> str:
    """Return the start time of a process in kernel ticks, empty if there is no such process or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return "" if Path("/proc/self/stat").exists() else _exists(pid)
    return "" if fields[0] in "ZX" else fields[19]


_PROBED: dict[int, tuple[float, float]] = {}
"""Of each device: its clock when it was last read, and this process's monotonic clock then."""

PROBE_SECONDS = 5.0
"""Time for which a file system's clock is believed to run like this machine's: thousands of runs are looked at then."""


def file_system_now(directory: Path) -> float:
    """Return the time by the clock of the file system that ``directory`` is on (a file server's may differ)."""
    try:
        device = directory.stat().st_dev
        theirs, ours = _PROBED.get(device, (0.0, -math.inf))
        if time.monotonic() - ours > PROBE_SECONDS:
            theirs, ours = _PROBED[device] = _probed(directory), time.monotonic()
    except OSError:
        return time.time()
    return theirs + time.monotonic() - ours


def _probed(directory: Path) -> float:
    """The file system's clock, read off a file that is made for it."""
    probe = directory / f".clock.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _exists(pid: int) -> str:
    """The same where there is no /proc: alive or not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"


def highest(directory: Path) -> int:
    """Return the highest number that a directory's files begin with, 0 if there is none."""
    return _highest(names_in(directory))


def _highest(names: Collection[str]) -> int:
    numbers = (name.partition(".")[0] for name in names)
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def create(path: Path, text: str) -> bool:
    """Create a file that must not exist, in one open and one write; False if it exists."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        write_whole(descriptor, text.encode(), path)
    except OSError:  # a full disk: an empty claim would keep everyone out until it is stale
        path.unlink()
        raise
    finally:
        os.close(descriptor)
    return True
