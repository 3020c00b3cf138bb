"""``make bench-gpu``: at most eight minutes on one GPU, one JSON file and one table.

Device tests, agreement with the CPU, then the training step of ours and of transformers' Mask2Former: seconds, images a
second, peak memory, kernels and the gaps between them. Each part is a process that is ended when its time is up; what
it had found by then stays, and what was not reached is listed.

On a compute node without a network: ``python3.12 benchmarks/gpu.py --wheels DIR`` needs nothing but that Python with
torch (2.11 or newer) and a folder of wheels, which ``--pack DIR --torch 2.11`` makes on a machine with a network.
``--device cpu --size 64 --batches 1 --steps 2`` goes the same way without a GPU.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_SHARES = {"tests": 0.25, "eager": 0.75, "compiled": 1.0}
"""Up to which share of the time each part may last."""
_LATE = "not reached in the time"
_GIVEN = re.compile(r"(torch|torchvision|triton|nvidia-.*|cuda-.*)(==|$)")
"""What the compute node's Python has, or what must fit its torch."""


def main() -> None:
    """Measure, or pack the wheels."""
    options = _options()
    if options.pack:
        pack(options.pack, options.torch)
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mpformer-bench-") as folder:
        place = Path(folder)
        path = [str(ROOT)]
        if options.wheels:
            path.append(str(unpack(options.wheels, place / "packages")))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        found = measure(options, environment, place, started)
    found["seconds"] = round(time.monotonic() - started)
    out = options.out or RESULTS / ("gpu.json" if found["machine"].get("device") == "cuda" else "gpu_on_cpu.json")
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{table(found)}\n\n{out}")
    sys.exit(int(not found["sound"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--size", type=int, default=1024, help="side of the images")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--objects", type=int, default=20, help="objects an image")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each case, after three that are not")
    parser.add_argument("--seconds", type=float, default=480, help="of everything together")
    parser.add_argument("--no-tests", action="store_true", help="leave the device tests out")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to run from, beside this Python's own packages")
    parser.add_argument("--pack", type=Path, help="make that folder, with this Python, and stop")
    parser.add_argument("--torch", default="", help="with --pack: the compute node's torch, such as 2.11")
    parser.add_argument("--out", type=Path, help="the JSON file; benchmarks/results/gpu.json or gpu_on_cpu.json")
    return parser.parse_args()


def measure(options: argparse.Namespace, environment: Mapping[str, str], place: Path, started: float) -> dict[str, Any]:
    """Run the parts one after the other within the time."""
    found: dict[str, Any] = {"asked": {k: v for k, v in vars(options).items() if k not in ("wheels", "pack", "out")}}
    arguments = ["--device", options.device, "--size", str(options.size), "--steps", str(options.steps)]
    arguments += ["--objects", str(options.objects), "--batches", *map(str, options.batches)]
    lines = place / "found.jsonl"
    for part, share in _SHARES.items():
        left = options.seconds * share - (time.monotonic() - started)
        if part == "tests":
            found[part] = "left out" if options.no_tests else _tests(options.device, environment, left)
            continue
        if part == "compiled" and options.no_compile:
            continue
        command = [sys.executable, "-m", "benchmarks.gpu_steps", part, *arguments]
        command += ["--seconds", f"{left:.0f}", "--out", str(lines)]
        found.setdefault("ended", {})[part] = _run(command, environment, left + 15)[0]
    found |= collected(lines)
    tests_pass = options.no_tests or found["tests"]["rc"] == 0
    agree = bool(found["agreement"]) and all(line["agrees"] for line in found["agreement"])
    found["sound"] = bool(tests_pass and agree and any("step_ms" in case for case in found["cases"]))
    return found


def _tests(device: str, environment: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """The tests marked ``gpu``."""
    named = {"MPFORMER_TEST_DEVICE": "cpu"} if device == "cpu" else {}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    began = time.monotonic()
    code, output = _run(command, {**environment, **named}, seconds)
    return {"rc": code, "said": output.strip().splitlines()[-8:], "seconds": round(time.monotonic() - began)}


def _run(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> tuple[int | str, str]:
    """Exit status, or "time was up", and what was printed, which is shown as well."""
    print(f"$ {' '.join(command[1:])}", flush=True)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=max(seconds, 1), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        print(text[-3000:], flush=True)
        return "time was up", text
    print(done.stdout[-3000:], flush=True)
    return done.returncode, done.stdout


def collected(lines: Path) -> dict[str, Any]:
    """What the measuring processes left, by kind; a planned case without a line was not reached."""
    read = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    kinds = ("machine", "agreement", "plan", "case")
    of = {kind: [line["found"] for line in read if line["kind"] == kind] for kind in kinds}
    planned = [case for plan in of["plan"] for case in plan["cases"]]
    cases = [next((c for c in of["case"] if c.items() >= case.items()), case | {"why": _LATE}) for case in planned]
    return {"machine": (of["machine"] or [{}])[0], "agreement": of["agreement"], "cases": cases}


def table(found: Mapping[str, Any]) -> str:
    """Markdown: what ran where, then a line for each case."""
    machine = found["machine"]
    head = [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    for line in found["agreement"]:
        head.append(f"Agreement with the CPU, {line['method']}: losses within {line['losses']:.1e}, "
                    f"gradient within {line['gradient']:.1e} of its length ({line['with']}).")  # fmt: skip
    head += [
        "",
        "| | precision | batch | ms a step | images/s | peak GiB | kernels a step | GPU idle |",
        "|---" * 8 + "|",
    ]
    return "\n".join([*head, *(_row(case) for case in found["cases"])])


def _row(case: Mapping[str, Any]) -> str:
    what = f"| {case['what']} | {case['precision']} | {case['batch']} | "
    if "step_ms" not in case:
        return what + f"{case['why']} | | | | |"
    cells = [f"{case['step_ms']:.0f}", f"{case['images_per_second']:.2f}", _or_dash(case["peak_gib"], ".2f")]
    cells += [_or_dash(case.get("kernels"), ",.0f"), _or_dash(case.get("idle"), ".0%")]
    return what + " | ".join(cells) + " |"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def unpack(folder: Path, target: Path) -> Path:
    """Unpack the wheels of a folder, but for what this Python has; a wheel is an archive of what goes on the path.

    There it comes before Python's own library, which old stand-ins for parts of it (``typing``) must not hide.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        sys.exit(f"bench-gpu: no wheel in {folder}; make them with --pack {folder} --torch VERSION")
    for wheel in wheels:
        name = wheel.name.split("-")[0]
        if name not in sys.stdlib_module_names and not _installed(name):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
    return target


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def pack(folder: Path, torch: str) -> None:
    """Make the wheels of the locks, without torch and what comes with it, for this Python and that torch."""
    major, _, minor = torch.partition(".")
    if major != "2" or not minor.isdigit():
        sys.exit(f"bench-gpu: --torch is {torch!r}; give the compute node's, such as 2.11")
    folder.mkdir(parents=True, exist_ok=True)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder)]
    with tempfile.TemporaryDirectory() as place:
        wanted = Path(place, "wanted.txt")
        wanted.write_text("".join(_requirements()))
        subprocess.run([*wheel, "-r", str(wanted)], check=True)
        # torchvision 0.26 is torch 2.11's, and so on
        subprocess.run([*wheel, f"torchvision==0.{int(minor) + 15}.*"], check=True)
        download = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            str(folder),
        ]
        download += ["--python-version", "3.10", "--implementation", "cp", "--abi", "none"]
        subprocess.run([*download, "-r", str(ROOT / "locks" / "detectron2.lock")], check=True)


def _requirements() -> Iterator[str]:
    """The requirements of the locks with their hashes."""
    for name in ("requirements.lock", "no-deps.lock"):
        for block in re.split(r"\n(?=\S)", (ROOT / "locks" / name).read_text()):
            if not _GIVEN.match(block):
                yield block.rstrip() + "\n"


if __name__ == "__main__":
    main()
