"""Arrows between the rooms go one way, files form no circle, and what must start fast imports nothing heavy."""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("analysis", "mpformer", "experiments", "reports")


def in_order(floor: str, *rooms: str) -> dict[str, set[str]]:
    """Rooms along the life of a run: each may import itself and what stands left of it."""
    names = [f"{floor}.{room}" for room in rooms]
    return {name: set(names[: number + 1]) for number, name in enumerate(names)}


MPFORMER = {
    "mpformer": {"mpformer"},
    **in_order("mpformer", "runtime", "config", "data", "data.own", "data.check", "modeling", "evaluation", "training"),
}
SETS = {"mpformer.data.sets": MPFORMER["mpformer.data"] | {"mpformer.data.sets"}}
"""Found by name, see :mod:`mpformer.config.datasets`: nothing imports one."""
MPFORMER["mpformer.piloting"] = MPFORMER["mpformer.modeling"] | {"mpformer.piloting"}
EXPERIMENTS = {
    "experiments": {"experiments"},
    **in_order("experiments", "store", "suites", "status", "execution", "launch", "slurm", "runs", "cli"),
    "experiments.tracking": {"experiments.store", "experiments.status", "experiments.tracking"},
}
EXPERIMENTS["experiments.cli"] |= {"experiments.tracking"}
READ_BY_REPORTS = {"experiments.store", "experiments.suites", "experiments.status"}

MAY_IMPORT: Mapping[str, set[str]] = {
    "analysis": {"analysis"},
    **{room: {"analysis"} | below for room, below in {**MPFORMER, **SETS}.items()},
    **{room: {"analysis", *MPFORMER} | below for room, below in EXPERIMENTS.items()},
    "reports": {"analysis", *MPFORMER, *READ_BY_REPORTS, "reports"},
    "reports.commands": {"analysis", *MPFORMER, *EXPERIMENTS, "reports", "reports.commands"},
}
"""Which rooms a room may import. ``reports.commands`` is a room of one file: a command that the command line finds by
name, like one of another package, and so it stands above the command line, whose options it shares."""

HEAVY = (
    "torch",
    "torchvision",
    "detectron2",
    "pandas",
    "pyarrow",
    "matplotlib",
    "mlflow",
    "scipy",
    "submitit",
)

WITHOUT_TORCH = (
    "mpformer", "mpformer.config.schema", "mpformer.runtime.errors", "mpformer.config.presets",
    "mpformer.config.classes", "mpformer.runtime.callbacks", "analysis", "analysis.statistics", "analysis.figures",
)  # fmt: skip


def files(*packages: str) -> list[str]:
    """Paths of the modules of packages, from the root of the project."""
    return sorted(str(path.relative_to(ROOT)) for package in packages for path in (ROOT / package).rglob("*.py"))


def module(name: str) -> str:
    """The module that a file is."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = frozenset(module(name) for name in files(*FLOORS))


def room(name: str) -> str:
    """The room of a module: the longest name that is one; of a folder without a rule its two first parts."""
    parts = name.split(".")
    known = [".".join(parts[:length]) for length in (3, 2)]
    two = known[1] if parts[0] in ("mpformer", "experiments") else parts[0]
    return next((each for each in known if each in MAY_IMPORT), two)


def imports(source: str) -> Iterator[str]:
    """Yield every module that a file imports, inside functions and for annotations too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            parts = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (part if part in MODULES else str(node.module) for part in parts)


def breaches(source: str, name: str) -> list[str]:
    """What in a file of the project breaks the rules; ``name`` is its path from the root of the project."""
    here = room(module(name))
    found = []
    for imported in imports(source):
        top = imported.split(".")[0]
        if top in FLOORS and room(imported) not in MAY_IMPORT[here]:
            found.append(f"{name} imports {imported}: an arrow upwards")
        if top == "detectron2" and not name.startswith("mpformer/"):
            found.append(f"{name} imports {imported}: only mpformer may")
        if top in ("tests", "slurm"):
            found.append(f"{name} imports {imported}, which is not installed")
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("package", FLOORS)
def test_arrows_go_one_way(package: str) -> None:
    assert files(package)
    found = [line for name in files(package) for line in breaches((ROOT / name).read_text(), name)]
    assert not found, "\n".join(found)


