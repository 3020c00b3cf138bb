"""Slurm's clients, called in one way: with the same patience, and one line about what went wrong."""

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mpformer.runtime.errors import UserError

PATIENCE = 20.0
"""Seconds that one call may take. The clients themselves give up on a controller that is away after 9."""

_FOR_A_WHILE = (
    "timed out", "unable to contact slurm controller", "temporarily unable", "resource temporarily unavailable",
    "zero bytes", "connection refused", "connection reset", "in standby", "transport endpoint", "rate limit",
)  # fmt: skip
"""Words of the clients, in small letters, about what may be otherwise in a moment."""


class SlurmError(UserError):
    """A client is not installed here, did not answer in time, or refused what was asked."""

    def __init__(self, client: str, said: str, message: str = "", passing: bool = False) -> None:
        super().__init__(message or f"{client} does not answer: {said}")
        self.said = said
        """The client's own words, or why there are none."""
        self.passing = passing
        """Whether the same call may go well in a moment."""


def call(*command: str, clusters: str | None = "", environment: Mapping[str, str] | None = None) -> str:
    """Return what a client prints; times come as seconds since 1970. Raises SlurmError.

    ``clusters`` is another cluster than this machine's to ask; ``environment`` replaces this process's, for clients
    that hand theirs on.
    """
    client = command[0]
    command = (client, f"--clusters={clusters}", *command[1:]) if clusters else command
    given = {**os.environ, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"} if environment is None else dict(environment)
    try:
        done = subprocess.run(command, env=given, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    except FileNotFoundError:
        raise SlurmError(client, "not installed", f"{client} is not installed here: Slurm cannot be asked") from None
    except subprocess.TimeoutExpired:
        late = f"{client} did not answer within {PATIENCE:.0f} s"
        raise SlurmError(client, late, late, passing=True) from None
    except OSError as error:
        raise SlurmError(client, str(error.strerror or error)) from None
    if done.returncode:
        said = _words(client, done.stderr) or f"exit code {done.returncode}"
        raise SlurmError(client, said, passing=any(word in said.lower() for word in _FOR_A_WHILE))
    return done.stdout


def settings(clusters: str | None = "") -> dict[str, str]:
    """Return the site's configuration, by ``scontrol show config``; raises SlurmError."""
    lines = call("scontrol", "show", "config", clusters=clusters).splitlines()
    pairs = (re.match(r"(\w+)\s*=\s*(.*)", line) for line in lines)
    return {pair[1]: pair[2].strip() for pair in pairs if pair}


def _words(client: str, stderr: str) -> str:
    """What a client complained of: each line once, without its name before it."""
    lines = (line.strip().removeprefix(f"{client}: ").removeprefix("error: ") for line in stderr.splitlines())
    return "; ".join(dict.fromkeys(line for line in lines if line))


def submit(script: Path, environment: Mapping[str, str], clusters: str | None = "") -> str:
    """Hand a batch script to ``sbatch``, which hands the environment on to the job; returns the job's id."""
    said = call("sbatch", "--parsable", str(script), clusters=clusters, environment=environment)
    return said.strip().partition(";")[0]
