"""All measurements, in the order of the report. Agreement comes first; nothing is timed that does not agree."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import agreement, growth, operators
from benchmarks.measure import (
    BACKBONE,
    DECODING,
    PIXELS,
    STEP,
    Clock,
    decoding_peak_of,
    flops,
    interleaved,
    kept_by,
    matmul_peak,
    medians,
    memory,
    ratios,
    step,
)
from benchmarks.paths import Path, ProductPath, build, build_peer_path
from benchmarks.settings import MASK2FORMER, PILOTED, Setting
from mpformer.modeling.deformable_attention import kernel_name
from tests.support.paired_models import draw

FORWARD = ("decoder", "matching", "losses")


def jobs(part: str, chosen: Mapping[str, Setting], options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What a part of the benchmarks consists of, by title."""
    found: dict[str, Callable[[], Any]] = {}
    if part == "growth":
        return {axis: partial(growth_along, axis, options.growth_repeats) for axis in growth.AXES}
    for name, setting in chosen.items():
        large = setting.side > 256
        repeats = max(1, options.repeats * 2 // 5) if large else options.repeats
        if part == "training":
            found[f"{name}, Mask2Former"] = partial(training, setting, False, repeats)
            found[f"{name}, MP-Former"] = partial(training, setting, True, repeats)
        elif part == "evaluation":
            found[name] = partial(evaluation, setting, repeats)
        elif part == "profile" and not large:
            found[name] = partial(profiled, setting)
        elif part == "overhead" and not large:
            found[name] = partial(piloting_overhead, setting, options.overhead_repeats)
    return found


def machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "deformable attention": kernel_name("cpu"),
        "matrix product GFLOP/s": round(matmul_peak() / 1e9, 1),
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def training(setting: Setting, piloted: bool, repeats: int) -> dict[str, Any]:
    """Stages of one training step: direct, product, the product with its own points, and the peer."""
    drawn = draw(setting.config.model, setting.batch, 0, shared=True)
    direct, product = build(setting, PILOTED if piloted else MASK2FORMER, drawn)
    checks = {"direct": agreement.with_direct(direct, product)}
    checks["direct"].check(f"{setting.name}, direct")
    paths: dict[str, Path] = {"direct": direct, "product": product}
    paths["product, own points"] = ProductPath(product.model, setting.make_batch(), None)
    peer = build_peer_path(setting, direct)
    if peer is not None:
        checks["transformers"] = agreement.with_peer(peer, product)
        checks["transformers"].check(f"{setting.name}, transformers")
        paths["transformers"] = peer
    clocks = interleaved({name: _step(path) for name, path in paths.items()}, repeats)
    used = {name: _memory(path) for name, path in paths.items()}
    result: dict[str, Any] = {
        "agreement": {name: vars(check) for name, check in checks.items()},
        "repeats": repeats,
        "seconds": {name: medians(clock) for name, clock in clocks.items()},
        "cpu seconds": {name: medians(clock, "cpu") for name, clock in clocks.items()},
        "ratio to product": {n: ratios(clocks[n], clocks["product"]) for n in clocks if n != "product"},
        "cpu ratio to product": {n: ratios(clocks[n], clocks["product"], "cpu") for n in clocks if n != "product"},
        "cpu ratio to own points": {"direct": ratios(clocks["direct"], clocks["product, own points"], "cpu")},
        "bytes kept": {n: {s: u[s]["added"] for s in (*FORWARD, "pixel decoder", "backbone")} for n, u in used.items()},
        "bytes kept by decoder, matching, losses": {name: kept_by(u, FORWARD) for name, u in used.items()},
        "peak bytes of decoder, matching, losses": {name: decoding_peak_of(u) for name, u in used.items()},
        "peak bytes of the step": {name: max(s["peak"] for s in u.values()) for name, u in used.items()},
        "GFLOP of the product": {stage: round(count / 1e9, 3) for stage, count in flops(product).items()},
        "matrix product GFLOP/s": round(matmul_peak() / 1e9, 1),
    }
    result["shares of the step"] = shares(result)
    result["floor seconds"] = floor(result, result["matrix product GFLOP/s"] * 1e9)
    return result


def _step(path: Path) -> Callable[[Clock], Any]:
    return lambda clock: step(path, clock)


def _memory(path: Path) -> dict[str, dict[str, float]]:
    path.model.zero_grad(set_to_none=True)  # its own gradients count, those of the run before do not
    return memory(_step(path))


def evaluation(setting: Setting, repeats: int) -> dict[str, Any]:
    """Evaluation forward of the direct and the product path, the latter with and without piloting's parameters."""
    drawn = draw(setting.config.model, setting.batch, 0, shared=True)
    direct, plain = build(setting, MASK2FORMER, drawn)
    _, piloted = build(setting, PILOTED, drawn)
    shared = {k: v for k, v in piloted.model.state_dict().items() if ".label_enc." not in k}
    plain.model.load_state_dict(shared)
    direct.model.load_state_dict(shared)
    paths: dict[str, Path] = {"direct": direct, "product": plain, "product, piloting": piloted}
    for path in paths.values():
        path.model.eval()
    with torch.no_grad():
        outputs = {name: path.final(path.pixel_decoder(path.backbone())) for name, path in paths.items()}
    same = all(torch.equal(a, b) for a, b in zip(outputs["product"], outputs["product, piloting"], strict=True))
    assert same, "evaluation depends on piloting's parameters"
    clocks = interleaved({name: _forward(path) for name, path in paths.items()}, repeats)
    return {
        "repeats": repeats,
        "seconds": {name: medians(clock) for name, clock in clocks.items()},
        "cpu seconds": {name: medians(clock, "cpu") for name, clock in clocks.items()},
        "ratio to product": {n: ratios(clocks[n], clocks["product"]) for n in clocks if n != "product"},
        "cpu ratio to product": {n: ratios(clocks[n], clocks["product"], "cpu") for n in clocks if n != "product"},
        "identical with and without piloting": same,
    }


def _forward(path: Path) -> Callable[[Clock], Any]:
    @torch.no_grad()
    def run(clock: Clock) -> None:
        with clock.stage("evaluation"):
            with clock.stage("backbone"):
                maps = path.backbone()
            with clock.stage("pixel decoder"):
                pixels = path.pixel_decoder(maps)
            with clock.stage("decoder and last masks"):
                path.final(pixels)

    return run


def piloting_overhead(setting: Setting, repeats: int) -> dict[str, Any]:
    """What one piloted group in every layer adds to our own Mask2Former's step: CPU seconds of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _, plain = build(setting, MASK2FORMER, draw(setting.config.model, setting.batch, 0, shared=True))
        _, piloted = build(setting, PILOTED, draw(setting.config.model, setting.batch, 0, shared=True))
        plain.drawn = piloted.drawn = None
        clocks = interleaved({"off": _step(plain), "on": _step(piloted)}, repeats)
    finally:
        torch.set_num_threads(threads)
    pairs = [on.cpu[STEP] / off.cpu[STEP] - 1 for on, off in zip(clocks["on"], clocks["off"], strict=True)]
    error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
    return {
        "repeats": repeats,
        "cpu seconds": {name: medians(clock, "cpu") for name, clock in clocks.items()},
        "overhead": statistics.median(pairs),
        "overhead, mean": statistics.mean(pairs),
        "standard error of the mean": error,
    }


def profiled(setting: Setting) -> dict[str, Any]:
    """Where the product's training step spends its time, with and without mask piloting; own points, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {}
        for name, toggles in (("Mask2Former", MASK2FORMER), ("MP-Former", PILOTED)):
            _, product = build(setting, toggles, draw(setting.config.model, setting.batch, 0, shared=True))
            product.drawn = None
            found[name] = operators.shares(product)
    finally:
        torch.set_num_threads(threads)
    return {"repeats": 3, "shares": found}


def shares(result: Mapping[str, Any]) -> dict[str, float]:
    """Matching and assignments as shares of the product's step as it runs."""
    seconds = result["cpu seconds"]["product, own points"]
    total = seconds[STEP]
    return {
        "matching": (seconds["matching"] - seconds["assignments"]) / total,
        "assignments": seconds["assignments"] / total,
    }


def floor(result: Mapping[str, Any], rate: float) -> dict[str, float]:
    """CPU seconds of the product's matrix products and convolutions at ``rate`` operations a CPU second."""
    counted = result["GFLOP of the product"]
    groups = {"backbone": BACKBONE, "pixel decoder": PIXELS, "decoder + matching + losses": DECODING}
    found = {name: sum(counted[stage] for stage in stages) * 1e9 / rate for name, stages in groups.items()}
    return found | {STEP: sum(found.values())}


def growth_along(axis: str, repeats: int) -> dict[str, Any]:
    """See :func:`benchmarks.growth.along`; one thread, so that CPU seconds mean what they say."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"repeats": repeats, "points": growth.along(axis, repeats)}
    finally:
        torch.set_num_threads(threads)
