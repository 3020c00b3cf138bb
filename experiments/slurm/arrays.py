"""One job array through submitit's Slurm executor, made so that a launcher may die at any moment.

submitit hands its pickles to the jobs after ``sbatch`` has returned: a launcher killed between the two leaves jobs that
wait for them in vain. Here each element's pickle is written first, under its index, and the job itself links it to the
name that submitit looks for. submitit makes the batch script, and executes the pickle in the job. A batch of one is an
array too: element i of array A is always ``A_i``.
"""

import functools
import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.launch.profiles import PARTS, SlurmProfile
from experiments.slurm import batch_shell
from experiments.slurm.job import MAX_TIMEOUTS, Coded
from experiments.status import slurm_client
from experiments.status.slurm_client import SlurmError
from experiments.store.launches import DEATHS
from mpformer.runtime.code import ROOT

_LINK = '[ -e "$jobs/$element" ] || ln -s "$SLURM_ARRAY_TASK_ID.pkl" "$jobs/$element"'


@dataclass(frozen=True)
class Array:
    """A job array but for what its elements call."""

    profile: SlurmProfile
    name: str
    """Slurm's job name."""
    count: int
    folder: Path
    """Scripts, pickles and logs; below the launch's ``jobs``."""
    code: Path
    """The snapshot that the jobs run from."""
    dependency: str = ""
    """As sbatch takes it; an array whose dependency cannot be satisfied any more is cancelled, not left waiting."""


def script(array: Array) -> str:
    """Return the batch script of an array."""
    executor = _executor(array)
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def submit(array: Array, functions: Sequence[Callable[[], Any]]) -> str:
    """Submit an array, one element a function; returns the array's id, or raises SlurmError."""
    from submitit.helpers import DelayedSubmission

    array.folder.mkdir(parents=True, exist_ok=True)
    for index, function in enumerate(functions):
        element = DelayedSubmission(Coded(function))
        element.set_timeout(array.profile.minutes, MAX_TIMEOUTS)
        element.dump(array.folder / f"{index}.pkl")
    path = array.folder / "submission.sh"
    path.write_text(script(array))
    return slurm_client.submit(path, clean_environment(), array.profile.clusters)


def folder_problem(root: Path) -> str:
    """Say what in a store's path Slurm would misread; empty if nothing."""
    if "%" in str(root) or "\\" in str(root) or any(ord(character) < 32 for character in str(root)):
        return f"Slurm reads %, \\ and control characters in paths its own way; choose another --root: {str(root)!r}"
    return ""


def _executor(array: Array) -> Any:
    executor = _executor_type()(array.folder, python=array.profile.interpreter)
    parameters = array.profile.submitit()
    signal = {"signal": f"USR2@{array.profile.signal_delay}"}  # whatever SUBMITIT_PREEMPT_SIGNAL says
    parameters["additional_parameters"] = signal | parameters["additional_parameters"]
    before = batch_shell.before(array.folder.parents[1] / DEATHS, array.profile.exclude)
    parameters["setup"] = [*before, *(parameters.get("setup") or []), *_setup_lines(array.folder, array.code)]
    parameters["teardown"] = batch_shell.AFTER
    if array.dependency:
        parameters["dependency"] = array.dependency
        parameters["additional_parameters"] = {"kill-on-invalid-dep": "yes", **parameters["additional_parameters"]}
    executor.update_parameters(job_name=array.name, **parameters)
    executor.parameters["map_count"] = array.count
    return executor


def _setup_lines(folder: Path, code: Path) -> list[str]:
    """Run the snapshot, whatever folder the job starts in, and give submitit its pickle."""
    return [
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1",
        f"jobs={shlex.quote(str(folder))}",
        'element="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}_submitted.pkl"',
        _LINK,
        "set +e",  # whatever the profile's lines have set: those after srun are to be reached
    ]


@functools.cache
def _executor_type() -> type[Any]:
    import submitit

    class Scripts(submitit.SlurmExecutor):
        """Makes submitit's batch scripts, where there is no Slurm too; never AutoExecutor's guess."""

        @classmethod
        def affinity(cls) -> int:
            return 2  # "it can run here", which submitit asks: a dry run needs no srun, a launch has looked before

        @classmethod
        def name(cls) -> str:
            return "slurm"

    return Scripts


def clean_environment() -> dict[str, str]:
    """This process's environment without what would change the submission and the jobs behind the profile's back.

    ``SBATCH_*`` override scripts, ``SLURM_*`` are an enclosing job's, ``SUBMITIT_*`` change what a signal means.
    """
    prefixes = ("SBATCH_", "SLURM_", "SRUN_", "SUBMITIT_")
    return {name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith(prefixes)}


_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


def refusals(profile: SlurmProfile) -> dict[str, str]:
    """Ask the site (``sbatch --test-only``) what it has against each kind of array of a profile; empty: it takes it."""
    parts = {"runs": profile} | {name: profile.part(name) for name in PARTS if getattr(profile, name)}
    return {name: _refusal(name, part) for name, part in parts.items()}


def _refusal(name: str, profile: SlurmProfile) -> str:
    with tempfile.TemporaryDirectory() as folder:
        array = Array(profile, f"check.{name}", 1, Path(folder) / "jobs" / "0", ROOT)
        path = Path(folder) / "script.sh"
        path.write_text(script(array))
        try:
            environment = clean_environment()
            slurm_client.call("sbatch", "--test-only", str(path), clusters=profile.clusters, environment=environment)
        except SlurmError as error:
            return error.said
    return ""
