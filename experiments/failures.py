"""Why an attempt failed, from what it and Slurm left in its logs: a class, and the lines that tell.

The attempt's own word comes first: it names the exception it ended with. Logs are asked where it could not (killed,
out of memory, a job that died before Python ran) or did not know (``error``).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

CLASSES = (
    "oom", "timeout", "nan", "node", "disk", "import", "data", "config", "killed", "claim-lost", "error",
)  # fmt: skip
"""The failure classes, as ``retry --class`` takes them."""

TAIL = 8192
"""Bytes of a log that are looked at."""

_NEAR = 4096
"""Characters at its end among which the last exception is looked for."""

_SIGNS: tuple[tuple[str, str], ...] = (
    ("oom", r"CUDA out of memory|OutOfMemoryError|\bMemoryError\b|std::bad_alloc|can't allocate memory"),
    ("oom", r"oom[-_ ]kill|[Ee]xceeded (job |step )?memory limit|Out Of Memory|Cannot allocate memory"),
    ("timeout", r"DUE TO TIME LIMIT|timed-out (too many times|and not checkpointable)"),
    ("node", r"DUE TO NODE FAILURE|NODE_FAIL|Node failure|\bBoot fail|Unable to contact slurm(d| controller)"),
    ("disk", r"No space left on device|Disk quota exceeded|Read-only file system|Stale file handle"),
    ("nan", r"FloatingPointError|[Nn]on-?finite|loss (became|is) (nan|NaN|inf)"),
    ("import", r"ModuleNotFoundError|ImportError|undefined symbol|error while loading shared libraries"),
    ("import", r"command not found|No such file or directory.*python|Lmod has detected"),
    ("data", r"FileNotFoundError|UnidentifiedImageError|Truncated File|checksum|is not prepared"),
    ("config", r"UserError|ValidationError|unknown configuration key|invalid value for"),
    ("killed", r"\bKilled\b|DUE TO PREEMPTION|\*\*\* (JOB|STEP) .* CANCELLED|exited with exit code|signal \d+"),
)
"""A class and what its lines look like, the most telling first: what is killed for its memory is 'Killed' too."""

_PATTERNS = tuple((name, re.compile(pattern)) for name, pattern in _SIGNS)
_EXCEPTION = re.compile(r"^[ \t]*([\w.]+(?:Error|Exception|Failure|Interrupt|Exit)\b)", re.MULTILINE)


@dataclass(frozen=True)
class Failure:
    """A failure class, empty if the log does not tell, and at most three lines of the log, oldest first."""

    kind: str
    lines: tuple[str, ...]


def tail(path: Path | None, size: int = TAIL) -> str:
    """Return the end of a log, empty if there is none."""
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - size))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def read(paths: Iterable[Path | None]) -> Failure:
    """Return what the logs tell; of several, the most telling class counts."""
    return classify("\n".join(tail(path) for path in paths))


def classify(text: str) -> Failure:
    """Return the class that a log speaks for, and the lines that tell it; without one, its last exception and line."""
    for name, pattern in _PATTERNS:
        places = [found.start() for found in pattern.finditer(text)]
        if places:
            return Failure(name, _shown(text, places[-2:]))
    return Failure("", _shown(text, []))


def _shown(text: str, places: Sequence[int]) -> tuple[str, ...]:
    """The lines at these places and the last exception, each once, in the log's order, cut to a readable length."""
    exceptions = [found.start(1) for found in _EXCEPTION.finditer(text, max(0, len(text) - _NEAR))]
    chosen = sorted({*places, *exceptions[-1:]})
    lines = [_line(text, place) for place in chosen] or text.strip().splitlines()[-1:]
    return tuple(dict.fromkeys(line.strip()[:300] for line in lines))


def _line(text: str, place: int) -> str:
    end = text.find("\n", place)
    return text[text.rfind("\n", 0, place) + 1 : end if end >= 0 else None]
