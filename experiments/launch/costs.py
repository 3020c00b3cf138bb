"""What runs are going to cost, from measured seconds or a declared figure.

A measured figure counts for what it was measured on: runs of the same model, data, toggles, batch and threads, under
the same profile, or under another one with as many processes on the same kind of device, and then says which. Smoke
runs count too. Everything else is a declared figure (:mod:`experiments.suites.scales`), and is labelled so. What runs
did cost is in :mod:`experiments.status.usage`.
"""

import functools
import heapq
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from experiments.launch import machine, profiles, smoke
from experiments.launch.profiles import LocalProfile, SlurmProfile
from experiments.status.tables import duration
from experiments.store.identity import canonical
from experiments.store.launches import launch_dir
from experiments.store.run_dir import RESULT, RunDir, Store, Trained
from experiments.suites import scales
from experiments.suites.planning import Plan
from mpformer.config.schema import Config, plain
from mpformer.runtime.errors import UserError

SAMPLE = 3
"""Runs of a kind whose files are counted: they are all alike."""

CHECKPOINT = 3
"""Size of a checkpoint in weights: AdamW keeps two numbers for each. Two are kept while a run trains."""


@dataclass(frozen=True)
class Capacity:
    """Where runs are to execute, as far as it matters for what they cost."""

    profile: str
    device: str
    """``cuda`` or ``cpu``."""
    processes: int
    """Of one run."""
    gpus: int
    """Of one run, over all its nodes."""
    cpus: int
    width: int
    """Runs at a time."""


@dataclass(frozen=True)
class Disk:
    """What a run leaves on disk, and whether that was measured."""

    files: int
    bytes: int
    weights: int
    """Bytes of the weights alone."""
    source: str


@dataclass(frozen=True)
class Estimate:
    """Expected cost of one run: seconds of one job, and what it leaves; each with its source."""

    seconds: float
    source: str
    disk: Disk
    memory: int | None = None
    """Largest memory of a process in bytes, as measured; None if it was not."""
    memory_source: str = ""


@dataclass(frozen=True)
class Cost:
    """Expected cost of the runs of a plan that are left to do."""

    capacity: Capacity
    runs: int
    gpu_hours: float
    core_hours: float
    wall_seconds: float
    bytes: int
    peak_bytes: int
    """While they train: two checkpoints of each run at work."""
    files: int
    sources: tuple[str, ...]
    disk_sources: tuple[str, ...]
    memory: int | None = None
    """Largest memory of a process in bytes, of the runs of which it was measured."""
    memory_sources: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return it as text, each figure with its source."""
        if not self.runs:
            return ["0 runs to do"]
        where, took = self.capacity, " and ".join(self.sources)
        hours = f"{self.gpu_hours:.1f} GPU-hours" if where.gpus else f"{self.core_hours:.1f} core-hours"
        at_once = f"{where.width} at a time on {where.profile}"
        size = f"{self.bytes / 1e9:.2f} GB in {self.files} files, {self.peak_bytes / 1e9:.2f} GB while they train"
        lines = [
            f"{self.runs} runs to do: {hours}, about {duration(self.wall_seconds)} at {at_once} ({took})",
            f"on disk: {size} ({' and '.join(self.disk_sources)})",
        ]
        if self.memory is not None:
            lines.append(f"memory: {self.memory / 2**30:.1f} GiB a process ({' and '.join(self.memory_sources)})")
        return lines


def capacity(name: str, runs: int) -> Capacity:
    """Return where ``runs`` runs would execute under a profile; raises UserError for a profile that is not valid."""
    profile = profiles.load(name)
    if isinstance(profile, SlurmProfile):
        processes = profile.nodes * profile.tasks_per_node
        gpus = profile.nodes * profile.gpu_count
        device = "cuda" if gpus else "cpu"
        return Capacity(name, device, processes, gpus, processes * profile.cpus, min(profile.parallelism, max(runs, 1)))
    return _local(name, profile, runs)


def _local(name: str, profile: LocalProfile, runs: int) -> Capacity:
    gpus = min(1, len(machine.visible_gpus()))
    asked = None if profile.workers is None else machine.Width(profile.workers, profile.threads)
    width = machine.fit(asked, max(runs, 1)).workers
    return Capacity(name, "cuda" if gpus else "cpu", 1, gpus, profile.threads, width)


@dataclass(frozen=True)
class _Sample:
    """What one finished run measured."""

    profile: str
    device: str
    processes: int
    iteration: float | None
    """Seconds an iteration."""
    image: float | None
    """Seconds an evaluated image."""
    memory: float | None = None
    """Largest memory of a process in bytes: of a GPU, where there is one."""


def estimates(plan: Plan, store: Store, where: Capacity) -> dict[str, Estimate]:
    """Return the expected cost of each of the plan's runs where they are to execute."""
    measured, finished = _survey(store)
    disks: dict[str, Disk] = {}
    found: dict[str, Estimate] = {}
    for run in plan.unique:
        kind = _kind(run.config.model_dump(mode="json", include={"model": True, "dataset": {"name"}}))
        if kind not in disks:
            disks[kind] = _disk(finished.get(kind, ()), plan.scale)
        samples = measured.get(cost_key(run.config), ())
        found[run.run_id] = _estimate(run.config, plan, samples, disks[kind], where)
    return found


