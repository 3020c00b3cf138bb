"""What ``make bench-gpu`` measures, in a process of its own: each finding is a line of JSON, written at once."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import pairwise, product, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.settings import MASK2FORMER, PILOTED, settle, standard
from mpformer.config.schema import Config, Toggles
from mpformer.data.loader import with_tensors
from mpformer.modeling.deformable_attention import kernel_name
from mpformer.modeling.meta_arch import build_model
from mpformer.runtime.callbacks import TrainCallbacks
from mpformer.runtime.process import prepare_process
from mpformer.runtime.rank import Rank
from mpformer.training import accumulation, optimisation
from mpformer.training.prefetch import prefetched
from mpformer.training.trainer import Trainer
from tests.support.paired_models import draw, make_batch
from tests.support.transformers_peer import build_peer

_WARM_UP = 3
_PROFILED = 2
_CLASSES = 80
_GIB = 2**30
_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    kind: str
    """``Mask2Former``, ``MP-Former`` or ``transformers``."""
    precision: str
    """``float32`` (on a GPU with TF32), ``fp16`` or ``bf16``."""
    batch: int
    compiled: bool = False
    deterministic: bool = False

    @property
    def what(self) -> str:
        names = {"Mask2Former": "ours, Mask2Former", "MP-Former": "ours, MP-Former", "transformers": "transformers"}
        extra = (", compiled" if self.compiled else "") + (", deterministic" if self.deterministic else "")
        return names[self.kind] + extra


def main() -> None:
    """Find what fits into the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("eager", "compiled"))
    parser.add_argument("--device", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--objects", type=int, required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    ends = time.monotonic() + options.seconds
    device = prepare_process(options.device, os.cpu_count() or 1, deterministic=True, tf32=False)

    def write(kind: str, found: dict[str, Any]) -> None:
        with options.out.open("a") as file:
            file.write(json.dumps({"kind": kind, "found": found}) + "\n")
        print(kind, found, flush=True)

    planned = list(cases(options.part, options.batches, device))
    write("plan", {"cases": [described(case) for case in planned]})
    if options.part == "eager":
        write("machine", machine(device))
        for method, toggles in (("Mask2Former", MASK2FORMER), ("MP-Former", PILOTED)):
            write("agreement", {"method": method, **agreement(toggles, device, min(options.size, 256))})
    for case in planned:
        if time.monotonic() < ends:
            write("case", {**described(case), **_measured(case, options, device)})


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: these are times of a CPU"
    return {
        "device": device.type,
        "GPU": gpu,
        "processor cores": os.cpu_count(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "deformable attention": kernel_name(device.type),
        "load before": round(os.getloadavg()[0], 2),
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def cases(part: str, batches: list[int], device: torch.device) -> Iterator[Case]:
    """The cases, those first that the table can do without least."""
    kinds = ("MP-Former", "Mask2Former", "transformers")
    precisions = ("bf16", "fp16", "float32") if device.type == "cuda" else ("float32", "bf16")
    if part == "compiled":
        yield from (Case(kind, precisions[0], batches[0], compiled=True) for kind in kinds)
        return
    for batch, precision in product(batches, precisions):
        yield from (Case(kind, precision, batch) for kind in kinds)
    if device.type == "cuda":
        yield Case("MP-Former", precisions[0], batches[0], deterministic=True)


def described(case: Case) -> dict[str, Any]:
    """The case in the words of the table."""
    return {"what": case.what, "precision": case.precision, "batch": case.batch}


# --- agreement with the CPU ---------------------------------------------------------------------------------------


def agreement(toggles: Toggles, device: torch.device, side: int) -> dict[str, Any]:
    """Losses and gradient of one step in strict float32, here and on the CPU: the same weights, points, no noise."""
    config = standard(side).with_toggles(toggles.model_copy(update={"point_noise": 0.0, "flip_noise": 0.0}))
    batch = make_batch([(side, side)] * 2, [6] * 2, _CLASSES, seed=0)
    drawn = draw(config.model, 2, 0, shared=True).product()
    losses, gradients = zip(*(_losses_and_gradient(config, batch, drawn, d) for d in ("cpu", device)), strict=True)
    furthest = max(abs(losses[1][name] - value) / max(abs(value), 1e-3) for name, value in losses[0].items())
    apart = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    other = "the GPU" if device.type == "cuda" else "the CPU again, for want of a GPU: 0 shows only that this part runs"
    return {"losses": furthest, "gradient": apart, "with": other, "agrees": furthest < 1e-3 and apart < 1e-2}


def _losses_and_gradient(
    config: Config, batch: list[dict[str, Any]], drawn: Any, device: torch.device | str
) -> tuple[dict[str, float], Tensor]:
    model = _settled(config).to(device).train()
    points = replace(drawn, **{f.name: getattr(drawn, f.name).to(device) for f in fields(drawn)})
    losses = model(batch, points=points)
    torch.stack(list(losses.values())).sum().backward()
    gradient = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
    return {name: float(value.detach()) for name, value in losses.items()}, gradient


def _settled(config: Config) -> nn.Module:
    model = build_model(config, _CLASSES, range(_CLASSES))
    model.load_state_dict(settle(model.state_dict()))
    return model


# --- steps --------------------------------------------------------------------------------------------------------


def _measured(case: Case, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds, memory and kernels of a case, or why there are none."""
    torch.compiler.reset()
    try:
        with TemporaryDirectory() as folder:
            step = _STEPS[case.kind == "transformers"](case, options, device, Path(folder))
            return _timed(step, case.batch, options.steps, device)
    except torch.OutOfMemoryError:
        return {"why": "out of memory"}
    except Exception as error:  # a case that fails is a line of the table; the others go on
        return {"why": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}"}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _ours(case: Case, options: argparse.Namespace, device: torch.device, folder: Path) -> Callable[[], Any]:
    """The trainer's own step, copies of the batch to the device, clipping and optimiser included."""
    amp = {"float32": "off"}.get(case.precision, case.precision)
    changes = {"schedule.amp": amp, "schedule.batch_size": case.batch, "runtime.compile": case.compiled,
               "runtime.log_period": 20}  # fmt: skip
    config = standard(options.size).with_toggles(PILOTED if case.kind == "MP-Former" else MASK2FORMER)
    config = config.replace(changes)
    _prepare(case, device)
    trainer = Trainer(config, folder, folder, TrainCallbacks(), device, Rank())
    trainer.core.load_state_dict(settle(trainer.core.state_dict()))
    batch = _batch(case.batch, options)
    if device.type == "cuda":
        batch = with_tensors(batch, Tensor.pin_memory)
    trainer.parts = prefetched(accumulation.micro_batches(repeat(batch), config), device)
    trainer.iter = 0
    return trainer.run_step


def _theirs(case: Case, options: argparse.Namespace, device: torch.device, _: Path) -> Callable[[], Any]:
    """transformers' Mask2Former with the same optimiser; its batch lies on the device beforehand."""
    config = standard(options.size).config
    _prepare(case, device)
    model: torch.nn.Module = build_peer(config.model, _CLASSES)
    model.to(device)
    if case.precision != "float32":
        model.to(memory_format=torch.channels_last)
    optimizer = optimisation.optimizer(model, config.schedule)
    scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "fp16")
    called = torch.compile(model) if case.compiled else model
    batch = _batch(case.batch, options)
    images = torch.stack([item["image"].float() / 255 for item in batch]).to(device)
    masks = [item["instances"].gt_masks.float().to(device) for item in batch]
    labels = [item["instances"].gt_classes.to(device) for item in batch]
    dtype = _AUTOCAST.get(case.precision)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype) if dtype else nullcontext():
            loss = called(pixel_values=images, mask_labels=masks, class_labels=labels).loss
        scaler.scale(loss.sum()).backward()
        scaler.unscale_(optimizer)
        optimisation.clip(optimizer, config.schedule.clip_norm)
        scaler.step(optimizer)
        scaler.update()

    return step


_STEPS = {False: _ours, True: _theirs}


def _prepare(case: Case, device: torch.device) -> None:
    """Kernels as a run of scale ``paper`` has them, the same for ours and theirs."""
    prepare_process(str(device), os.cpu_count() or 1, deterministic=case.deterministic, tf32=True)


def _batch(images: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    return make_batch([(options.size, options.size)] * images, [options.objects] * images, _CLASSES, seed=0)


def _timed(step: Callable[[], Any], images: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of a step, images a second over all of them, peak memory, kernels and the time between them."""
    for _ in range(_WARM_UP):
        step()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    seconds = (_seconds_by_events if on_gpu else _seconds_by_clock)(step, steps)
    whole = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) / _GIB if on_gpu else None
    return {
        "step_ms": 1000 * statistics.median(seconds),
        "steps_ms": [round(1000 * s, 2) for s in seconds],
        "images_per_second": images * steps / whole,
        "peak_gib": peak,
        **(_kernels(step) if on_gpu else {}),
    }


def _seconds_by_events(step: Callable[[], Any], steps: int) -> list[float]:
    """Between marks in the GPU's own queue, so that timing makes nobody wait."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]


def _seconds_by_clock(step: Callable[[], Any], steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return seconds


def _kernels(step: Callable[[], Any]) -> dict[str, float]:
    """Kernels, copies and fills of a step on the GPU, and the share of the time in which none of them runs."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(_PROFILED):
            step()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type.name == "CUDA"]
    on_gpu = [e for e in events if not getattr(e, "is_user_annotation", False)]  # a mark covers many kernels
    return spans([(e.time_range.start, e.time_range.end) for e in on_gpu], _PROFILED)


def spans(intervals: list[tuple[float, float]], steps: int) -> dict[str, float]:
    """Intervals a step, and the share of the whole that none of them covers."""
    ordered = sorted(intervals)
    covered, until = 0.0, ordered[0][0]
    for start, end in ordered:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return {"kernels": len(ordered) / steps, "idle": 1 - covered / max(until - ordered[0][0], 1e-9)}


if __name__ == "__main__":
    main()
