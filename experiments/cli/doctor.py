"""``mpformer doctor``: one screen that says what is here, what is in use, and what to do about what is missing.

Everything that imports torch happens in a process of its own, the trial of two training iterations included: a broken
installation is then a line on the screen, not a crash of the doctor.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.launch import machine as hardware
from experiments.status import slurm_client
from experiments.status.slurm_client import SlurmError
from experiments.store.files import read_json
from experiments.tracking import sync

OK: Literal["ok"] = "ok"
NOTE: Literal["note"] = "note"
MISSING: Literal["missing"] = "missing"

_MARKS = {OK: "[green]✓[/]", NOTE: "[yellow]•[/]", MISSING: "[red]✗[/]"}

SETUP = "run `make setup`"

TRIAL_SECONDS = 300
"""Longest that the trial may take; it needs some seconds."""

LOW_DISK_GIB = 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the screen. ``note``: worth knowing, works without; ``missing``: needed."""

    name: str
    level: Literal["ok", "note", "missing"]
    detail: str
    advice: str = ""


def run(*, root: Path, data_root: Path, as_json: bool = False) -> int:
    """Print the findings; returns 1 if something needed is missing, else 0."""
    from rich.console import Console

    with Console(stderr=True, quiet=as_json).status("looking around, then training two iterations ..."):
        found = list(examine(root, data_root))
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        _show(found)
    return int(any(finding.level == MISSING for finding in found))


def examine(root: Path, data_root: Path) -> Iterator[Finding]:
    """Yield every finding, the quick ones first."""
    yield python()
    yield packages()
    yield detectron2()
    yield machine()
    yield slurm()
    yield mlflow(sync.default_uri(root))
    yield from datasets(data_root)
    yield writable("run store", root, "--root")
    yield writable("data root", data_root, "--data-root")
    yield disk(root)
    yield from trial()


def _show(found: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found:
        advice = f"\n[cyan]→ {escape(finding.advice)}[/]" if finding.advice else ""
        table.add_row(_MARKS[finding.level], finding.name, escape(finding.detail) + advice)
    console.print(table)
    missing = [finding.name for finding in found if finding.level == MISSING]
    console.print(
        f"[red]needed and missing: {', '.join(missing)}[/]" if missing else "[green]everything needed is here[/]"
    )


# --- what is installed --------------------------------------------------------------------------------------------


def python() -> Finding:
    """The interpreter and its environment."""
    detail = f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}"
    return Finding("Python", OK, detail)


NEEDED = ("torch", "torchvision", "numpy", "scipy", "pyarrow", "pycocotools", "submitit", "mlflow")


def packages() -> Finding:
    """The packages that results depend on; panopticapi goes by two distribution names."""
    found = {name: version(name) for name in NEEDED}
    found["panopticapi"] = version("panopticapi-lite") or version("panopticapi")
    absent = [name for name, number in found.items() if not number]
    detail = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    if absent:
        return Finding("packages", MISSING, f"{detail}; not installed: {', '.join(absent)}", SETUP)
    if tuple(map(int, found["numpy"].split(".")[:2])) >= (2, 3):
        return Finding("packages", NOTE, detail, "numpy >= 2.3 breaks cityscapesscripts: pip install 'numpy<2.3'")
    return Finding("packages", OK, detail)


