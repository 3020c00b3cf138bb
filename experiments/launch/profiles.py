"""Where runs execute: typed profiles in YAML, checked in full before anything is submitted.

Facts about a site (partitions, accounts, modules, containers) live in ``slurm/profiles/*.yaml`` and nowhere else. A
profile is named by its file's stem or by a path. Nothing in it can change a result, so nothing of it enters a run id.
"""

import math
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from mpformer.runtime.code import ROOT, THREADS
from mpformer.runtime.errors import UserError, choices

FOLDER = ROOT / "slurm" / "profiles"

Part = Literal["evaluate", "report", "smoke"]
PARTS: tuple[Part, ...] = ("evaluate", "report", "smoke")
"""Kinds of jobs for which a profile may give other resources."""

SHORT_MINUTES = 30
"""Time limit of reports and smoke jobs, unless the profile's is shorter or its section says otherwise."""

_WORD = re.compile(r"[A-Za-z0-9_.,:@+*&|()\[\]=-]+")
_MEMORY = re.compile(r"[1-9]\d*[KMGT]B?")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?:(?P<hours>\d+):)?(?P<minutes>\d+)(?::(?P<seconds>\d\d))?")
_GPUS = re.compile(r"(?:(?P<type>[A-Za-z][A-Za-z0-9_.-]*):)?(?P<count>\d+)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _word(value: str) -> str:
    if not _WORD.fullmatch(value):
        raise ValueError("must be one word of letters, digits and _.,:@+*&|()[]=-")
    return value


def _one_line(value: str) -> str:
    if not value.strip() or any(ord(character) < 32 for character in value):
        raise ValueError("must be one line, without control characters")
    return value


def _memory(value: str | int) -> str:
    if str(value) != "0" and not _MEMORY.fullmatch(str(value)):
        raise ValueError("must be a number and a unit, such as 32GB or 500MB; or 0, for all of a node's")
    return str(value)


def _gpus(value: str | int) -> str | int:
    found = _GPUS.fullmatch(str(value))
    if found is None:
        raise ValueError("must be a number, with a type before it where the site asks for one, such as 8 or a100:4")
    return str(value) if found["type"] else int(found["count"])


Word = Annotated[str, AfterValidator(_word)]
"""A value of an sbatch option; no shell ever sees it unquoted all the same."""

Line = Annotated[str, AfterValidator(_one_line)]


class Section(BaseModel):
    """Base of the profiles: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    notify: Line | None = Field(
        None, description="command, or http(s) webhook, notified when a suite ends or stalls: notify.py says how"
    )

    @field_validator("notify")
    @classmethod
    def _words(cls, value: str | None) -> str | None:
        shlex.split(value or "")  # ValueError: no closing quotation
        return value


class LocalProfile(Section):
    """This machine, through submitit's local executor."""

    executor: Literal["local"]
    workers: int | None = Field(None, ge=1, description="worker processes; empty: by cores, GPUs and memory")
    threads: int = Field(1, ge=1, description="threads a worker")


class SlurmProfile(Section):
    """A Slurm cluster, through submitit's Slurm executor; resources are one job's, that is one run's."""

    executor: Literal["slurm"]
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    clusters: Word | None = Field(None, description="the cluster to use, where a site has several under one accounting")
    exclude: Word | None = Field(None, description="nodes not to use")
    time: str | int = Field(description="limit: minutes, or [days-]hours:minutes:seconds as for sbatch")
    nodes: int = Field(1, ge=1)
    tasks_per_node: int = Field(1, ge=1, description="processes of one run on a node; one a GPU")
    gpus: Annotated[int | str, AfterValidator(_gpus)] = Field(0, description="GPUs a node, such as 8 or a100:4")
    gpu_option: Literal["gpus-per-node", "gpus-per-task", "gres"] = Field(
        "gpus-per-node", description="the option of sbatch that the site takes GPUs by"
    )
    cpus: int = Field(1, ge=1, description="processors a task")
    memory: Annotated[str | int, AfterValidator(_memory)] | None = Field(
        None, description="memory a node, such as 32GB; 0: all of it"
    )
    parallelism: int = Field(32, ge=1, description="most jobs of a suite at a time")
    signal_delay: int = Field(
        120,
        ge=10,
        validate_default=True,
        description="seconds before the limit at which a run checkpoints and requeues",
    )
    environment: dict[str, str] = Field(default_factory=dict, description="variables of every job")
    modules: tuple[Line, ...] = Field((), description="environment modules to load")
    setup: tuple[Line, ...] = Field((), description="shell lines before the job, as they are")
    container: Line | None = Field(None, description="image that the jobs run in")
    container_runtime: Literal["pyxis", "apptainer"] = Field(
        "pyxis", description="what runs the image: srun --container-image, or apptainer exec"
    )
    container_mounts: Line | None = Field(
        None, description="directories of the node to see in it, SOURCE[:TARGET[:OPTIONS]],…"
    )
    srun: tuple[Line, ...] = Field((), description="further arguments of srun")
    sbatch: dict[Word, Line | int | bool] = Field(default_factory=dict, description="further options of sbatch")
    comment: Line | None = None
    python: Line | None = Field(None, description="interpreter of the jobs, such as a container's; empty: this one")
    max_array: int | None = Field(None, ge=1, description="most elements of an array; empty: the site is asked")
    max_submit: int | None = Field(None, ge=1, description="most jobs in the queue; empty: the site is asked")
    stage_to: Line | None = Field(
        None, description="directory of a node's own disk to copy the dataset to; $VARIABLES are read on the node"
    )
    resubmit: bool = Field(
        False, description="the last job launches again what a partition with PreemptMode=CANCEL has ended"
    )
    evaluate: dict[str, Any] | None = Field(None, description="keys that differ for evaluation: jobs of its own")
    report: dict[str, Any] | bool = Field(True, description="keys that differ for the report; false: no report job")
    smoke: dict[str, Any] | None = Field(None, description="keys that differ for the short jobs of --smoke")

    @field_validator("environment")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} is not a variable's name")
        return value

    @field_validator("time")
    @classmethod
    def _limit(cls, value: str | int) -> str | int:
        if not 1 <= minutes(value) <= 60 * 24 * 366:
            raise ValueError("must be minutes, or [days-]hours:minutes:seconds, between 1 minute and a year")
        return value

    @field_validator("signal_delay")
    @classmethod
    def _in_time(cls, value: int, info: ValidationInfo) -> int:
        limit = minutes(info.data.get("time", 0)) * 60
        if limit and value >= limit:
            raise ValueError(f"must be shorter than the limit (time), which is {limit} s")
        return value

    @field_validator("gpu_option")
    @classmethod
    def _shared(cls, value: str, info: ValidationInfo) -> str:
        tasks = info.data.get("tasks_per_node", 1)
        if value == "gpus-per-task" and _count(info.data.get("gpus", 0)) % tasks:
            raise ValueError(f"gpus (a node's) must be a multiple of tasks_per_node, which is {tasks}")
        return value

    @field_validator("sbatch")
    @classmethod
    def _harmless(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in _OURS:
                raise ValueError(f"{name} is the launcher's own and cannot be set; leave it out")
            if name in _KEYS:
                raise ValueError(f"{name} has a key of its own: {_KEYS[name]}")
        return value

    @field_validator("report")
    @classmethod
    def _last(cls, value: dict[str, Any] | bool, info: ValidationInfo) -> dict[str, Any] | bool:
        if value is False and info.data.get("resubmit"):
            raise ValueError("resubmit is done by the last job, the report; leave report out, or resubmit")
        return value

    @property
    def gpu_count(self) -> int:
        """GPUs a node, whatever their type."""
        return _count(self.gpus)

    @property
    def minutes(self) -> int:
        """The time limit in minutes, rounded up."""
        return minutes(self.time)

    @property
    def setup_lines(self) -> list[str]:
        """Shell lines before the job: variables (threads: a task's processors), modules, the site's own lines."""
        threads = {name: str(self.cpus) for name in THREADS}
        exports = [f"export {name}={shlex.quote(value)}" for name, value in {**threads, **self.environment}.items()]
        return [*exports, *(f"module load {shlex.quote(name)}" for name in self.modules), *self.setup]

    @property
    def srun_arguments(self) -> list[str]:
        """Arguments of srun; submitit quotes them."""
        pyxis = self.container is not None and self.container_runtime == "pyxis"
        image = [f"--container-image={self.container}"] if pyxis else []
        mounts = [f"--container-mounts={self.container_mounts}"] if pyxis and self.container_mounts else []
        # srun does not take over sbatch's --cpus-per-task since Slurm 22.05: each task would have one processor
        return [f"--cpus-per-task={self.cpus}", *image, *mounts, *self.srun]

    @property
    def interpreter(self) -> str | None:
        """The command of the jobs' Python as a shell reads it, in Apptainer's image where there is one; None: ours."""
        if self.container is None or self.container_runtime == "pyxis":
            return None if self.python is None else shlex.quote(self.python)
        binds = [word for mount in (self.container_mounts or "").split(",") if mount for word in ("--bind", mount)]
        gpus = ["--nv"] if self.gpu_count else []
        return shlex.join(["apptainer", "exec", *gpus, *binds, self.container, self.python or sys.executable])

    def part(self, name: Part) -> "SlurmProfile":
        """Return the profile of evaluation, report or smoke jobs: this one but for what its section changes.

        A report needs one processor and no GPU, a smoke job no more than half an hour, unless the section says so.
        """
        section = getattr(self, name)
        changes = {**self._usual(name), **(section if isinstance(section, dict) else {})}
        own = self.model_dump(exclude={"evaluate", "report", "smoke", "resubmit"}, exclude_unset=True)
        if name == "report":
            own["sbatch"] = {key: value for key, value in self.sbatch.items() if key not in _WHOLE}
        return SlurmProfile.model_validate({**own, **changes})

    def grown(self, key: Literal["memory", "time"], factor: float) -> "SlurmProfile":
        """Return the profile with so many times the memory or the time, for evaluation too; raises UserError."""
        if key == "memory" and str(self.memory or "0") == "0":
            raise UserError(f"the profile's memory is {self.memory or 'not given'}: there is nothing to grow")
        grow = _grown_memory if key == "memory" else _grown_time
        changes: dict[str, Any] = {key: grow(getattr(self, key), factor)}
        if self.evaluate is not None and key in self.evaluate:
            changes["evaluate"] = {**self.evaluate, key: grow(self.evaluate[key], factor)}
        return self.model_copy(update=changes)

    def _usual(self, name: Part) -> dict[str, Any]:
        short = {"time": min(self.minutes, SHORT_MINUTES)}
        one = {"gpus": 0, "nodes": 1, "tasks_per_node": 1, "cpus": 1, "memory": self.memory and "4GB"}
        usual: dict[Part, dict[str, Any]] = {"evaluate": {}, "smoke": short, "report": short | one}
        return usual[name]

    def submitit(self) -> dict[str, Any]:
        """Return the keyword arguments of ``submitit.SlurmExecutor.update_parameters``."""
        if "no-requeue" not in self.sbatch:  # a site may have JobRequeue=0; preempted and interrupted runs come back
            sbatch: dict[str, Any] = {"requeue": True, **self.sbatch}
        else:
            sbatch = dict(self.sbatch)
        sbatch |= self._gpu_options()
        options = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "exclude": self.exclude,
            "mem": self.memory,
            "comment": self.comment,
            "setup": self.setup_lines or None,
            "srun_args": self.srun_arguments or None,
            "additional_parameters": sbatch,
        }
        asked = {name: value for name, value in options.items() if value is not None}
        always: dict[str, Any] = {"time": self.minutes, "nodes": self.nodes, "ntasks_per_node": self.tasks_per_node}
        always |= {"cpus_per_task": self.cpus, "array_parallelism": self.parallelism}
        always |= {"wckey": None}  # submitit's own is refused where keys are enforced; `sbatch: {wckey: …}` gives one
        return {**asked, **always, "signal_delay_s": self.signal_delay, "stderr_to_stdout": True}

    def _gpu_options(self) -> dict[str, str]:
        kind, _, _ = str(self.gpus).rpartition(":")
        each = self.gpu_count // (self.tasks_per_node if self.gpu_option == "gpus-per-task" else 1)
        parts = ["gpu"] if self.gpu_option == "gres" else []
        return {self.gpu_option: ":".join([*parts, *([kind] if kind else []), str(each)])} if each else {}


