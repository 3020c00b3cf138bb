"""What a launch has to know of a site's Slurm: whether it is there, its name, and how much it takes at a time."""

import getpass
import re
import shutil
from dataclasses import dataclass

from experiments.status import slurm_client
from experiments.status.slurm_client import SlurmError
from mpformer.runtime.errors import UserError

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
    """Return what a Slurm client prints; raises UserError with its words if it does not answer."""
    try:
        return slurm_client.call(*command)
    except SlurmError as error:
        raise UserError(f"Slurm does not answer: {error.said}; try again later") from None


def limits(max_array: int | None = None, max_submit: int | None = None) -> Limits:
    """Return the limits of this site; what is given overrides what the site says. Raises UserError."""
    settings = _settings(ask("scontrol", "show", "config"))
    array = _smallest(_number(settings, "MaxArraySize", -1), _scheduler_parameter(settings, "max_array_tasks"))
    cluster = settings.get("ClusterName", "")
    mine = len(ask("squeue", "-h", "-r", "-o", "%i", "-u", getpass.getuser()).split())
    found = [] if max_submit is not None else _association_limits(settings, cluster, mine)
    most = _number(settings, "MaxJobCount", 0)
    if most is not None:
        found.append((most - mine, "MaxJobCount"))  # the others' jobs are not counted: that takes the whole table
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
    asked = ("show", "assoc", "where", f"user={getpass.getuser()}", f"cluster={cluster}", f"format={','.join(columns)}")
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