def version(name: str) -> str:
    """Return the installed version of a distribution, or nothing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def detectron2() -> Finding:
    """Which of the two routes detectron2 came by."""
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        advice = f"{SETUP}, or `make setup DETECTRON2=git` for upstream's git"
        return Finding("detectron2", MISSING, "not installed", advice)
    where = Path(spec.origin).parent
    if number := version("sal-detectron2"):
        return Finding("detectron2", OK, f"the registry's redistribution, sal-detectron2 {number}, {where}")
    return Finding("detectron2", OK, f"upstream {version('detectron2') or 'of unknown version'}, {where}")


# --- where it runs ------------------------------------------------------------------------------------------------


def machine() -> Finding:
    """Processors and memory as a launch sees them."""
    width = hardware.fit(None, 1000)
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    memory = hardware.available_gib()
    free = f"{memory:.1f} GiB of memory free" if memory != float("inf") else "unknown memory"
    return Finding(
        "machine", OK,
        f"{hardware.cores()} processors, {free}, OMP_NUM_THREADS {threads}; a launch takes {width.workers} workers",
    )  # fmt: skip


def slurm() -> Finding:
    """The Slurm client, its version, partitions and accounting."""
    if not shutil.which("sbatch"):
        advice = "suites run on this machine; on a cluster use its login node; to try: slurm/devcluster up"
        return Finding("Slurm", NOTE, "sbatch is not on the path", advice)
    absent = [name for name in ("srun", "squeue", "scontrol") if not shutil.which(name)]
    if absent:
        return Finding("Slurm", NOTE, f"sbatch is here, {', '.join(absent)} not", "install all of slurm-client")
    try:
        settings = slurm_client.settings()
        partitions = ", ".join(slurm_client.call("sinfo", "-h", "-o", "%P").split()) or "no partition"
        number = slurm_client.call("sinfo", "--version").strip().removeprefix("slurm ")
    except SlurmError:
        advice = "set SLURM_CONF (`slurm/devcluster env` prints it), or see `scontrol ping`"
        return Finding("Slurm", NOTE, "the clients are installed, but no controller answers", advice)
    storage = settings.get("AccountingStorageType", "/none")
    accounting = not storage.endswith("/none") and bool(shutil.which("sacct"))
    said = "accounting" if accounting else "no accounting (states come from files and squeue)"
    return Finding("Slurm", OK, f"{number}, partitions {partitions}, {said}")


def mlflow(uri: str) -> Finding:
    """Where MLflow's mirror goes, and whether that answers."""
    shown = sync.shown(uri)
    if uri.startswith("sqlite:"):
        path = Path(uri.removeprefix("sqlite:///"))
        said = f"{path.stat().st_size / 2**20:.1f} MiB" if path.exists() else "made at the first launch"
        return Finding("MLflow", OK, f"{shown} ({said}); look at it: mlflow ui --backend-store-uri {shown}")
    if not uri.startswith(("http:", "https:")):
        return Finding("MLflow", NOTE, f"{shown}: cannot tell whether it answers")
    try:
        with urllib.request.urlopen(f"{shown.rstrip('/')}/health", timeout=5) as answer:
            return Finding("MLflow", OK, f"{shown} answers ({answer.status})")
    except (OSError, ValueError) as error:
        advice = "runs are not affected; when it is back: mpformer mlflow sync"
        return Finding("MLflow", NOTE, f"{shown} does not answer: {error}", advice)


# --- data and disk ------------------------------------------------------------------------------------------------


def datasets(data_root: Path) -> Iterator[Finding]:
    """What is under the data root; checksums are `mpformer data check`'s business."""
    from mpformer.config.datasets import DATASETS
    from mpformer.data.sources import Prepared, source_of

    sources = {name: source_of(name) for name in DATASETS}
    releases = {name: data_root / DATASETS[name].folder for name in DATASETS if not isinstance(sources[name], Prepared)}
    for name, source in ((name, source) for name, source in sources.items() if isinstance(source, Prepared)):
        command = source.command + (" (a launch does it too)" if source.fingerprint is not None else "")
        manifests = [read_json(path) for path in sorted((data_root / name).glob("*/manifest.json"))]
        sound = [content for content in manifests if isinstance(content, dict)]
        listed = "; ".join(f"{item.get('fingerprint', '')[:12]}: {_images(item)}" for item in sound)
        if len(sound) < len(manifests):
            yield Finding(name, NOTE, f"{listed} a damaged manifest".strip(), f"mpformer data check {name}")
        else:
            yield Finding(name, OK, listed) if sound else Finding(name, NOTE, f"not under {data_root}", command)
    there = [name for name, folder in releases.items() if folder.is_dir()]
    absent = [f"{name} ({folder})" for name, folder in releases.items() if name not in there]
    advice = f"only for scale paper: put {', '.join(absent)}" if absent else ""
    yield Finding("releases", NOTE if absent else OK, f"found: {', '.join(there) or 'none'}", advice)


def _images(manifest: dict[str, Any]) -> str:
    splits = manifest.get("splits") or {}
    return ", ".join(f"{about.get('images')} {split}" for split, about in splits.items())


def writable(what: str, path: Path, option: str) -> Finding:
    """Whether a file can be made under a directory, which need not exist yet."""
    folder = _existing(path)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".mpformer-doctor-"):
            pass
    except OSError as error:
        return Finding(what, MISSING, f"{path}: {error.strerror}", f"make it writable, or choose another with {option}")
    return Finding(what, OK, f"{path.resolve()}, writable{'' if folder == path else ' (made when needed)'}")


