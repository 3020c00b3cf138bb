"""A real Slurm for tests: a private cluster of this machine, or a skip that says why not."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "slurm" / "devcluster"
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class DevCluster:
    """One folder that ``slurm/devcluster`` works on."""

    folder: Path

    def call(self, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run the script."""
        command = [sys.executable, str(SCRIPT), *arguments, "--dir", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert not check or done.returncode == 0, done.stderr
        return done

    def status(self) -> dict[str, Any]:
        """What ``status --json`` says."""
        return dict(json.loads(self.call("status", "--json", check=False).stdout))

    @property
    def conf(self) -> Path:
        """Its slurm.conf."""
        return self.folder / "etc" / "slurm.conf"

    def processes(self) -> list[str]:
        """The command lines of everything that belongs to it."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(self.folder).encode() in text and int(entry.name) != os.getpid() and command:
                found.append(command)
        return found


def needed(*programs: str) -> None:
    """Skip unless the programs are installed."""
    absent = [name for name in programs if not shutil.which(name, path=_PATH)]
    if absent:
        packages = "slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core"
        pytest.skip(f"{', '.join(absent)} not installed: apt-get install --no-install-recommends {packages}")


@contextmanager
def clusters() -> Iterator[Callable[..., DevCluster]]:
    """Give a function that starts a cluster, ``start(accounting=True)``, with SLURM_CONF pointing at it."""
    started: list[DevCluster] = []

    def start(*options: str, accounting: bool = False) -> DevCluster:
        needed("sbatch", "slurmctld", "slurmd", "munged", *(("slurmdbd", "mariadbd") if accounting else ()))
        cluster = DevCluster(Path(tempfile.mkdtemp(prefix="devcluster-test-")))
        started.append(cluster)
        cluster.call("up", *(("--accounting",) if accounting else ()), *options)
        patch.setenv("SLURM_CONF", str(cluster.conf))
        return cluster

    with pytest.MonkeyPatch.context() as patch:
        yield start
        for cluster in started:
            cluster.call("down", check=False)
            shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture
def devcluster() -> Iterator[Callable[..., DevCluster]]:
    """Start clusters that go down after the test."""
    with clusters() as start:
        yield start


@pytest.fixture(scope="module")
def shared_devcluster() -> Iterator[Callable[..., DevCluster]]:
    """Start clusters that go down after the last test of the file."""
    with clusters() as start:
        yield start
