"""``mpformer profile check`` with a sbatch of scripts: what it is asked, and what is made of its answers."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from experiments.cli.main import cli
from mpformer.runtime.errors import UserError

SBATCH = """#!/bin/sh
[ "$1" = --test-only ] || exit 9
cp "$2" "$(dirname "$0")/script.$(grep -o 'job-name=check.[a-z]*' "$2")"
grep -q 'partition=nowhere' "$2" || exit 0
echo 'allocation failure: Invalid partition name specified' >&2
exit 1
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    return tmp_path


def test_each_kind_of_array_is_asked_about(site: Path) -> None:
    profile = site / "lab.yaml"
    profile.write_text(
        "{executor: slurm, time: 60, partition: main, evaluate: {gpus: 1}, report: {partition: nowhere}}"
    )
    done = CliRunner().invoke(cli, ["profile", "check", str(profile)])
    assert [line.split(maxsplit=1) for line in done.output.splitlines()] == [
        ["runs", "the site would take it"],
        ["evaluate", "the site would take it"],
        ["report", "refused: allocation failure: Invalid partition name specified"],
    ], done.exception
    assert "--gpus-per-node=1" in (site / "bin" / "script.job-name=check.evaluate").read_text()


def test_a_profile_of_this_machine_is_not_asked_about(site: Path) -> None:
    done = CliRunner().invoke(cli, ["profile", "check", "local"])
    assert isinstance(done.exception, UserError)
    assert "give a Slurm profile" in str(done.exception)