def disk(root: Path) -> Finding:
    """Free space under the run store."""
    free = shutil.disk_usage(_existing(root)).free / 2**30
    detail = f"{free:.1f} GiB free under the run store"
    return Finding("disk", OK, detail) if free >= LOW_DISK_GIB else Finding("disk", NOTE, detail, "free some space")


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.resolve().parents) if folder.exists())


# --- the trial ----------------------------------------------------------------------------------------------------


def trial() -> Iterator[Finding]:
    """Train two iterations of a tiny model on tiny images; what torch says of the machine comes with it."""
    with tempfile.TemporaryDirectory(prefix="mpformer-doctor-") as folder:
        code = "import sys; from experiments.cli import doctor; doctor.try_out(sys.argv[1])"
        command = [sys.executable, "-c", code, folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_SECONDS)
        except subprocess.TimeoutExpired:
            took = f"two iterations took more than {TRIAL_SECONDS} s"
            yield Finding("training", MISSING, took, "is the machine busy?")
            return
        torch, trained = (read_json(Path(folder, name)) for name in ("torch.json", "trained.json"))
        yield from _trial_findings(done, torch, trained)


def _trial_findings(
    done: "subprocess.CompletedProcess[str]", torch: dict[str, Any] | None, trained: dict[str, Any] | None
) -> Iterator[Finding]:
    if torch:
        gpus, slow = torch["gpus"], torch["kernel"] == "grid_sample"
        yield Finding("GPU", OK if gpus else NOTE, ", ".join(gpus) or f"none (torch {torch['torch']})")
        advice = f"same numbers, slower than the package's kernel for GPUs; for that: {SETUP}" if slow else ""
        kernel = f"{torch['kernel']}, {torch['threads']} threads"
        yield Finding("deformable attention", NOTE if slow else OK, kernel, advice)
    if done.returncode == 0 and trained:
        each = f"{trained['iterations']} iterations in {trained['seconds']:.1f} s, loss {trained['loss']:.1f}"
        yield Finding("training", OK, f"{each}, {trained['peak_memory_bytes'] / 2**20:.0f} MiB")
        return
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit code {done.returncode}")
    yield Finding("training", MISSING, last.strip()[:300], f"{SETUP}; if that does not help, report this line")


def try_out(folder: str) -> None:
    """The trial itself, in its own process; leaves ``torch.json`` and ``trained.json`` in ``folder``."""
    import torch

    from mpformer.modeling.deformable_attention import kernel_name

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    about = {
        "torch": torch.__version__,
        "gpus": names,
        "kernel": kernel_name("cuda" if names else "cpu"),
        "threads": torch.get_num_threads(),
    }
    Path(folder, "torch.json").write_text(json.dumps(about))
    Path(folder, "trained.json").write_text(json.dumps(_train(Path(folder))))


def _train(folder: Path) -> dict[str, Any]:
    from experiments.suites import scales
    from mpformer.data.prepare import prepare
    from mpformer.data.prepared import resolve
    from mpformer.runtime.callbacks import TrainCallbacks
    from mpformer.training.trainer import train

    config = scales.base("mini", "shapes").replace(_TINY)
    prepare(config.dataset, folder / "datasets", workers=1)
    losses: list[float] = []
    callbacks = TrainCallbacks(progress=lambda beat: losses.append(beat["loss"]))
    started = time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):
        trained = train(resolve(config, folder / "datasets"), folder / "run", folder / "datasets", callbacks)
    needed = {name: trained[name] for name in ("iterations", "peak_memory_bytes")}
    return {**needed, "seconds": time.monotonic() - started, "loss": losses[-1]}


_TINY: dict[str, Any] = {
    "dataset.shapes.side": 64,
    "dataset.shapes.train_images": 4,
    "dataset.shapes.val_images": 1,
    "model.queries": 8,
    "schedule.max_iter": 2,
    "schedule.batch_size": 2,
    "schedule.warmup_iters": 0,
    "toggles.mp_queries": True,
    "toggles.point_noise": 0.2,
    "toggles.flip_noise": 0.2,
    "runtime.eval_period": 0,
    "runtime.threads": 1,
}
