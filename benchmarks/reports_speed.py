"""How long the reports take: `python -m benchmarks.reports_speed [--all]`. Prints wall and processor seconds of each
step; with --all of every figure as PDF and PNG too.

Targets, on one idle core: 1,000 runs into the five formats (Markdown, LaTeX, HTML with figures and a page a run, CSV,
JSON) in under 15 s, again with nothing changed in 1 s, with one run changed in 2 s. The runs are invented, by the
script that makes the test fixtures, and each has what a run at scale mini leaves: a layer table of 500 images, the
masks of 16, probes (the same few files, linked). Plotting libraries are imported before the clock starts.

On a machine that does other things too, a second of processor time holds less work; a yardstick (JSON and arithmetic)
is timed before and after each step, and its least time tells how much.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.support.make_fixture_store import (
    HEADLINE,
    LAYERS,
    RowSpec,
    Run,
    layer_masks,
    layers_parquet,
    make_run,
    make_suite,
)

SUITES, ROWS, SEEDS = 4, 51, 5
IMAGES, IMAGES_WITH_MASKS = 500, 16
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
    models = [evaluated(root / "models" / spec.name, Run(spec, "shapes", 0, "done")) for spec in HEADLINE]
    for suite in range(SUITES):
        for run in make_suite(root, f"suite-{suite}", "shapes", f"Suite {suite}", "unknown", rows(suite)):
            folder = root / "runs" / run.run_id
            if not folder.exists():
                make_run(root / "runs", run)
                link(models[run.spec.gain > 1], folder, folder / "evals" / run.eval_id)
    return len(list((root / "runs").iterdir()))


def evaluated(folder: Path, run: Run) -> Path:
    """What an evaluation at scale mini leaves beside its result, and the probes of the training before it."""
    import pandas as pd

    layer_masks(folder, run, IMAGES_WITH_MASKS)
    layers_parquet(folder, run, objects=4 * IMAGES)
    measures = ("Util", "mIoU-L", "IoU-gt", "empty_attention_share", "stability")
    lines = [
        {"iteration": i, "layer": layer, **dict.fromkeys(measures, 40.0 + i / 100 + layer)}
        for i in (400, 800, 1200)
        for layer in range(LAYERS + 1)
    ]
    pd.DataFrame(lines).to_parquet(folder / "probes.parquet")
    return folder


def link(model: Path, run: Path, evaluation: Path) -> None:
    """Give a run these files without writing them a thousand times."""
    (evaluation / "layer_masks").mkdir()
    os.link(model / "probes.parquet", run / "probes.parquet")
    for path in (model / "layers.parquet", *(model / "layer_masks").iterdir()):
        os.link(path, evaluation / path.relative_to(model))


def yardstick() -> float:
    """Processor seconds of a fixed piece of work: the least of ten."""
    data = [{"name": str(i), "value": i} for i in range(20_000)]

    def once() -> float:
        started = time.process_time()
        json.loads(json.dumps(data))
        np.sort(np.random.default_rng(0).random(200_000))
        return time.process_time() - started

    return min(once() for _ in range(10))


def timed(what: str, work: Callable[[], object]) -> None:
    """Print what a step took; processor time is what one idle core would need, at most."""
    before = yardstick()
    wall, processor = time.perf_counter(), time.process_time()
    work()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    slow = 1000 * (before + yardstick()) / 2
    print(f"{what:<62} {wall:7.2f} s wall {processor:7.2f} s processor (yardstick {slow:.0f} ms)", flush=True)


def change_one(root: Path) -> None:
    """A run of the last suite, shown in its figures, comes out differently."""
    record = json.loads((root / "suites" / f"suite-{SUITES - 1}@mini.json").read_text())
    path = root / "runs" / record["rows"][-1]["runs"][0]["run_id"]
    (result,) = path.glob("evals/*/result.json")
    content = json.loads(result.read_text())
    content["metrics"]["AP"] += 0.1
    content["layers"]["AP"] = [value + 0.1 for value in content["layers"]["AP"]]
    result.write_text(json.dumps(content))


def measure(root: Path, everything: bool) -> None:
    """Time the reports of the store."""
    import matplotlib.backends.backend_pdf
    import matplotlib.backends.backend_svg  # noqa: F401

    from reports.build import build
    from reports.formats import FIGURES, TABLES

    def again(*formats: str, fresh: bool = False) -> None:
        if fresh:
            shutil.rmtree(root / "reports", ignore_errors=True)
        build([], root, formats=formats)

    five = (*TABLES, "html")
    sets = [("all five formats", five), ("and the figures as PDF and PNG too", (*five, *FIGURES))]
    timed("tables alone: Markdown, LaTeX and its macros, CSV, JSON", lambda: again(*TABLES, fresh=True))
    for name, formats in sets[: 1 + everything]:
        timed(f"{name}, everything new", lambda f=formats: again(*f, fresh=True))  # type: ignore[misc]
        timed(f"{name}, nothing changed", lambda f=formats: again(*f))  # type: ignore[misc]
        change_one(root)
        timed(f"{name}, one run changed", lambda f=formats: again(*f))  # type: ignore[misc]
    for what, pattern in (("pages", "*.html"), ("data of figures", "figures/*.csv"), ("figures", "figures/*.svg")):
        sizes = [path.stat().st_size for path in (root / "reports").rglob(pattern)]
        print(f"{len(sizes)} {what}; the largest: {max(sizes) / 2**20:.2f} MiB, all: {sum(sizes) / 2**20:.1f} MiB")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        print(f"{make_store(root)} runs in {SUITES} suites; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        measure(root, "--all" in sys.argv)


if __name__ == "__main__":
    main()
