"""Runs ``steps.py`` in a process of its own.

PyTorch's autograd starts a thread for each device at the process's first backward pass; a device that is registered
later has none. Other tests of the same worker would decide whether these work.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = Path(__file__).with_name("steps.py")
NAMES = [
    node.name
    for node in ast.parse(STEPS.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


@pytest.fixture(scope="module")
def outcomes() -> str:
    """What pytest says of each test of ``steps.py``."""
    options = ["-q", "-rA", "-p", "no:cacheprovider", "-o", "python_files=steps.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", *options, str(STEPS)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", NAMES)
def test_steps(name: str, outcomes: str) -> None:
    lines = [line for line in outcomes.splitlines() if f"steps.py::{name}" in line]
    assert lines, outcomes[-4000:]
    assert all(line.startswith("PASSED") for line in lines), outcomes[-8000:]
