"""A package of somebody else under one of this project's names is named, with what to do (issue 12, 5.10)."""

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments.cli import own_packages
from mpformer.runtime import code
from mpformer.runtime.errors import UserError


def told(name: str, folder: Path) -> str:
    return (
        f"{folder / name} is another package of the name {name!r}, and Python finds it before "
        f"{code.ROOT / name}: take {folder} out of PYTHONPATH, or start mpformer in another directory"
    )


@pytest.mark.parametrize("name", ["analysis", "reports"])
def test_a_foreign_package_on_the_path_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli.main", "suites"], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{code.ROOT}"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, f"mpformer: {told(name, tmp_path)}\n")


@pytest.mark.parametrize("name", code.PACKAGES)
def test_each_package_is_looked_at(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_packages.check()
    known = find_spec
    foreign = ModuleSpec(name, None, is_package=True)
    foreign.submodule_search_locations = [str(tmp_path / name)]
    monkeypatch.setattr(own_packages, "find_spec", lambda asked: foreign if asked == name else known(asked))
    with pytest.raises(UserError) as error:
        own_packages.check()
    assert str(error.value) == told(name, tmp_path)
