"""The arrows between the floors go one way, and what must start fast imports nothing heavy."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("analysis", "mpformer", "experiments", "reports")
"""Lowest first; a floor imports itself and those below it."""

HEAVY = (
    "torch",
    "torchvision",
    "detectron2",
    "pandas",
    "pyarrow",
    "matplotlib",
    "seaborn",
    "mlflow",
    "scipy",
    "submitit",
)

WITHOUT_TORCH = (
    "mpformer", "mpformer.config.schema", "mpformer.runtime.errors", "mpformer.config.presets",
    "mpformer.config.classes", "mpformer.runtime.callbacks", "analysis", "analysis.statistics", "analysis.figures",
)  # fmt: skip


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every imported module of a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield str(node.module)


def breaches(source: str, name: str) -> list[str]:
    """What in a file of the project breaks the rules; ``name`` is its path from the root of the project."""
    floor = name.split("/")[0]
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    found = []
    for module in imports(ast.parse(source)):
        top = module.split(".")[0]
        if top in above:
            found.append(f"{name} imports {module}: an arrow upwards")
        if top == "detectron2" and floor != "mpformer":
            found.append(f"{name} imports {module}: only mpformer may")
        if top in ("tests", "slurm"):
            found.append(f"{name} imports {module}, which is not installed")
    return found


@pytest.mark.parametrize("package", FLOORS)
def test_arrows_go_one_way(package: str) -> None:
    assert files(package)
    found = [line for path in files(package) for line in breaches(path.read_text(), str(path.relative_to(ROOT)))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "source", "count"),
    [
        ("analysis/layers.py", "import torch\nfrom scipy import optimize", 0),
        ("analysis/layers.py", "from mpformer.config.schema import Config", 1),
        ("analysis/layers.py", "def f():\n    import experiments.store.run_dir", 1),
        ("mpformer/training/trainer.py", "import detectron2.layers, analysis.layers", 0),
        ("mpformer/training/trainer.py", "if True:\n    from reports import model", 1),
        ("experiments/store/run_dir.py", "def f():\n    from detectron2.data import DatasetCatalog", 1),
        ("experiments/cli/main.py", "def f():\n    from reports.build import build_report", 1),
        ("experiments/launch/local.py", "def f():\n    from reports.build import build_report", 1),
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


def modules(package: str) -> list[str]:
    parts = (path.relative_to(ROOT).with_suffix("").parts for path in files(package))
    return [".".join(part for part in parts_ if part != "__init__") for parts_ in parts]


def test_named_modules_import_no_torch() -> None:
    assert loaded(import_all(list(WITHOUT_TORCH))).isdisjoint({"torch", "torchvision", "detectron2"})


def test_experiments_import_nothing_heavy() -> None:
    assert loaded(import_all(modules("experiments"))) == set()


def test_reports_import_no_torch() -> None:
    assert loaded(import_all(modules("reports"))).isdisjoint({"torch", "torchvision", "detectron2", "mlflow"})


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
