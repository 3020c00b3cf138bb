"""What a launch has to know of a site's Slurm: whether it is there, its name, and how much it takes at a time."""

import getpass
import re
import shutil
from collections import Counter
from dataclasses import dataclass

from experiments.launch.profiles import SlurmProfile
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


def require() -> None:
    """Raise UserError unless jobs can be submitted from here."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "no Slurm here: sbatch is not on the PATH; launch from a login node, look at the scripts with --dry-run, "
            "or use --on local"
        )


def limits(profile: SlurmProfile) -> Limits:
    """Return the limits of this site for jobs of a profile; what that says overrides the site. Raises UserError."""
    try:
        return _limits(profile)
    except SlurmError as error:
        raise UserError(f"Slurm does not answer: {error.said}; try again later") from None


def _limits(profile: SlurmProfile) -> Limits:
    max_array, max_submit = profile.max_array, profile.max_submit
    settings = slurm_client.settings(profile.clusters)
    asked = (_number(settings, "MaxArraySize", -1), _scheduler_parameter(settings, "max_array_tasks"))
    cluster = settings.get("ClusterName", "")
    asked_for = ("-h", "-r", "-o", "%q|%a", "-u", getpass.getuser())
    queue = slurm_client.call("squeue", *asked_for, clusters=profile.clusters)
    jobs = [line for line in queue.splitlines() if "|" in line]  # of another cluster its name comes first
    mine = len(jobs)
    found = [] if max_submit is not None else _association_limits(settings, cluster, jobs, profile)
    most = _number(settings, "MaxJobCount", 0)
    if most is not None:
        found.append((most - mine, "MaxJobCount"))  # the others' jobs are not counted: that takes the whole table
    if max_submit is not None:
        found.append((max_submit - mine, "max_submit"))
    submit, reason = min(found, default=(None, ""))
    given = asked if max_array is None else (max_array,)
    array = min((most for most in given if most is not None), default=DEFAULT_ARRAY - 1)
    return Limits(cluster, max(1, array), None if submit is None else max(0, submit), reason)


def _association_limits(
    settings: dict[str, str], cluster: str, jobs: list[str], profile: SlurmProfile
) -> list[tuple[int, str]]:
    """What accounting lets this user still submit under a profile's account and QOS, where it enforces limits.

    ``jobs`` are QOS and account of each job in the queue. Without an account in the profile the user's default one is
    not known here: the tightest of all counts.
    """
    enforced = settings.get("AccountingStorageEnforce", "").split(",")
    if not {"limits", "safe"} & {word.strip().lower() for word in enforced}:
        return []
    columns = ("MaxSubmitJobs", "GrpSubmitJobs", "DefaultQOS", "QOS")
    where = [f"user={getpass.getuser()}", f"cluster={cluster}"]
    where += [f"account={profile.account}"] if profile.account else []
    asked = ("show", "assoc", "where", *where, f"format={','.join(columns)}")
    rows = [dict(zip(columns, line.split("|"), strict=False)) for line in _accounts(*asked)]
    taken = sum(profile.account in (None, job.partition("|")[2]) for job in jobs)
    found = [(int(row[key]) - taken, key) for row in rows for key in columns[:2] if row.get(key, "").isdigit()]
    return [*found, *_qos_limits({profile.qos} if profile.qos else _usual_qos(rows), jobs)]


def _usual_qos(rows: list[dict[str, str]]) -> set[str]:
    """The QOS that a job without one may get, by the user's associations."""
    names = {row.get("DefaultQOS", "") for row in rows} or {""}
    return names | {name for row in rows for name in row.get("QOS", "").split(",") if not row.get("DefaultQOS")}


def _qos_limits(names: set[str], jobs: list[str]) -> list[tuple[int, str]]:
    keys = ("MaxSubmitPU", "MaxSubmitPA", "GrpSubmit")
    lines = _accounts("show", "qos", f"format=Name,{','.join(keys)}")
    queued = Counter(job.partition("|")[0] for job in jobs)
    return [
        (int(value) - queued[name], f"{key} of QOS {name}")
        for name, *values in (line.split("|") for line in lines)
        if name in names
        for key, value in zip(keys, values, strict=False)
        if value.isdigit()
    ]


def _accounts(*command: str) -> list[str]:
    return slurm_client.call("sacctmgr", "-nP", *command).splitlines()


def _number(settings: dict[str, str], name: str, more: int) -> int | None:
    value = settings.get(name, "")
    return int(value) + more if value.isdigit() else None


def _scheduler_parameter(settings: dict[str, str], name: str) -> int | None:
    found = re.search(rf"(?:^|,)\s*{name}=(\d+)", settings.get("SchedulerParameters", ""))
    return int(found[1]) if found else None
