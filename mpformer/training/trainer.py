"""The trainer: detectron2's loop and hooks, with named random streams, exact resume and clear failures.

One iteration is one optimiser step on ``schedule.batch_size`` images, however many processes and
micro-batches share them. Everything that iteration i draws comes from streams named by i, so that a
run killed at any moment continues from its last checkpoint to bit-identical weights on CPUs (same threads, world
size and kernels), and to weights that differ by the order of some sums on GPUs.
"""

import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from detectron2.engine.train_loop import HookBase, TrainerBase
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mpformer.config.classes import class_table
from mpformer.config.schema import Config
from mpformer.data.loader import TrainBatches, train_batches
from mpformer.modeling.deformable_attention import kernel_name, require_kernel
from mpformer.modeling.meta_arch import MPFormer, build_model
from mpformer.modeling.resnet import FoldedConv2d
from mpformer.modeling.weights import ClassNames, load_weights, local_path
from mpformer.runtime import distributed, random_streams
from mpformer.runtime.callbacks import Interrupted, TrainCallbacks
from mpformer.runtime.disk import disk_failures, sha256
from mpformer.runtime.errors import RunFailure, UserError
from mpformer.runtime.process import kernel_settings, peak_memory, prepare_process
from mpformer.runtime.rank import Rank
from mpformer.runtime.signals import handled
from mpformer.training import accumulation, checkpoints, optimisation
from mpformer.training.accumulation import MicroBatch
from mpformer.training.prefetch import prefetched
from mpformer.training.probes import Prober

__all__ = ["Interrupted", "TrainCallbacks", "train"]

_log = logging.getLogger(__name__)
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SCHEMA = 1
_NORM = "norm of the gradient"
#: iterations between two agreements of several processes on whether to stop
_AGREE_EVERY = 10


def train(config: Config, directory: Path, data_root: Path, callbacks: TrainCallbacks | None = None) -> dict[str, Any]:
    """Train one run in `directory`, resuming from its ``checkpoints/``; returns the content of ``trained.json``.

    Raises:
        Interrupted: ``callbacks.stop`` gave a reason, or Ctrl-C; a checkpoint was written first.
        RunFailure: ``nan``, ``disk``, ``oom`` or ``data``; the last sound checkpoint is kept.
    """
    callbacks = callbacks or TrainCallbacks()
    if config.schedule.evaluation_only:
        return _untrained(config, directory, callbacks)
    how = config.runtime
    device = prepare_process(how.device, how.threads, deterministic=how.deterministic, tf32=how.tf32)
    require_kernel(device, how.slow_attention)
    _say_if_slow(config, device)
    with distributed.process_group(device) as rank, _failures():
        trainer = Trainer(config, directory, data_root, _main_only(callbacks, rank), device, rank)
        _check_normalisation(config, trainer.core, rank.world_size)
        start = trainer.resume()
        with _deferred_interrupt(trainer):
            trainer.train(start, config.schedule.max_iter)
        return trainer.finish()


def _untrained(config: Config, directory: Path, callbacks: TrainCallbacks) -> dict[str, Any]:
    """Keep the initial weights as the final ones: a released model that is only scored."""
    if not config.model.init_weights:
        raise UserError("schedule.evaluation_only scores model.init_weights: give the file of a whole model there")
    with _failures():
        state = initial_model(config).state_dict()
        path, checksum = checkpoints.Checkpoints(directory / "checkpoints", callbacks.confirm).finish(state)
    return {
        "schema": 1,
        "iterations": 0,
        "seconds": 0.0,
        "weights": str(path.relative_to(directory)),
        "weights_sha256": checksum,
    }


