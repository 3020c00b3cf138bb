"""``python -m benchmarks``: measure everything, print tables, write JSON and pictures to benchmarks/results/."""

import argparse
import json
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5, help="repetitions at 256² and mini; 512² gets three fifths")
    parser.add_argument("--overhead-repeats", type=int, default=20)
    parser.add_argument("--growth-repeats", type=int, default=3)
    parser.add_argument("--only", choices=("training", "evaluation", "overhead", "growth"), action="append")
    parser.add_argument("--setting", choices=("R50 256²", "R50 512²", "mini"), action="append")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    results = measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    from benchmarks.plots import draw_all

    if "training" in results:
        draw_all(results, options.out)
    text = "\n\n".join(tables(results))
    (options.out / "tables.md").write_text(text + "\n")
    print(text)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run what was asked for."""
    import torch

    from benchmarks import run
    from benchmarks.settings import settings

    torch.set_num_threads(options.threads)
    began = time.monotonic()
    wanted = options.only or ["training", "evaluation", "overhead", "growth"]
    chosen = {n: s for n, s in settings().items() if not options.setting or n in options.setting}
    results: dict[str, Any] = {"machine": run.machine(options.threads)}
    if "training" in wanted:
        results["training"] = {}
        for name, setting in chosen.items():
            repeats = max(1, options.repeats * 3 // 5) if "512" in name else options.repeats
            for piloted in (False, True):
                title = f"{name}, {'MP-Former' if piloted else 'Mask2Former'}"
                print(f"{time.monotonic() - began:5.0f} s  {title}", flush=True)
                found = run.training(setting, piloted, repeats)
                found["shares of the step"] = run.shares(found)
                found["floor seconds"] = run.floor(found, results["machine"]["matrix product GFLOP/s"] * 1e9)
                results["training"][title] = found
    if "evaluation" in wanted:
        print(f"{time.monotonic() - began:5.0f} s  evaluation", flush=True)
        results["evaluation"] = {n: run.evaluation(s, options.repeats) for n, s in chosen.items()}
    if "overhead" in wanted:
        print(f"{time.monotonic() - began:5.0f} s  piloting overhead", flush=True)
        results["overhead"] = {
            n: run.piloting_overhead(s, options.overhead_repeats) for n, s in chosen.items() if "512" not in n
        }
    if "growth" in wanted:
        print(f"{time.monotonic() - began:5.0f} s  growth", flush=True)
        results["growth"] = run.growth_along_axes(options.growth_repeats)
    results["machine"]["load after"] = round(os.getloadavg()[0], 2)
    results["machine"]["minutes"] = round((time.monotonic() - began) / 60, 1)
    return results


def tables(results: Mapping[str, Any]) -> list[str]:
    """Markdown of the results."""
    found = ["Machine: " + ", ".join(f"{k} {v}" for k, v in results["machine"].items())]
    for name, result in results.get("training", {}).items():
        found += [f"### {name}", stage_table(result), memory_table(result), share_line(result)]
    for name, result in results.get("evaluation", {}).items():
        found += [f"### Evaluation forward, {name}", evaluation_table(result)]
    for name, result in results.get("overhead", {}).items():
        mean, error = result["overhead, mean"], result["standard error of the mean"]
        found.append(
            f"Piloting overhead, {name}: {result['overhead']:+.1%} of the step's CPU seconds (one thread, median of "
            f"{result['repeats']} interleaved pairs; mean {mean:+.1%} ± {error:.1%} standard error)"
        )
    return found


def stage_table(result: Mapping[str, Any]) -> str:
    """Seconds per stage and the ratio direct / product with its range."""
    paths = list(result["seconds"])
    lines = ["| stage | " + " | ".join(paths) + " | direct / product | CPU seconds |", "|---" * (len(paths) + 3) + "|"]
    for stage in result["seconds"]["product"]:
        values = " | ".join(_seconds(result["seconds"][p].get(stage)) for p in paths)
        wall, cpu = (_ratio(result[k]["direct"].get(stage)) for k in ("ratio to product", "cpu ratio to product"))
        lines.append(f"| {stage} | {values} | {wall} | {cpu} |")
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
    return (
        f"Share of the product's step (own points, CPU): matching costs {part['matching']:.1%}, assignments "
        f"{part['assignments']:.2%}. Floor of its matrix products at the measured rate: {floors}."
    )


def evaluation_table(result: Mapping[str, Any]) -> str:
    paths = list(result["seconds"])
    lines = ["| stage | " + " | ".join(paths) + " | direct / product | CPU seconds |", "|---" * (len(paths) + 3) + "|"]
    for stage in result["seconds"]["product"]:
        values = " | ".join(_seconds(result["seconds"][p].get(stage)) for p in paths)
        wall, cpu = (_ratio(result[k]["direct"].get(stage)) for k in ("ratio to product", "cpu ratio to product"))
        lines.append(f"| {stage} | {values} | {wall} | {cpu} |")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _ratio(found: tuple[float, float, float] | None) -> str:
    return "" if found is None else f"{found[0]:.2f} ({found[1]:.2f}–{found[2]:.2f})"


if __name__ == "__main__":
    main()
