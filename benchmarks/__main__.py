"""``python -m benchmarks``: measure everything, print tables, write JSON and pictures to benchmarks/results/."""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
PARTS = ("training", "evaluation", "overhead", "growth", "profile")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5, help="repetitions at 256² and mini; 512² gets two fifths")
    parser.add_argument("--overhead-repeats", type=int, default=20)
    parser.add_argument("--growth-repeats", type=int, default=1)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--setting", choices=("R50 256²", "R50 512²", "mini"), action="append")
    parser.add_argument("--keep", action="store_true", help="update the earlier results instead of replacing them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    results = json.loads(file.read_text()) if options.keep and file.exists() else {}
    for _ in measure(options, results):
        file.write_text(json.dumps(results, indent=1) + "\n")
    from benchmarks.plots import draw_all

    draw_all(results, options.out)
    text = "\n\n".join(tables(results))
    (options.out / "tables.md").write_text(text + "\n")
    print(text)


def measure(options: argparse.Namespace, results: dict[str, Any]) -> Iterator[str]:
    """Put what was asked for into ``results``, part by part; yields the name of each part when it is there."""
    import torch

    from benchmarks import run
    from benchmarks.settings import settings

    torch.set_num_threads(options.threads)
    chosen = {n: s for n, s in settings().items() if not options.setting or n in options.setting}
    results["machine"] = run.machine(options.threads)
    for part in options.only or PARTS:
        jobs = run.jobs(part, chosen, options)
        for title, job in jobs.items():
            began, load = time.monotonic(), os.getloadavg()[0]
            found = job()
            took = {"threads": options.threads, "load": round(load, 1), "seconds": round(time.monotonic() - began)}
            results.setdefault(part, {})[title] = found | {"measured": took}
            print(f"{part}, {title}: {took}", flush=True)
            yield f"{part}, {title}"


def tables(results: Mapping[str, Any]) -> list[str]:
    """Markdown of the results."""
    found = ["Machine: " + ", ".join(f"{k} {v}" for k, v in results["machine"].items())]
    for name, result in results.get("training", {}).items():
        found += [f"### {name}", measured_line(result), stage_table(result), memory_table(result), share_line(result)]
    for name, result in results.get("evaluation", {}).items():
        found += [f"### Evaluation forward, {name}", measured_line(result), stage_table(result)]
    for name, result in results.get("overhead", {}).items():
        mean, error = result["overhead, mean"], result["standard error of the mean"]
        found.append(
            f"Piloting overhead, {name}: {result['overhead']:+.1%} of the step's CPU seconds (one thread, median of "
            f"{result['repeats']} interleaved pairs; mean {mean:+.1%} ± {error:.1%} standard error)"
        )
    for axis, result in results.get("growth", {}).items():
        found += [
            f"### Growth with {axis}: decoder, matching, losses, forward and backward",
            growth_table(axis, result),
        ]
    for name, result in results.get("profile", {}).items():
        found += [f"### Profile of the product's step, {name}", profile_table(result)]
    return found


def growth_table(axis: str, result: Mapping[str, Any]) -> str:
    """CPU seconds and bytes kept along one axis, and how well a straight line fits them."""
    points = result["points"]
    columns = {
        f"{path}, {unit}": [point[f"{path} {key}"] / scale for point in points]
        for key, unit, scale in (("seconds", "CPU s", 1), ("kept bytes", "MiB kept", MIB))
        for path in ("direct", "product")
    }
    values = [point["value"] for point in points]
    lines = [f"| {axis} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for i, value in enumerate(values):
        lines.append(f"| {value:,} | " + " | ".join(f"{column[i]:.3g}" for column in columns.values()) + " |")
    fits = [f"{statistics.correlation(values, column) ** 2:.3f}" for column in columns.values()]
    return "\n".join([*lines, "| R² of a straight line | " + " | ".join(fits) + " |"])


def profile_table(result: Mapping[str, Any]) -> str:
    """Share of the step's time by kind of operator."""
    models = list(result["shares"])
    kinds = list(result["shares"][models[0]])
    lines = ["| share of the step's time | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for kind in kinds:
        lines.append(f"| {kind} | " + " | ".join(f"{result['shares'][m].get(kind, 0.0):.1%}" for m in models) + " |")
    return "\n".join(lines)


def measured_line(result: Mapping[str, Any]) -> str:
    """Under which conditions a part was measured."""
    how = result["measured"]
    return f"{result['repeats']} interleaved repeats, {how['threads']} threads, load {how['load']} at the start."


def stage_table(result: Mapping[str, Any]) -> str:
    """CPU seconds per stage, and ratios of CPU and wall seconds with their ranges."""
    seconds = result["cpu seconds"]
    columns = {
        "direct / product": result["cpu ratio to product"]["direct"],
        "direct / own points": result.get("cpu ratio to own points", {}).get("direct"),
        "direct / product, wall": result["ratio to product"]["direct"],
    }
    columns = {title: values for title, values in columns.items() if values is not None}
    heads = [*seconds, *columns]
    lines = ["| stage, CPU seconds | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for stage in seconds["product"]:
        cells = [_seconds(found.get(stage)) for found in seconds.values()]
        cells += [_ratio(found.get(stage)) for found in columns.values()]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_table(result: Mapping[str, Any]) -> str:
    keys = (
        "bytes kept by decoder, matching, losses",
        "peak bytes of decoder, matching, losses",
        "peak bytes of the step",
    )
    paths = list(result["seconds"])
    lines = ["| MiB | " + " | ".join(paths) + " | product / direct |", "|---" * (len(paths) + 2) + "|"]
    for key in keys:
        values = " | ".join(f"{result[key][p] / MIB:.0f}" for p in paths)
        share = result[key]["product"] / result[key]["direct"]
        lines.append(f"| {key.removeprefix('bytes ').replace('peak bytes', 'peak')} | {values} | {share:.2f} |")
    return "\n".join(lines)


def share_line(result: Mapping[str, Any]) -> str:
    part, least = result["shares of the step"], result["floor seconds"]
    floors = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in least.items())
    rate = result["matrix product GFLOP/s"]
    return (
        f"Share of the product's step (own points, CPU): matching costs {part['matching']:.1%}, assignments "
        f"{part['assignments']:.2%}. Floor: CPU seconds of its matrix products at the measured "
        f"rate of {rate:.0f} GFLOP a CPU second: {floors}."
    )


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _ratio(found: tuple[float, float, float] | None) -> str:
    return "" if found is None else f"{found[0]:.2f} ({found[1]:.2f}–{found[2]:.2f})"


if __name__ == "__main__":
    main()
