"""One job array through submitit's Slurm executor, made so that a launcher may die at any moment.

submitit hands its pickles to the jobs after ``sbatch`` has returned: a launcher killed between the two leaves jobs that
wait for them in vain. Here each element's pickle is written first, under its index, and the job itself links it to the
name that submitit looks for. A batch of one is an array too: element i of array A is always ``A_i``.
"""

import contextlib
import functools
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.launch.profiles import SlurmProfile
from experiments.slurm.job import MAX_TIMEOUTS, SETUP, TEARDOWN
from mpformer.runtime.errors import UserError

_LINK = '[ -e "$jobs/$element" ] || ln -s "$SLURM_ARRAY_TASK_ID.pkl" "$jobs/$element"'


class SubmissionError(UserError):
    """``sbatch`` refused or did not answer."""


@dataclass(frozen=True)
class Array:
    """A job array but for what its elements call."""

    profile: SlurmProfile
    name: str
    """Slurm's job name."""
    count: int
    folder: Path
    """Scripts, pickles and logs."""
    code: Path
    """The snapshot that the jobs run from."""
    dependency: str = ""
    """As sbatch takes it; an array whose dependency cannot be satisfied any more is cancelled, not left waiting."""
    guarded: bool = True
    """Whether the job is queued again when the process that watches the run was killed outright."""


def script(array: Array) -> str:
    """Return the batch script of an array."""
    executor = _executor(array)
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def submit(array: Array, functions: Sequence[Callable[[], Any]]) -> str:
    """Submit an array, one element a function; returns the array's id, or raises SubmissionError, one line."""
    from submitit.core.utils import FailedSubmissionError, UncompletedJobError

    executor = _executor(array)
    try:
        with _clean_environment():
            return str(executor.submit_array(functions)[0].job_id.partition("_")[0])
    except (UncompletedJobError, FailedSubmissionError) as error:
        raise SubmissionError(_telling(str(error))) from None


def folder_problem(root: Path) -> str:
    """Say what in a store's path Slurm would misread; empty if nothing."""
    if "%" in str(root) or "\\" in str(root) or any(ord(character) < 32 for character in str(root)):
        return f"Slurm reads %, \\ and control characters in paths its own way; choose another --root: {str(root)!r}"
    return ""


def _executor(array: Array) -> Any:
    python = None if array.profile.python is None else shlex.quote(array.profile.python)
    executor = _executor_type()(array.folder, max_num_timeout=MAX_TIMEOUTS, python=python)
    parameters = array.profile.submitit()
    guard = SETUP if array.guarded else []
    signal = {"signal": f"USR2@{array.profile.signal_delay}"}  # whatever SUBMITIT_PREEMPT_SIGNAL says
    parameters["additional_parameters"] = signal | parameters["additional_parameters"]
    parameters["setup"] = [*guard, *(parameters.get("setup") or []), *_setup_lines(array.folder, array.code)]
    parameters["teardown"] = TEARDOWN if array.guarded else None
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
    ]


@functools.cache
def _executor_type() -> type[Any]:
    import submitit

    class Arrays(submitit.SlurmExecutor):
        """submitit's scripts, pickles and jobs; never AutoExecutor's guess."""

        @classmethod
        def affinity(cls) -> int:
            return 2  # a dry run needs no srun; a launch has looked for Slurm before

        @classmethod
        def name(cls) -> str:
            return "slurm"

        def _internal_process_submissions(self, delayed_submissions: Any) -> list[Any]:
            self.folder.mkdir(parents=True, exist_ok=True)
            for index, delayed in enumerate(delayed_submissions):
                delayed.set_timeout(self.parameters["time"], self.max_num_timeout)
                delayed.dump(self.folder / f"{index}.pkl")
            array = self._submit_command(self._submitit_command_str)
            tasks = list(range(array.num_tasks))
            return [
                self.job_class(folder=self.folder, job_id=f"{array.job_id}_{index}", tasks=tasks)
                for index in range(len(delayed_submissions))
            ]

    return Arrays


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Keep from the submission and the jobs what would change them behind the profile's back.

    ``SBATCH_*`` override scripts, ``SLURM_*`` are an enclosing job's, ``SUBMITIT_*`` change what a signal means.
    """
    taken = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith(("SBATCH_", "SLURM_", "SRUN_", "SUBMITIT_")) and name not in _KEPT
    }
    try:
        yield
    finally:
        os.environ.update(taken)


_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


def _telling(text: str) -> str:
    """sbatch's own words out of submitit's report of a failed command."""
    lines = [line.strip() for line in text.splitlines()]
    errors = [re.sub(r"^sbatch: (error: )?", "", line) for line in lines if line.startswith("sbatch: ")]
    return "; ".join(dict.fromkeys(errors)) or " ".join(text.split())[:300]
