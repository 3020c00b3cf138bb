"""A copy of the committed fixture store whose claims are as old as each run's state says."""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from experiments.store.run_dir import Store
from reports import figures
from reports.collect import SuiteReport, collect, records
from reports.runs import Reader

FIXTURES = Path(__file__).parent / "fixture_store"
LIVE = "shapes-panoptic-mp-every-n0-f0-s0"  # the run that trains right now


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store to write reports into; one run's heartbeat is fresh, every other one's is a day old."""
    return copy_store(tmp_path / "store")


def copy_store(root: Path) -> Path:
    """Copy the fixture store to ``root``."""
    shutil.copytree(FIXTURES, root)
    now = time.time()
    for claim in root.glob("runs/*/claims/*"):
        age = 0 if claim.parts[-3].startswith(LIVE) else 86400
        os.utime(claim, (now - age, now - age))
    return root


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``store``, one for all tests of a file: for tests that change it once."""
    return copy_store(tmp_path_factory.mktemp("shared") / "store")


@pytest.fixture(scope="module")
def shared_blank_figures() -> Iterator[None]:
    """As ``blank_figures``, for a whole file."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw_blanks(monkeypatch)
        yield


@pytest.fixture
def gather(store: Path) -> Callable[..., SuiteReport]:
    """Collect one suite of the store."""

    def one(suite: str, dataset: str | None = None, **options: object) -> SuiteReport:
        opened = Store(store)
        return collect(records(opened, [suite], "mini", dataset)[0], Reader(opened), **options)  # type: ignore[arg-type]

    return one


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing, which is what takes time; each blank figure has a number of its own."""
    draw_blanks(monkeypatch)


def draw_blanks(monkeypatch: pytest.MonkeyPatch) -> None:
    """See :func:`blank_figures`."""
    numbers = itertools.count()

    def draw(plan: figures.Plan, stem: Path, kinds: Sequence[str]) -> dict[str, str]:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for kind in kinds:
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><text>{next(numbers)}</text></svg>'
            stem.with_name(f"{stem.name}.{kind}").write_text(svg)
        return {}

    monkeypatch.setattr(figures, "_draw", draw)
