"""How long the reports take: `python benchmarks/reports_speed.py`. Prints wall and processor seconds of each step.

Targets, on one idle core: 1,000 runs into all formats (Markdown, LaTeX, HTML with figures and a page a run, CSV, JSON)
in under 10 s, an incremental rebuild in under 2 s. The runs are invented, by the script that makes the test fixtures;
plotting libraries are imported before the clock starts.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.make_fixture_store import RowSpec, make_run, make_suite

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
    """Print what a step took; processor time is what one idle core would need, at most."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    print(
        f"{what:<62} {time.perf_counter() - wall:7.2f} s wall {time.process_time() - processor:7.2f} s processor",
        flush=True,
    )


def change_one(root: Path) -> None:
    """A run of the last suite, shown in its figures, comes out differently."""
    record = json.loads((root / "suites" / f"suite-{SUITES - 1}@mini.json").read_text())
    path = root / "runs" / record["rows"][-1]["runs"][0]["run_id"]
    (result,) = path.glob("evals/*/result.json")
    content = json.loads(result.read_text())
    content["metrics"]["AP"] += 0.1
    content["layers"]["AP"] = [value + 0.1 for value in content["layers"]["AP"]]
    result.write_text(json.dumps(content))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        print(f"{make_store(root)} runs in {SUITES} suites; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        import matplotlib.backends.backend_pdf
        import matplotlib.backends.backend_svg  # noqa: F401

        from reports.build import build
        from reports.formats import FIGURES, TABLES

        def again(*formats: str, fresh: bool = False) -> None:
            if fresh:
                shutil.rmtree(root / "reports", ignore_errors=True)
            build([], root, formats=formats)

        five = (*TABLES, "html")
        timed("tables alone: Markdown, LaTeX and its macros, CSV, JSON", lambda: again(*TABLES))
        for name, formats in (("all five formats", five), ("and the figures as PDF and PNG too", (*five, *FIGURES))):
            timed(f"{name}, everything new", lambda f=formats: again(*f, fresh=True))  # type: ignore[misc]
            timed(f"{name}, nothing changed", lambda f=formats: again(*f))  # type: ignore[misc]
            change_one(root)
            timed(f"{name}, one run changed", lambda f=formats: again(*f))  # type: ignore[misc]
        pages = list((root / "reports").rglob("*.html"))
        print(f"{len(pages)} pages; the largest: {max(page.stat().st_size for page in pages) / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
