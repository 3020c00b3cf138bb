"""What a launch has to know of a site's Slurm: whether it is there, its name, and how much it takes at a time."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from mpformer.runtime.errors import UserError

PATIENCE = 30.0
"""Seconds that a question to Slurm may take; its clients themselves give up on a dead controller after 9."""

DEFAULT_ARRAY = 1001
"""Slurm's own default of MaxArraySize, for a dry run where there is no Slurm to ask."""


@dataclass(frozen=True)
class Limits:
    """How much may be submitted; ``reason`` names the setting that ``submit`` comes from."""

    cluster: str = ""
    array: int = DEFAULT_ARRAY - 1
    """Most elements of one job array."""
    submit: int | None = None
    """Most further jobs, array elements counted one by one; None: no limit known."""
    reason: str = ""


def present() -> bool:
    """Whether Slurm's clients are installed here."""
    return shutil.which("sbatch") is not None


def require() -> None:
    """Raise UserError unless jobs can be submitted from here."""
    if not present():
        raise UserError(
            "no Slurm here: sbatch is not on the PATH; launch from a login node, look at the scripts with --dry-run, "
            "or use --on local"
        )


def ask(*command: str) -> str:
    """Return what a Slurm client prints; raises UserError with its last line if it does not answer."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed here; Slurm cannot be asked") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"Slurm does not answer: {command[0]} took more than {PATIENCE:.0f} s; try again later"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise UserError(f"Slurm does not answer: {lines[-1]}; try again later")
    return done.stdout


def limits(max_array: int | None = None, max_submit: int | None = None) -> Limits:
    """Return the limits of this site; what is given overrides what the site says. Raises UserError."""
    settings = _settings(ask("scontrol", "show", "config"))
    array = _smallest(_number(settings, "MaxArraySize", -1), _scheduler_parameter(settings, "max_array_tasks"))
    cluster = settings.get("ClusterName", "")
    queued, mine = (len(ask("squeue", "-h", "-r", "-o", "%i", *whose).split()) for whose in ((), ("-u", _user())))
    found = [] if max_submit is not None else _association_limits(settings, cluster, mine)
    most = _number(settings, "MaxJobCount", 0)
    if most is not None:
        found.append((most - queued, "MaxJobCount"))
    if max_submit is not None:
        found.append((max_submit - mine, "max_submit"))
    submit, reason = min(found, default=(None, ""))
    array = max_array if max_array is not None else (array if array is not None else DEFAULT_ARRAY - 1)
    return Limits(cluster, max(1, array), None if submit is None else max(0, submit), reason)


def _association_limits(settings: dict[str, str], cluster: str, mine: int) -> list[tuple[int, str]]:
    """What accounting lets this user still submit, where it enforces limits."""
    enforced = settings.get("AccountingStorageEnforce", "").split(",")
    if not {"limits", "safe"} & {word.strip().lower() for word in enforced}:
        return []
    columns = ("MaxSubmitJobs", "GrpSubmitJobs", "DefaultQOS", "QOS")
    asked = ("show", "assoc", "where", f"user={_user()}", f"cluster={cluster}", f"format={','.join(columns)}")
    rows = [dict(zip(columns, line.split("|"), strict=False)) for line in ask("sacctmgr", "-nP", *asked).splitlines()]
    found = [(int(row[key]), key) for row in rows for key in columns[:2] if row.get(key, "").isdigit()]
    return [(most - mine, name) for most, name in [*found, *_qos_limits(rows)]]


def _qos_limits(rows: list[dict[str, str]]) -> list[tuple[int, str]]:
    names = {row.get("DefaultQOS", "") for row in rows} or {""}
    names |= {name for row in rows for name in row.get("QOS", "").split(",") if not row.get("DefaultQOS")}
    keys = ("MaxSubmitPU", "MaxSubmitPA", "GrpSubmit")
    lines = ask("sacctmgr", "-nP", "show", "qos", f"format=Name,{','.join(keys)}").splitlines()
    parted = [line.split("|") for line in lines]
    return [
        (int(value), f"{key} of QOS {name}")
        for name, *values in parted
        if name in names
        for key, value in zip(keys, values, strict=False)
        if value.isdigit()
    ]


def _user() -> str:
    import getpass

    return getpass.getuser()


def _settings(text: str) -> dict[str, str]:
    pairs = (re.match(r"(\w+)\s*=\s*(.*)", line) for line in text.splitlines())
    return {pair[1]: pair[2].strip() for pair in pairs if pair}


def _number(settings: dict[str, str], name: str, more: int) -> int | None:
    value = settings.get(name, "")
    return int(value) + more if value.isdigit() else None


def _scheduler_parameter(settings: dict[str, str], name: str) -> int | None:
    found = re.search(rf"(?:^|,)\s*{name}=(\d+)", settings.get("SchedulerParameters", ""))
    return int(found[1]) if found else None


def _smallest(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)
