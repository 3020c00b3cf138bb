"""Why an attempt failed, from what it and Slurm left in its logs: a class, and the lines that tell.

What the attempt itself wrote comes first: it names the exception it ended with. Logs are asked where it could not
(killed, out of memory, a job that died before Python ran) or did not know (``error``).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.store.attempt_dir import FailureClass
from experiments.store.files import tail

TAIL = 8192
"""Bytes of a log that are looked at."""

_NEAR = 4096
"""Characters at its end among which the last exception is looked for."""

WORD = "mpformer: "
"""Beginning of a line of a job's log by which its batch shell says why it ended the job."""

START = f"{WORD}start "
"""Beginning of the line with which each start of a job begins in its log."""

_NO_REASON = "due to job requeue"
"""What Slurm writes of a start that it ends to queue the job again: nothing has failed."""

_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("oom", ("out of memory", "outofmemoryerror", "memoryerror", "bad_alloc", "allocate memory")),
    ("oom", ("oom-kill", "oom_kill", "oom kill", "exceeded job memory limit", "exceeded memory limit")),
    ("gpu", ("uncorrectable ecc", "nvrm: xid", "fallen off the bus", "nccl error", "unhandled cuda error")),
    ("gpu", ("watchdog caught collective operation timeout", "no cuda-capable device", "cuda unknown error")),
    ("timeout", ("due to time limit", "timed-out too many times", "timed-out and not checkpointable")),
    ("node", ("due to node failure", "node_fail", "node failure", "boot fail")),
    (
        "disk",
        ("no space left on device", "disk quota exceeded", "read-only file system", "stale file handle"),
    ),
    ("nan", ("floatingpointerror", "non-finite", "not finite", "loss is nan", "loss became nan")),
    ("import", ("modulenotfounderror", "importerror", "undefined symbol", "while loading shared libraries")),
    ("import", ("command not found", "lmod has detected")),
    (
        "data",
        ("filenotfounderror", "unidentifiedimageerror", "truncated file", "checksum", "is not prepared"),
    ),
    ("config", ("usererror", "validationerror", "unknown configuration key", "invalid value for")),
    (
        "killed",
        ("killed", "due to preemption", " cancelled at ", "exited with exit code", "terminated by signal"),
    ),
)
"""A class and what its lines say, in small letters, the most telling first: what is killed for its memory is killed."""

_EXCEPTION = re.compile(r"^[ \t]*([\w.]+(?:Error|Exception|Failure|Interrupt|Exit)\b)", re.MULTILINE)


@dataclass(frozen=True)
class Failure:
    """A failure class, NONE if the log does not tell, and at most three lines of the log, oldest first."""

    kind: FailureClass
    lines: tuple[str, ...]


def read(paths: Iterable[Path | None]) -> Failure:
    """Return what the logs tell of the last start; of several, the most telling class counts.

    Where the batch shell said why it ended the job, that is all.
    """
    text = "\n".join(_last_start(tail(path, TAIL)) for path in paths if path is not None)
    said = [line.removeprefix(WORD) for line in text.splitlines() if line.startswith(WORD)]
    if said:
        return Failure(FailureClass.NODE if "infrastructure" in said[-1] else FailureClass.TIMEOUT, (said[-1],))
    return classify(text)


def _last_start(text: str) -> str:
    """What a job's log holds of its last start, without Slurm's words on requeues; any other log as it is."""
    begun = text.rfind(START)
    lines = text[text.find("\n", begun) + 1 :].splitlines() if begun >= 0 else text.splitlines()
    return "\n".join(line for line in lines if _NO_REASON not in line.lower())


def classify(text: str) -> Failure:
    """Return the class that a log speaks for, and the lines that tell it; without one, its last exception and line."""
    small = text.lower()  # plain substrings: a store of thousands of failures is looked at in seconds
    for name, signs in _SIGNS:
        positions = [position for sign in signs for position in _positions(small, sign)]
        if positions:
            return Failure(FailureClass(name), _shown(text, sorted(positions)[-2:]))
    return Failure(FailureClass.NONE, _shown(text, []))


def _positions(text: str, sign: str) -> list[int]:
    """Where a sign stands, the last two times."""
    last = text.rfind(sign)
    return [] if last < 0 else [position for position in (text.rfind(sign, 0, last), last) if position >= 0]


def _shown(text: str, positions: Sequence[int]) -> tuple[str, ...]:
    """The lines at these positions and the last exception, each once, in the log's order, cut to a readable length."""
    exceptions = [found.start(1) for found in _EXCEPTION.finditer(text, max(0, len(text) - _NEAR))]
    chosen = sorted({*positions, *exceptions[-1:]})
    lines = [_line(text, position) for position in chosen] or text.strip().splitlines()[-1:]
    return tuple(dict.fromkeys(line.strip()[:300] for line in lines))


def _line(text: str, position: int) -> str:
    end = text.find("\n", position)
    return text[text.rfind("\n", 0, position) + 1 : end if end >= 0 else None]