_OURS = (
    "array", "dependency", "kill-on-invalid-dep", "output", "error", "open-mode", "signal", "job-name", "wrap", "wait",
    "parsable", "test-only",
)  # fmt: skip
"""Options of sbatch by which a launch knows, names, follows or ends its jobs."""

_KEYS: Mapping[str, str] = {
    "partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint", "exclude": "exclude",
    "clusters": "clusters",
    "time": "time", "nodes": "nodes", "ntasks-per-node": "tasks_per_node", "cpus-per-task": "cpus", "mem": "memory",
    "comment": "comment", "gpus-per-node": "gpus", "gpus-per-task": "gpus, with gpu_option: gpus-per-task",
}  # fmt: skip

_WHOLE = ("gres", "exclusive", "gpus", "gpus-per-socket", "gpu-bind", "gpu-freq", "mem-per-gpu", "cpus-per-gpu")
"""Options for the nodes of a training that a report has no use for."""


def _grown_memory(value: str | int, factor: float) -> str:
    number = str(value).rstrip("KMGTB")
    unit = str(value)[len(number) :]
    smaller = {"T": "G", "G": "M", "M": "K", "K": "K"}[unit[0]]  # half a gigabyte more is more than none
    return f"{math.ceil(int(number) * factor * (1 if unit[0] == 'K' else 1024))}{smaller}{unit[1:]}"