def of_plan(left: Iterable[str], expected: Mapping[str, Estimate], where: Capacity) -> Cost:
    """Return the cost of the runs ``left`` to do, in this order, ``where`` they are to be done."""
    each = [expected[run_id] for run_id in left]
    hours = sum(one.seconds for one in each) / 3600
    at_work = sorted((one.disk.weights for one in each), reverse=True)[: where.width]
    size = sum(one.disk.bytes for one in each)
    return Cost(
        where,
        len(each),
        hours * where.gpus,
        hours * where.cpus,
        _wall([one.seconds for one in each], where.width),
        size,
        size + 2 * CHECKPOINT * sum(at_work),
        sum(one.disk.files for one in each),
        tuple(sorted({one.source for one in each})),
        tuple(sorted({one.disk.source for one in each})),
        max((one.memory for one in each if one.memory is not None), default=None),
        tuple(sorted({one.memory_source for one in each if one.memory is not None})),
    )


def _wall(seconds: Sequence[float], width: int) -> float:
    """The time until the last of the runs is over if ``width`` at a time are worked on, in their order."""
    ends = [0.0] * max(1, min(width, len(seconds)))
    for one in seconds:
        heapq.heappush(ends, heapq.heappop(ends) + one)
    return max(ends)


def _estimate(config: Config, plan: Plan, samples: Sequence[_Sample], disk: Disk, where: Capacity) -> Estimate:
    per_iteration, per_image = scales.declared_seconds(plan.scale, plan.dataset)
    iteration, how = _figure(samples, where, lambda sample: sample.iteration, per_iteration)
    image, how_image = _figure(samples, where, lambda sample: sample.image, per_image)
    memory, how_memory = _figure(samples, where, lambda sample: sample.memory, 0.0)
    known = (round(memory), how_memory) if memory else (None, "")
    scoring = image * (config.evaluation.val_images or scales.val_images(config.dataset))
    trains = not config.schedule.evaluation_only
    seconds = scoring + (config.schedule.max_iter * iteration if trains else 0)
    source = how if trains else how_image
    if how_image == "declared" != source:
        source += ", scoring declared"
    return Estimate(seconds, source, disk, *known)


def _figure(
    samples: Sequence[_Sample], where: Capacity, value: Callable[[_Sample], float | None], declared: float
) -> tuple[float, str]:
    """The median of what was measured under the profile, else on the like of it, else the declared figure."""
    alike = [one for one in samples if (one.device, one.processes) == (where.device, where.processes)]
    for profile in dict.fromkeys([where.profile, *(one.profile for one in alike)]):
        found = [value(one) for one in alike if one.profile == profile]
        if measured := [one for one in found if one is not None]:
            return median(measured), "measured" if profile == where.profile else f"measured on {profile}"
    return declared, "declared"


