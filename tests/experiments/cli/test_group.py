"""Commands of other packages: this project's reports, a laboratory's own, and what goes wrong with one."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from experiments.cli import group
from experiments.cli.main import cli
from experiments.slurm import code_snapshot
from experiments.store.run_dir import Store
from mpformer.runtime.errors import UserError

MODULE = """
import click
from experiments.cli.options import root_option

@click.command()
@root_option
def weigh(root):
    \"\"\"Say where the runs of this laboratory lie.\"\"\"
    click.echo(f"runs in {root}")

broken = 3
"""

Add = Callable[..., None]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Install a distribution with one module, ``laboratory``, and the given entry points."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def install(**points: str) -> None:
        about = tmp_path / "site" / "laboratory-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: laboratory\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (about / "entry_points.txt").write_text("\n".join(["[mpformer.commands]", *lines]))
        (tmp_path / "site" / "laboratory.py").write_text(MODULE)
        group.entry_points.cache_clear()

    yield install
    group.entry_points.cache_clear()
    sys.modules.pop("laboratory", None)


def called(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


def test_a_laboratory_adds_a_command(add: Add) -> None:
    assert "\n  weigh " not in called("--help").output
    add(weigh="laboratory:weigh")
    assert "Say where the runs of this laboratory lie." in called("--help").output
    assert called("weigh", "--root", "here").output == "runs in here\n"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("laboratory:broken", "it is a int, not a click.Command"),
        ("laboratory:nothing", "AttributeError: module 'laboratory' has no attribute 'nothing'"),
        ("no_such_module:x", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_broken_command_says_so_and_leaves_the_others_alone(add: Add, value: str, reason: str) -> None:
    add(weigh=value)
    line = f"the command 'weigh' of package laboratory ({value}) cannot be loaded: {reason}"
    for words in (("weigh",), ("weigh", "--any", "words"), ("weigh", "--help")):
        ended = called(*words).exception
        assert isinstance(ended, UserError)
        assert str(ended) == line
    listed = called("--help")
    assert listed.exit_code == 0
    assert "the command 'weigh' of package laboratory" in listed.output


def test_a_name_that_is_taken_stays_with_its_owner(add: Add) -> None:
    add(plan="laboratory:weigh")
    assert "the command 'plan' of laboratory:weigh is left out" in called("--help").output
    assert "Show the runs of SUITE" in called("plan", "--help").output


@pytest.mark.parametrize("metadata", ["none", "older"])
def test_a_snapshot_finds_the_commands_of_its_own_code(metadata: str, tmp_path: Path) -> None:
    """Without the package's metadata, and beside an installation whose commands were others."""
    code = code_snapshot.take(Store(tmp_path / "store"))
    old = "importlib.metadata.EntryPoint('report', 'reports.no_longer:there', 'mpformer.commands')"
    script = f"""
import importlib.metadata
importlib.metadata.entry_points = lambda group: [{old if metadata == "older" else ""}]
import experiments.cli.main, sys
print(experiments.cli.main.__file__)
experiments.cli.main.cli.main(sys.argv[1:])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, "report", "--help"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(code)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(str(code))
    assert "Write tables (Markdown, LaTeX, ...)" in done.stdout
