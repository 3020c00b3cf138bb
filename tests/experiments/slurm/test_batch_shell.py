"""The batch shell of a job, a real bash: what it asks Slurm for, by the exit code of what it ran."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.slurm import batch_shell
from experiments.slurm.batch_shell import AGAIN, FAILED
from experiments.store.launches import deaths

REFUSED = "Requested operation is presently disabled for job 77"


@dataclass(frozen=True)
class Shell:
    """A batch shell whose clients are scripts; ``sleep`` takes no time."""

    place: Path

    def says(self, client: str, text: str, code: int = 0) -> None:
        """Have a client print something and end with this code."""
        path = self.place / "bin" / client
        path.write_text(f'#!/bin/sh\necho {client} "$@" >> {self.place}/asked\ncat << EOF\n{text}\nEOF\nexit {code}\n')
        path.chmod(0o755)

    def run(self, command: str, start: int = 0, node: str = "n0", **more: str) -> "subprocess.CompletedProcess[str]":
        """Run a job's script with this in the place of ``srun``."""
        lines = [*batch_shell.before(self.file, "bad[1-2]"), command, *batch_shell.AFTER]
        job = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(start), "SLURMD_NODENAME": node}
        job |= {
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_PARTITION": "main",
            "PATH": f"{self.place}/bin:{os.environ['PATH']}",
        }
        return subprocess.run(
            ["bash", "-c", "\n".join(lines)], env=job | more, capture_output=True, text=True, timeout=60
        )

    @property
    def file(self) -> Path:
        return self.place / "deaths.txt"

    def asked(self) -> list[str]:
        path = self.place / "asked"
        return [line for line in path.read_text().splitlines() if "scontrol" in line] if path.exists() else []


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    (tmp_path / "bin").mkdir()
    made = Shell(tmp_path)
    made.says("scontrol", "")
    made.says("sleep", "")
    made.says("sinfo", "\n".join(f"n{number}" for number in range(6)))
    return made


@pytest.mark.parametrize("code", [0, FAILED])
def test_the_runs_own_exit_codes_end_the_job(shell: Shell, code: int) -> None:
    done = shell.run(f"(exit {code})")
    assert done.returncode == code, done.stderr
    assert not shell.asked()
    assert not shell.file.exists()


def test_a_job_that_wants_to_come_back_is_queued_again_without_a_pause(shell: Shell) -> None:
    shell.run(f"(exit {AGAIN})")
    assert shell.asked() == ["scontrol requeue 77"]
    assert not shell.file.exists(), "nothing died of the infrastructure"


@pytest.mark.parametrize("code", [1, 9, 105, 127, 137, 255])
def test_any_other_exit_code_is_the_infrastructures(shell: Shell, code: int) -> None:
    shell.run(f"(exit {code})")
    requeue, update = shell.asked()
    assert requeue == "scontrol requeue 77"
    assert update.startswith("scontrol update JobId=77 StartTime=now+")
    (death,) = deaths(shell.file)
    assert (death.job_id, death.start, death.node, death.exit_code) == ("77", 0, "n0", code)


def test_pauses_grow_and_after_half_an_hour_of_them_in_a_row_the_job_fails(shell: Shell) -> None:
    pauses = []
    for start in range(9):
        shell.run("(exit 105)", start, node="?")
        pauses.append(int(shell.asked()[-1].rpartition("now+")[2]))
    expected = [20, 40, 80, 160, 320, 300, 300, 300, 300]
    assert all(0.7 * each <= pause <= 1.3 * each for pause, each in zip(pauses, expected, strict=True)), pauses
    assert sum(expected) == pytest.approx(1800, rel=0.02)
    asked = len(shell.asked())
    done = shell.run("(exit 105)", 9)
    assert done.returncode == 105
    assert "mpformer: the infrastructure ended 10 starts in a row, the last on n0 with exit code 105" in done.stdout
    assert len(shell.asked()) == asked


def test_a_good_start_between_them_ends_the_row(shell: Shell) -> None:
    for start in (*range(8), *range(9, 17)):
        assert "in a row" not in shell.run("(exit 105)", start, node="?").stdout


def test_an_element_of_an_array_speaks_of_itself_alone(shell: Shell) -> None:
    """Its raw number may be the array's, by which Slurm would queue every element again."""
    shell.run("(exit 105)", SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID="3")
    requeue, update = shell.asked()
    assert requeue == "scontrol requeue 77_3"
    assert update.startswith("scontrol update JobId=77_3 ")


def test_a_node_on_which_two_starts_died_is_left_out_but_never_half_of_them(shell: Shell) -> None:
    shell.run("(exit 105)", 0, "n1")
    assert "ExcNodeList" not in shell.asked()[-1]
    shell.run("(exit 105)", 1, "n1")
    assert shell.asked()[-1].endswith("ExcNodeList=bad[1-2],n1")
    for start in range(2, 8):
        shell.run("(exit 105)", start, f"n{start // 2 + 1}")
    assert len(shell.asked()[-1].partition("ExcNodeList=bad[1-2],")[2].split(",")) == 2, "of six nodes"
    with shell.file.open("a") as file:
        file.write("forget the nodes before this line\n")
    shell.run("(exit 105)", 20, "n5")
    assert "ExcNodeList" not in shell.asked()[-1]


def test_a_controller_that_is_away_is_asked_for_half_an_hour(shell: Shell) -> None:
    shell.says("scontrol", "Unable to contact slurm controller", 1)
    (shell.place / "bin" / "sleep").write_text(f"#!/bin/sh\necho 1 >> {shell.place}/slept\n")
    asked = f"[ $(wc -l < {shell.place}/slept) -lt 4 ]"
    scontrol = shell.place / "bin" / "scontrol"
    scontrol.write_text(scontrol.read_text().replace("exit 1", f"{asked} && exit 1 || exit 0"))
    shell.run("(exit 137)")
    assert len([line for line in shell.asked() if "requeue" in line]) == 4


def test_a_site_that_requeues_nothing_is_named_in_the_log(shell: Shell) -> None:
    shell.says("scontrol", REFUSED, 1)
    done = shell.run(f"(exit {AGAIN})")
    assert done.returncode == AGAIN
    assert f"mpformer: the job could not be requeued: {REFUSED}; launch again to continue" in done.stdout


def test_a_job_that_slurm_ends_as_a_whole_is_not_revived(shell: Shell) -> None:
    done = shell.run("kill -TERM $$; (exit 143)")
    assert done.returncode == 143
    assert not shell.asked()