def cost_key(config: Config) -> str:
    """Return what seconds per iteration depend on: everything but the seed, the length and the learning rates."""
    tree = {"model": plain(config.model), "dataset": plain(config.dataset), "toggles": plain(config.toggles)}
    return canonical({**tree, "batch": config.schedule.batch_size, "threads": config.runtime.threads})


def _survey(store: Store) -> tuple[Mapping[str, Sequence[_Sample]], Mapping[str, Sequence[RunDir]]]:
    """What the trained runs of a store, and its launches' smoke runs, have measured, by cost key; and a few finished
    runs of each kind, whose files can be counted.
    """
    samples: dict[str, list[_Sample]] = {}
    runs: dict[str, list[RunDir]] = {}
    keys: dict[str, str] = {}
    for own, launch in [(store, ""), *((one, one.root.parent.name) for one in smoke.stores(store))]:
        for run in own.runs():
            trained, config = run.trained(), _config(run)
            if trained is None or not config:
                continue  # a damaged run costs an estimate, not the plan
            if key := _stored_key(run, config, keys):
                samples.setdefault(key, []).append(_sample(run, trained, _profile(store, launch or _launch(run))))
            alike = runs.setdefault(_kind(config), []) if not launch else []
            if not launch and len(alike) < SAMPLE and not run.packed and _evaluated(run):
                alike.append(run)
    return samples, runs


def _config(run: RunDir) -> Mapping[str, Any]:
    record = run.sound_record()
    return record.config if record is not None else {}


def _stored_key(run: RunDir, config: Mapping[str, Any], known: dict[str, str]) -> str:
    """A stored run's cost key; a configuration is checked once for all runs that differ in what costs nothing."""
    schedule, runtime = config.get("schedule") or {}, config.get("runtime") or {}
    parts = [config.get(name) for name in ("model", "dataset", "toggles")]
    text = json.dumps([*parts, schedule.get("batch_size"), runtime.get("threads")], sort_keys=True)
    if text not in known:
        try:
            known[text] = cost_key(run.config())
        except UserError:
            known[text] = ""
    return known[text]


def _kind(config: Mapping[str, Any]) -> str:
    """What the size of a run's directory depends on, roughly."""
    dataset = config.get("dataset") or {}
    return json.dumps([config.get("model"), dataset.get("name")], sort_keys=True)


def _evaluated(run: RunDir) -> bool:
    return next((run.path / "evals").glob(f"*/{RESULT}"), None) is not None


def _sample(run: RunDir, trained: Trained, profile: str) -> _Sample:
    results = (run.result(name) for name in run.evaluations())
    images = [one.seconds / one.images for one in results if one and one.images and one.seconds]
    each = trained.seconds / trained.iterations if trained.seconds and trained.iterations else None
    device = (trained.device or "cpu").partition(":")[0]
    memory = trained.peak_memory_bytes or None
    return _Sample(profile, device, trained.world_size or 1, each, images[-1] if images else None, memory)


def _launch(run: RunDir) -> str:
    last = run.last_attempt()
    record = last.sound_record() if last is not None else None
    return record.launch if record is not None else ""


@functools.cache
def _profile(store: Store, launch: str) -> str:
    """The profile that a launch ran under; ``local`` for anything that was no launch."""
    record = launch_dir(store, launch).record() if launch else None
    return (record.profile if record is not None else "") or "local"


def _disk(runs: Sequence[RunDir], scale: str) -> Disk:
    """What finished runs of a kind leave, else the declared figures."""
    counted = [_count(run.path) for run in runs]
    if not counted:
        return Disk(*scales.DECLARED_DISK[scale], "declared")
    files, size, weights = (round(median(column)) for column in zip(*counted, strict=True))
    return Disk(files, size, weights, "measured")


def _count(folder: Path) -> tuple[int, int, int]:
    """Files, bytes, and bytes of the final weights."""
    sizes = [os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(folder) for name in names]
    return len(sizes), sum(sizes), sum(path.stat().st_size for path in (folder / "checkpoints").glob("final*.pth"))