class Trainer(TrainerBase):
    """detectron2's loop over our step; the hooks do schedule, log, probe, checkpoint and stop, in that order."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        data_root: Path,
        callbacks: TrainCallbacks,
        device: torch.device,
        rank: Rank,
    ) -> None:
        super().__init__()
        self.config, self.directory, self.data_root = config, directory, data_root
        self.device, self.rank = device, rank
        self.core = initial_model(config).to(device).train()
        if config.schedule.amp != "off":  # what half precision's convolutions are fastest in
            self.core.to(memory_format=torch.channels_last)
        self.optimizer = optimisation.optimizer(self.core, config.schedule)
        self.scheduler = optimisation.scheduler(self.optimizer, config.schedule)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.schedule.amp == "fp16")
        self.model = self._parallel(self.core)
        self.checkpoints = checkpoints.Checkpoints(directory / "checkpoints", callbacks.confirm)
        self.prober = Prober(config, directory, data_root)
        self.meter = Meter()
        self.batches: TrainBatches  # from `resume` on
        self.parts: Iterator[MicroBatch]  # of these batches, on the device
        self.interrupted: str | None = None
        self.seconds = 0.0
        self.register_hooks([_Schedule(), _Log(callbacks), _Probe(callbacks), _Save(), _Stop(callbacks)])

    def _parallel(self, model: nn.Module) -> nn.Module:
        model = torch.compile(model) if self.config.runtime.compile else model  # type: ignore[assignment]
        if self.rank.world_size == 1:
            return model
        return DistributedDataParallel(model, **self._parallel_settings)

    @property
    def _parallel_settings(self) -> dict[str, Any]:
        """Every parameter takes part in every step, with objects or without; only BN's statistics change by rank."""
        live = _live_norm(self.core) == "BN"
        return {"find_unused_parameters": False, "gradient_as_bucket_view": True, "broadcast_buffers": live}

    def resume(self) -> int:
        """Load the newest sound checkpoint, cut the metrics back to it, and return its iteration (0: none)."""
        found = self.checkpoints.load()
        start = found[0] if found else 0
        if found:
            self.restore(found[1])
        if self.rank.main:
            checkpoints.cut_back(self.directory / "metrics.jsonl", start)
            self.prober.cut_back(start)
        pinned = self.device.type == "cuda"
        self.batches = train_batches(self.config, self.data_root, start, self.rank.number, self.rank.world_size, pinned)
        self.parts = prefetched(accumulation.micro_batches(self.batches, self.config), self.device)
        return start

    def snapshot(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        return {
            "schema": _SCHEMA,
            "model": self.core.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.state_dict(),
            "prober": self.prober.state_dict(),
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set everything from a snapshot."""
        if state.get("schema") != _SCHEMA:
            raise UserError(
                f"checkpoint schema {state.get('schema')} is not {_SCHEMA}: void the run and train it again"
            )
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = True  # a checkpoint of an earlier version says otherwise
        for name in ("optimizer", "scheduler", "scaler", "meter", "prober"):
            getattr(self, name).load_state_dict(state[name])
        self.core.load_state_dict(state["model"])
        self.seconds = state["seconds"]

    def run_step(self) -> None:
        """One optimiser step: micro-batches weighted to equal the whole batch, clipped, stepped.

        Nothing here waits for the device: the losses are read when they are logged, and a step whose loss or gradient
        is no number is left out by the device itself.
        """
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for part in self.parts:
            parts.append(self._backward(part))
            if part.last:
                break
        names, losses = parts[0][0], torch.stack([values for _, values in parts]).sum(0)
        self.scaler.unscale_(self.optimizer)
        norm = optimisation.clip(self.optimizer, self.config.schedule.clip_norm)
        self._update(norm)
        elapsed = time.perf_counter() - began
        self.seconds += elapsed
        if not self.scaler.is_enabled():  # which finds its scale by gradients that overflow
            names, losses = [*names, _NORM], torch.cat([losses, norm[None]])
        self.meter.add(self.done, names, losses, elapsed)

    def _backward(self, part: MicroBatch) -> tuple[list[str], torch.Tensor]:
        """Forward and backward of one micro-batch; returns names and values of its share of each loss.

        A total that is no number makes every gradient none, whatever the graph would make of it.
        """
        waits = isinstance(self.model, DistributedDataParallel) and not part.last
        noise, points = self._stream("noise", part.slot), self._stream("points", part.slot)
        with self.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with self._autocast():
                losses = self.model(part.batch, noise=noise, points=points)
            weighted = part.share.weigh(losses)
            values = torch.stack(list(weighted.values()))
            total = values.sum()
            upstream = torch.where(total.detach().isfinite(), 1.0, math.nan)
            self.scaler.scale(total).backward(upstream)
        return list(weighted), values.detach()

    def _update(self, norm: torch.Tensor) -> None:
        """Step the optimiser, but not where the gradient's norm () is no number; only a CPU is asked whether it is."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return
        if self.device.type != "cpu":  # AdamW's fused kernel reads it, as the scaler relies on
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        elif not norm.isfinite():
            return
        self.optimizer.step()

    def _autocast(self) -> Any:
        dtype = _AUTOCAST.get(self.config.schedule.amp)
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()

    def _stream(self, purpose: random_streams.Purpose, slot: int) -> torch.Generator:
        """The named stream of this iteration and micro-batch; stochastic depth follows the noise stream too."""
        slot += self.rank.number * self.config.runtime.accumulation
        if purpose == "noise":
            torch.manual_seed(
                random_streams.generator(self.config.seed, "noise", self.iter, slot=slot + 2**20).initial_seed()
            )
        return random_streams.generator(self.config.seed, purpose, self.iter, self.device, slot)

    @property
    def done(self) -> int:
        """Optimiser steps completed, counting the present one in ``after_step``."""
        return self.iter + 1

    @property
    def ends(self) -> bool:
        """True in the last iteration."""
        return self.done >= self.config.schedule.max_iter

    def save(self) -> None:
        """Write a checkpoint of the state after the present iteration (main process only); RunFailure for a NaN."""
        self.meter.read()
        if self.rank.main:
            self.checkpoints.save(self.done, self.snapshot())
        distributed.barrier()

    def finish(self) -> dict[str, Any]:
        """Write the final weights and return the content of ``trained.json``."""
        path, checksum = self.directory / "checkpoints" / checkpoints.FINAL, ""
        if self.rank.main:
            path, checksum = self.checkpoints.finish(self.core.state_dict())
        distributed.barrier()
        return {
            "schema": 1,
            "iterations": self.config.schedule.max_iter,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": peak_memory(self.device),
            "weights": str(path.relative_to(self.directory)),
            "weights_sha256": checksum,
            "world_size": self.rank.world_size,
            "accumulation": self.config.runtime.accumulation,
            "threads": self.config.runtime.threads,
            "device": str(self.device),
            "numerics": self.numerics(),
            # with dataset.on_corrupt: skip, since the last start
            "skipped_images": len(self.batches.skipped),
        }

    def numerics(self) -> dict[str, str | bool]:
        """How the run computes, a line each: what may change its numbers by rounding, or its speed, but not its id."""
        found = kernel_settings(self.device)
        found["deformable attention"] = kernel_name(self.device.type)
        found["precision"] = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.config.schedule.amp]
        found["channels last"] = self.config.schedule.amp != "off"
        found["compiled"] = self.config.runtime.compile
        found["fused optimiser"] = bool(self.optimizer.defaults.get("fused"))
        if any(isinstance(module, FoldedConv2d) for module in self.core.modules()):
            found["frozen normalisation"] = "folded when weights are loaded"
        if self.rank.world_size > 1:
            found |= {name.replace("_", " "): value for name, value in self._parallel_settings.items()}
        return found


class Meter:
    """Means of the losses since the last logged line; part of the checkpoint, so that resuming logs the same lines.

    What is added stays on the device until it is read, all iterations in one copy.
    """

    def __init__(self) -> None:
        self._unread: list[torch.Tensor] = []
        self._names: list[str] = []
        self._iteration = 0
        self.clear()

    def add(self, iteration: int, names: list[str], values: torch.Tensor, seconds: float) -> None:
        """Take one iteration's values, losses by layer and whatever else must be finite, and its wall time."""
        self._iteration, self._names = iteration, names
        self._unread.append(values)
        self._count += 1
        self._seconds += seconds

    def read(self) -> None:
        """Read what was added, as means over the processes; RunFailure names the first iteration that is no number."""
        if not self._unread:
            return
        lines = distributed.mean(torch.stack(self._unread)).cpu().tolist()
        self._unread.clear()
        for iteration, line in enumerate(lines, start=self._iteration - len(lines) + 1):
            values = dict(zip(self._names, line, strict=True))
            norm = values.pop(_NORM, 0.0)
            losses = accumulation.summed(values)
            _check_finite(iteration, losses, norm)
            for name, value in losses.items():
                self._sums[name] = self._sums.get(name, 0.0) + value

    @property
    def pace(self) -> float:
        """Seconds an iteration."""
        return self._seconds / max(self._count, 1)

    def line(self) -> dict[str, float]:
        """Return the means as ``loss`` (their total), ``loss_ce``, … and ``seconds`` an iteration."""
        self.read()
        means = {name: value / max(self._count, 1) for name, value in self._sums.items()}
        return {"loss": sum(means.values()), **means, "seconds": self.pace}

    def clear(self) -> None:
        """Start the next line."""
        self._sums: dict[str, float] = {}
        self._count, self._seconds = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for the checkpoint."""
        self.read()
        return {"sums": dict(self._sums), "count": self._count, "seconds": self._seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._sums, self._count, self._seconds = dict(state["sums"]), state["count"], state["seconds"]


def _check_finite(iteration: int, losses: Mapping[str, float], norm: float) -> None:
    bad = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
    if not bad and not math.isfinite(norm):
        bad = [f"{_NORM} = {norm}"]
    if bad:
        advice = "lower schedule.base_lr, or turn schedule.amp off"
        raise RunFailure("nan", f"non-finite loss at iteration {iteration}: {', '.join(bad)}; {advice}")


class _Hook(HookBase):
    trainer: Trainer


class _Schedule(_Hook):
    """Steps the learning rate after each iteration, keeping the rate that was used for the log."""

    def after_step(self) -> None:
        self.trainer.used_rate = optimisation.rates(self.trainer.optimizer)
        self.trainer.scheduler.step()


class _Log(_Hook):
    """A metrics line every ``log_period`` iterations and at the end; a heartbeat every iteration."""

    def __init__(self, callbacks: TrainCallbacks) -> None:
        self._callbacks = callbacks
        self._loss: float | None = None

    def after_step(self) -> None:
        t = self.trainer
        due = t.done % t.config.runtime.log_period == 0 or t.ends
        left = (t.max_iter - t.done) * t.meter.pace
        if due or t.device.type == "cpu":  # reading waits for any other device
            line = t.meter.line()
            self._loss = line["loss"]
        if due:
            self._callbacks.log({"kind": "train", "iteration": t.done, **line, **t.used_rate, "time": time.time()})
            t.meter.clear()
        self._callbacks.progress({"iteration": t.done, "max_iter": t.max_iter, "loss": self._loss, "eta_seconds": left})


class _Probe(_Hook):
    """A quick evaluation every ``eval_period`` iterations and at the end (never with period 0)."""

    def __init__(self, callbacks: TrainCallbacks) -> None:
        self._callbacks = callbacks

    def after_step(self) -> None:
        t, period = self.trainer, self.trainer.config.runtime.eval_period
        if not period or not (t.done % period == 0 or t.ends) or not t.rank.main:
            return
        metrics = t.prober.probe(t.core, t.done)
        t.core.train()
        self._callbacks.log({"kind": "evaluation", "iteration": t.done, "metrics": metrics, "time": time.time()})


class _Save(_Hook):
    """A checkpoint every ``checkpoint_period`` iterations and at the end."""

    def after_step(self) -> None:
        if self.trainer.done % self.trainer.config.runtime.checkpoint_period == 0 or self.trainer.ends:
            self.trainer.save()


class _Stop(_Hook):
    """Polls for a reason to stop; checkpoints and raises."""

    def __init__(self, callbacks: TrainCallbacks) -> None:
        self._callbacks = callbacks

    def after_step(self) -> None:
        t = self.trainer
        if t.rank.world_size > 1 and t.done % _AGREE_EVERY:
            return
        reason = distributed.agree(t.interrupted or self._callbacks.stop())
        if reason and not t.ends:
            t.save()
            raise Interrupted(reason, t.done)


def initial_model(config: Config) -> MPFormer:
    """Build the model with its initial weights: random by seed, then ``model.init_weights`` where given."""
    model = build_model(config)
    if config.model.init_weights:
        path = local_path(config.model.init_weights)
        if config.model.init_checksum and sha256(path) != config.model.init_checksum:
            raise UserError(f"initial weights {path.name} differ from model.init_checksum: another file was planned")
        load_initial(model, config, path)
    return model


def load_initial(model: nn.Module, config: Config, path: Path) -> None:
    """Load initial weights as the configuration says: a whole model or a backbone, their class head or a new one.

    Raises UserError if it does not fit.
    """
    classes = None
    if config.model.reinit_class_head:
        theirs = class_table(*config.model.init_classes.split("/")).names if config.model.init_classes else ()
        classes = ClassNames(theirs, class_table(config.dataset.name, config.dataset.task).names)
    load_weights(model, path, new_classes=classes, allow_backbone=not config.schedule.evaluation_only)


def _live_norm(model: MPFormer) -> str:
    """The backbone's batch normalisation that takes its statistics from the batch: BN, SyncBN, or none."""
    norms = [module for module in model.backbone.modules() if isinstance(module, _BatchNorm) and module.training]
    if not norms:
        return ""
    return "SyncBN" if all(isinstance(norm, nn.SyncBatchNorm) for norm in norms) else "BN"


def _check_normalisation(config: Config, model: MPFormer, processes: int) -> None:
    """Say where a live batch normalisation sees fewer images at a time than the effective batch."""
    norm = _live_norm(model)
    parts = config.runtime.accumulation * (processes if norm == "BN" else 1)
    if norm and parts > 1:
        _log.warning(
            "the backbone's %s sees a batch of %d in %d parts: the same run id, not the same numbers as undivided",
            norm,
            config.schedule.batch_size,
            parts,
        )


def _say_if_slow(config: Config, device: torch.device) -> None:
    """bf16 is part of the run id, so a CPU without an instruction for it computes in it all the same."""
    if device.type == "cpu" and config.schedule.amp == "bf16" and not torch.cpu.get_capabilities().get("amx_bf16"):
        _log.warning("schedule.amp=bf16 is computed in bfloat16, on this processor without AMX slower than float32")


def _main_only(callbacks: TrainCallbacks, rank: Rank) -> TrainCallbacks:
    return callbacks if rank.main else replace(TrainCallbacks(), stop=callbacks.stop)


@contextmanager
def _deferred_interrupt(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C finish the iteration and checkpoint; a second one kills at once (only in the main thread)."""

    def note(*_: Any) -> None:
        if trainer.interrupted:
            raise KeyboardInterrupt
        trainer.interrupted = "Ctrl-C"

    with handled({signal.SIGINT: note}):
        yield


@contextmanager
def _failures() -> Iterator[None]:
    """Name what ends a training: out of memory and a failing disk become RunFailure; the loop's traceback is kept out
    of the log where one line says it all."""
    loop = logging.getLogger("detectron2.engine.train_loop")
    loop.addFilter(_unexpected)
    try:
        with disk_failures(Path("the run directory")):
            yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise RunFailure("oom", _oom(error)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise RunFailure("oom", _oom(error)) from error
    finally:
        loop.removeFilter(_unexpected)


def _oom(error: BaseException) -> str:
    return f"out of memory ({str(error).splitlines()[0][:120]}); raise runtime.accumulation: same run id, less memory"


def _unexpected(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], (Interrupted, RunFailure)))
