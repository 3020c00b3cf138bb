"""A plan that was submitted to a Slurm of small scripts."""

import os
from pathlib import Path

import pytest

from experiments.status import scheduler
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan
from tests.support.fake_slurm import SCRIPT, FakeSlurm, Submitted, submit


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("squeue", "sacct", "scontrol"):
        (folder / name).write_text(SCRIPT.format(folder=folder))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    fake = FakeSlurm(folder)
    fake.say("squeue")
    fake.say("scontrol", "Configuration data as of now\nClusterName             = lab\nMinJobAge = 300 sec\n")
    fake.no_accounting()
    monkeypatch.setattr(scheduler, "_CLUSTERS", {})
    return fake


@pytest.fixture
def submitted(plan: Plan, store: Store, slurm: FakeSlurm) -> Submitted:
    submit(plan, store)
    return Submitted(plan, store)
