"""The private cluster: real daemons, a real submitit job with and without accounting, and nothing left behind."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm


def where() -> dict[str, str]:
    """What a job sees; sent to the cluster by submitit."""
    return {name: value for name, value in os.environ.items() if name.startswith(("SLURM_", "CUDA_"))}


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def client(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def listening(status: dict[str, Any]) -> list[str]:
    """The addresses on which the cluster's own ports are open, as the kernel lists them."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = [row[1].split(":") for row in rows if row[3] == "0A"]
    ours = range(status["port"], status["port"] + 3 + len(status["nodes"]))
    found = [socket.inet_ntoa(bytes.fromhex(address)[::-1]) for address, port in ends if int(port, 16) in ours]
    assert len(found) == len([name for name in status["daemons"] if name != "munged"])
    return found


@pytest.mark.parametrize("accounting", [False, True], ids=["no-accounting", "accounting"])
def test_a_submitit_job_runs_and_the_cluster_goes_down(
    devcluster: Callable[..., Any], accounting: bool, tmp_path: Path
) -> None:
    import submitit

    cluster = devcluster(accounting=accounting)
    status = cluster.status()
    assert status["up"]
    assert status["nodes"] == ["n0 idle", "n1 idle"]
    assert status["accounting"] is accounting
    assert all(address.startswith("127.") for address in listening(status)), "issue 12, 5.11: out of others' reach"

    executor = submitit.SlurmExecutor(tmp_path)
    executor.update_parameters(time=5, gpus_per_node=2, mem="1GB", cpus_per_task=1)
    job = executor.submit(where)
    assert int(job.job_id) >= status["first_job"], "job ids do not start at 1: clients keep results under them"
    seen = job.result()
    assert seen["SLURM_JOB_ID"] == job.job_id
    assert seen["CUDA_VISIBLE_DEVICES"] == "0,1"
    if accounting:
        until(lambda: "COMPLETED" in client("sacct", "-nXP", "-j", job.job_id, "-o", "State"))

    cluster.call("down")
    assert cluster.processes() == []
    assert not cluster.status()["up"]
    assert {path.name for path in cluster.folder.iterdir()} == {"log", ".gitignore"}


def test_down_ends_running_jobs_and_their_children(devcluster: Callable[..., Any]) -> None:
    cluster = devcluster("--nodes", "1")
    client("sbatch", "-o", "/dev/null", "--wrap", "trap '' TERM; sleep 1234 & wait; sleep 1234")
    until(lambda: "R" in client("squeue", "-h", "-o", "%t").split())
    until(lambda: any("sleep 1234" in command for command in cluster.processes()))
    cluster.call("down")
    assert cluster.processes() == []


def test_up_again_starts_what_died_and_keeps_the_jobs(devcluster: Callable[..., Any]) -> None:
    cluster = devcluster()
    job = client("sbatch", "-o", "/dev/null", "--parsable", "--wrap", "sleep 600")
    until(lambda: client("squeue", "-h", "-j", job, "-o", "%t") == "R")
    time.sleep(6)  # the controller saves its state every 5 s; killed sooner it launches the job again
    os.kill(cluster.status()["daemons"]["slurmctld"], signal.SIGKILL)
    until(lambda: cluster.status()["daemons"]["slurmctld"] is None)
    assert cluster.call("status", check=False).returncode == 1
    others = {name: pid for name, pid in cluster.status()["daemons"].items() if pid}
    cluster.call("up")
    status = cluster.status()
    assert status["up"]
    assert status["daemons"].items() >= others.items(), "what ran was left alone"
    assert client("squeue", "-h", "-j", job, "-o", "%t") == "R"
    cluster.call("down", "--keep")
    cluster.call("up")
    assert cluster.status()["first_job"] == status["first_job"]


def test_the_high_partition_preempts_main(devcluster: Callable[..., Any], tmp_path: Path) -> None:
    """The warning signal comes first, 30 s of grace before the end; here the job leaves at once."""
    devcluster("--nodes", "1")
    log = tmp_path / "log"
    body = f"trap 'echo warned >> {log}; exit 0' USR2; echo started >> {log}; sleep 600 & wait"
    options = ["-o", "/dev/null", "--exclusive", "--parsable", "--signal=B:USR2@20"]
    low = client("sbatch", *options, "-p", "main", "--requeue", "--wrap", body)
    until(lambda: log.exists())
    client("srun", "-p", "high", "--exclusive", "true")
    until(lambda: "warned" in log.read_text())
    assert low


def test_mistakes_are_one_line(devcluster: Callable[..., Any], tmp_path: Path) -> None:
    cluster = devcluster("--nodes", "1")
    (tmp_path / "something").touch()
    here = type(cluster)(tmp_path)
    assert "not empty and not a devcluster" in here.call("up", check=False).stderr
    assert "there is no devcluster in" in here.call("down", check=False).stderr
    env = here.call("env", check=False)
    assert (env.returncode, env.stdout) == (2, ""), "issue 12, 5.11: nothing to evaluate in a shell"
    assert "there is no devcluster in" in env.stderr
    assert (tmp_path / "something").exists()
    assert here.call("up", "--nodes", "0", check=False).returncode == 2