def _grown_time(value: str | int, factor: float) -> int:
    return math.ceil(minutes(value) * factor)


GROWS: Mapping[str, str] = {"memory": "oom", "time": "timeout"}
"""Keys of a profile that a retry may grow, each with the failure class that it helps against."""


def growth(text: str) -> dict[str, float]:
    """Return what ``memory=1.5,time=2`` asks to grow by how much; raises UserError."""
    found = dict(part.partition("=")[::2] for part in text.replace(" ", "").split(","))
    for key, factor in found.items():
        if key not in GROWS:
            raise choices("key to grow", key, (f"{name}=FACTOR" for name in GROWS))
        if not re.fullmatch(r"\d+(\.\d+)?", factor) or not 1 < float(factor) <= 100:
            raise UserError(f"--grow {key}={factor}: the factor must be a number above 1, such as {key}=1.5")
    return {key: float(factor) for key, factor in found.items()}


def _count(gpus: str | int) -> int:
    return int(str(gpus).rpartition(":")[2])


Profile = Annotated[LocalProfile | SlurmProfile, Field(discriminator="executor")]


def minutes(value: str | int) -> int:
    """Return a limit in minutes, rounded up; 0 if it is not one."""
    return -(-(seconds(value) or 0) // 60)


def seconds(value: str | int) -> int | None:
    """Return a limit in seconds as sbatch reads it, or a time as squeue writes it; None if it is neither.

    ``90`` and ``"90"`` are minutes, ``"90:30"`` minutes and seconds, ``"1:30:00"`` hours, ``"2-12"`` days and hours,
    ``"2-12:30"`` days, hours and minutes.
    """
    found = _TIME.fullmatch(str(value))
    if found is None:
        return None
    days, hours, middle, last = (int(part or 0) for part in found.group("days", "hours", "minutes", "seconds"))
    if found["days"] is not None and found["seconds"] is None:
        # after days the first number is hours
        hours, middle = (hours, middle) if found["hours"] is not None else (middle, 0)
    elif found["days"] is None and found["hours"] is not None and found["seconds"] is None:
        middle, last, hours = hours, middle, 0
    return ((days * 24 + hours) * 60 + middle) * 60 + last


def names() -> tuple[str, ...]:
    """Return the names of the project's own profiles."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


class _Loader(yaml.SafeLoader):
    """YAML in which ``1:30:00`` is text: YAML 1.1 has it a number to the base of sixty, and a limit of 90 hours."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":int", ":float"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+\.\d*$"), list("-+0123456789"))


