"""The study's own modules, which are run as scripts, importable by their names."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.suites import catalogue
from experiments.suites.rows import SUITES

MINI = Path(__file__).parents[2] / "results" / "mini"
sys.path.insert(0, str(MINI))


@pytest.fixture(autouse=True)
def _only_here() -> Iterator[None]:
    """The suites of a file are known until the process ends: other tests are not to find the study's."""
    before, sources = set(SUITES), dict(catalogue._SOURCES)
    yield
    for name in set(SUITES) - before:
        SUITES.pop(name)
    catalogue._SOURCES.clear()
    catalogue._SOURCES.update(sources)


@pytest.fixture
def study_suites() -> None:
    """The study's suites."""
    catalogue.add_file(MINI / "suites.py")
