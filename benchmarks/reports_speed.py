"""How long the reports take: `python benchmarks/reports_speed.py`. Prints wall and processor seconds of each step.

Targets, on one idle core: 1,000 runs into all formats in under 10 s, an incremental rebuild in under 2 s, an explorer
of 100 images x 10 layers x 20 queries under 30 MB. The runs are invented, by the script that makes the test fixtures.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "reports"))

from make_fixture_store import RowSpec, make_run, make_suite

SUITES, ROWS, SEEDS = 4, 51, 5
_DONE = ("done",) * SEEDS


def rows(suite: int) -> tuple[RowSpec, ...]:
    """A baseline (shared by every other suite) and rows that differ from it in piloting and its noise."""
    base = RowSpec("mask2former", "Mask2Former", {"mp_queries": False, "query_position": suite % 2 == 0}, 0.0, _DONE)
    return (base, *(_row(suite, i) for i in range(1, ROWS)))


def _row(suite: int, i: int) -> RowSpec:
    toggles = {"mp_queries": True, "point_noise": i / 100, "flip_noise": suite / 10}
    return RowSpec(f"row-{i}", f"point noise {i / 100:g}", toggles, i / 20, _DONE)


def make_store(root: Path) -> int:
    """Write the suites and their runs; returns how many runs there are."""
    for suite in range(SUITES):
        for run in make_suite(root, f"suite-{suite}", "shapes", f"Suite {suite}", "unknown", rows(suite)):
            make_run(root / "runs", run)
    return len(list((root / "runs").iterdir()))


def timed(what: str, work: Callable[[], object]) -> None:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    print(
        f"{what:<48} {time.perf_counter() - wall:7.2f} s wall {time.process_time() - processor:7.2f} s processor",
        flush=True,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        print(f"{make_store(root)} runs in {SUITES} suites")

        def build(*formats: str) -> None:
            from reports.build import FORMATS, build

            build([], root, formats=formats or FORMATS)

        timed("tables alone (Markdown, LaTeX, CSV, JSON)", lambda: build("md", "tex", "macros", "csv", "json"))
        timed("everything, figures drawn anew", build)
        timed("everything again, nothing changed", build)
        pages = list((root / "reports").rglob("index.html"))
        print(f"largest page: {max(page.stat().st_size for page in pages) / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