def load(name: str) -> LocalProfile | SlurmProfile:
    """Return a profile by its name, or by the path of a YAML file; raises UserError, one line."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise choices("profile", name, (*names(), "or the path of a YAML file"))
    try:
        content = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    return parse(content, str(path))


def parse(content: Any, where: str) -> LocalProfile | SlurmProfile:
    """Check a profile's content; raises UserError that names the key, what was given and what is valid."""
    if not isinstance(content, dict):
        raise UserError(f"{where} must hold keys and values, executor among them (local or slurm)")
    adapter: TypeAdapter[LocalProfile | SlurmProfile] = TypeAdapter(Profile)
    try:
        profile = adapter.validate_python(content)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_line(error, content)}") from None
    for part in PARTS if isinstance(profile, SlurmProfile) else ():
        _check_part(content, part, where)
    return profile


def _check_part(content: dict[str, Any], part: Part, where: str) -> None:
    """Check the section of one kind of jobs as the profile that it makes; it has no sections itself."""
    section = content.get(part)
    if not isinstance(section, dict):
        return
    nested = next((key for key in section if key in (*PARTS, "executor")), None)
    if nested is not None:
        known = (name for name in SlurmProfile.model_fields if name not in (*PARTS, "executor"))
        raise UserError(f"{where}: {part}: {choices('key', nested, known)}")
    own = {key: value for key, value in content.items() if key not in PARTS}
    parse({**own, **section}, f"{where}: {part}")


def _first_line(error: ValidationError, content: dict[str, Any]) -> str:
    found = error.errors()
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])  # what is missing is misspelt
    executor = content.get("executor")
    if first["type"].startswith("union_tag"):
        return str(choices("executor", executor, ("local", "slurm")))
    key = ".".join(str(part) for part in first["loc"][1:])
    if first["type"] == "extra_forbidden":
        known = LocalProfile if executor == "local" else SlurmProfile
        return str(choices("key", key, known.model_fields))
    return f"{key}: {first['msg'].removeprefix('Value error, ')} (got {first.get('input')!r:.80})"