def test_every_folder_is_a_room() -> None:
    assert {room(name) for name in MODULES} == set(MAY_IMPORT)


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module(name): set(imports((ROOT / name).read_text())) & MODULES for name in files(*FLOORS)}
    assert sum(map(len, graph.values())) > 500, "the imports are seen"
    assert not circle(graph)


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("name", "source", "count"),
    [
        ("analysis/layers.py", "import torch\nfrom scipy import optimize", 0),
        ("analysis/layers.py", "from mpformer.config.schema import Config", 1),
        ("analysis/layers.py", "def f():\n    import experiments.store.run_dir", 1),
        ("mpformer/training/trainer.py", "import detectron2.layers, analysis.layers", 0),
        ("mpformer/training/trainer.py", "if True:\n    from reports import model", 1),
        ("mpformer/data/loader.py", "from mpformer.data.own import registration", 1),
        ("mpformer/data/check.py", "from mpformer.data.own import registration", 0),
        ("mpformer/data/own/adding.py", "from mpformer.data.coco_layout import Layout", 0),
        ("mpformer/data/own/adding.py", "from mpformer.data import check", 1),
        ("mpformer/evaluation/evaluate.py", "from mpformer.data.sets import shapes", 1),
        ("mpformer/modeling/weights.py", "from mpformer.training import checkpoints", 1),
        ("mpformer/training/trainer.py", "from mpformer.modeling import weights", 0),
        ("mpformer/training/trainer.py", "from mpformer.piloting import MaskPiloting", 1),
        ("experiments/store/run_dir.py", "def f():\n    from detectron2.data import DatasetCatalog", 1),
        ("experiments/store/run_dir.py", "from experiments.suites import planning", 1),
        ("experiments/suites/planning.py", "from experiments.store.run_dir import Store", 0),
        ("experiments/suites/planning.py", "from experiments.status import standing", 1),
        ("experiments/slurm/job.py", "from experiments.tracking import sync", 1),
        ("experiments/cli/main.py", "from experiments.tracking import sync", 0),
        ("experiments/cli/main.py", "def f():\n    from reports.build import build_report", 1),
        ("experiments/launch/local.py", "def f():\n    from reports.build import build_report", 1),
        ("reports/build.py", "from experiments.runs import visualizing", 1),
        ("reports/build.py", "from reports import commands", 1),
        ("reports/commands.py", "from experiments.cli.options import json_option\nfrom reports import build", 0),
        ("reports/model.py", "import experiments.store.run_dir, tests.made_cases", 1),
    ],
)
def test_the_check_itself_finds_breaches(name: str, source: str, count: int) -> None:
    assert len(breaches(source, name)) == count


def loaded(code: str) -> set[str]:
    """Return which heavy packages a fresh interpreter has loaded after running ``code``."""
    tail = f"import json, sys; print(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{tail}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def import_all(names: list[str]) -> str:
    return "import importlib\nfor name in " + repr(names) + ": importlib.import_module(name)"


def test_named_modules_import_no_torch() -> None:
    assert loaded(import_all(list(WITHOUT_TORCH))).isdisjoint({"torch", "torchvision", "detectron2"})


def test_experiments_import_nothing_heavy() -> None:
    assert loaded(import_all([module(name) for name in files("experiments")])) == set()


def test_reports_import_no_torch() -> None:
    assert loaded(import_all([module(name) for name in files("reports")])).isdisjoint(
        {"torch", "torchvision", "detectron2", "mlflow"}
    )


def test_cheap_commands_load_nothing_heavy(tmp_path: Path) -> None:
    root, data = ["--root", str(tmp_path / "store")], ["--data-root", str(tmp_path / "data")]
    commands = [["--help"], ["suites"], ["suites", "--json"], ["plan", "headline", *root, *data], ["status", *root]]
    code = f"""
from experiments.cli.main import cli
from mpformer.runtime.errors import UserError
for command in {commands!r}:
    try:
        cli.main(command, standalone_mode=False)
    except UserError as error:  # `status` of a store without a launched suite
        assert command[0] == "status", error
"""
    assert loaded(code) == set()
