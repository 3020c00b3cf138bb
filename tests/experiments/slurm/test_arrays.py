"""What this project takes of submitit beyond its public interface is what the pinned versions have."""

import pickle
import shlex
import subprocess
import sys
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import JobPaths

from experiments.slurm import arrays
from experiments.slurm.arrays import Array
from tests.support.counting_jobs import profile


def _seven() -> int:
    return 7


def test_submitit_still_makes_scripts_of_the_text_that_it_submits(tmp_path: Path) -> None:
    """Its private methods: a script without ``sbatch``, and the command that executes a pickle."""
    executor = arrays._executor(Array(profile(), "suite.x.0", 2, tmp_path, tmp_path / "code"))
    assert isinstance(executor, SlurmExecutor)
    command = shlex.split(executor._submitit_command_str)
    assert command[1:] == ["-u", "-m", "submitit.core._submit", str(tmp_path)]
    text = executor._make_submission_file_text("the command", "")
    assert text.startswith("#!/bin/bash\n")
    assert text.count("the command") == 1
    assert "#SBATCH --array=0-1%2" in text


def test_an_element_finds_and_executes_its_own_pickle(tmp_path: Path, monkeypatch: object) -> None:
    """As in the job: the script's link gives submitit the name that it looks for; the result is its own."""
    folder = tmp_path / "jobs"
    array = Array(profile(), "suite.x.0", 1, folder, tmp_path / "code")
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "sbatch").write_text("#!/bin/sh\necho 41\n")
    (bin_ / "srun").write_text('#!/bin/sh\nwhile [ "$1" != -u ]; do before=$1; shift; done\nexec "$before" "$@"\n')
    (bin_ / "scontrol").write_text("#!/bin/sh\n")
    for script in bin_.iterdir():
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_), prepend=":")  # type: ignore[attr-defined]
    assert arrays.submit(array, [_seven]) == "41"
    job = {"SLURM_JOB_ID": "42", "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "0", "SLURM_PROCID": "0"}
    job |= {"SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    path = {"PATH": f"{bin_}:/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[3]), "SLURM_JOB_NODELIST": "n0"}
    done = subprocess.run(
        ["bash", str(folder / "submission.sh")], env={**job, **path}, capture_output=True, text=True, cwd=tmp_path
    )
    result = JobPaths(folder, job_id="41_0", task_id=0).result_pickle
    assert result.exists(), done.stdout + done.stderr
    assert pickle.loads(result.read_bytes()) == ("success", 7)
    assert sys.executable in (folder / "submission.sh").read_text()
