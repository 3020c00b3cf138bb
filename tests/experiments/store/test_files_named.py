"""Files below a store are named in one room: who looks for them elsewhere asks the store."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NAMES = frozenset(
    [
        "run.json",
        "trained.json",
        "result.json",
        "setting.json",
        "void.json",
        "cancel.json",
        "stage.json",
        "progress.json",
        "events.jsonl",
        "provenance.json",
        "launch.json",
        "stop.json",
        "journal.jsonl",
        "usage.json",
        "mlflow.json",
        "scheduler.json",
        "archive.json",
    ]
)
"""Files that the store owns; the trainer's own (checkpoints, probes, layer masks) are not among them."""

ELSEWHERE = {"experiments/cli/doctor.py": {"trained.json"}}
"""A trial training in a folder that is thrown away, which is no run."""


def texts(path: Path) -> set[str]:
    """The text constants of a file that are no docstrings."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs)
    return {node.value for node in constants if isinstance(node.value, str)}


@pytest.mark.parametrize("package", ["experiments", "reports"])
def test_the_store_alone_names_its_files(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if not name.startswith("experiments/store/"):
            named = {text.rpartition("/")[2] for text in texts(path)} & NAMES
            assert named == ELSEWHERE.get(name, set()), f"{name} names {sorted(named)}: ask experiments.store instead"
