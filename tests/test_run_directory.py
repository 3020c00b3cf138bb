"""docs/run_directory.md names every record of the store with exactly its fields."""

import dataclasses
import importlib
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from experiments.store import attempt_dir
from experiments.store.records import Record
from tests.support.run_directory_page import unknown_files

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "run_directory.md").read_text()
SECTION = re.compile(r"^## .*\n\n`(\w+)`\. .*\n\n\| field \| meaning \|\n\|---\|---\|\n((?:\|.*\|\n)+)", re.MULTILINE)


def written() -> dict[str, list[str]]:
    """The fields that the page lists, by record."""
    return {name: re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE) for name, rows in SECTION.findall(TEXT)}


def modules() -> list[str]:
    return [f"experiments.store.{path.stem}" for path in sorted((ROOT / "experiments/store").glob("[a-z]*.py"))]


def records() -> dict[str, type]:
    """Every record of the store, and the dataclasses that lie inside one."""
    found = {}
    for name in modules():
        module = importlib.import_module(name)
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, Record) and kind is not Record:
                found[kind.__name__] = kind
    return found | {kind.__name__: kind for kind in (*_inside(found.values()), attempt_dir.Event)}


def _inside(kinds: Iterable[type]) -> Iterator[type]:
    """The dataclasses that are types of records' fields, at any depth."""
    for kind in kinds:
        hints = re.findall(r"\w+", " ".join(map(str, typing.get_type_hints(kind).values())).replace(".", " "))
        module = vars(importlib.import_module(kind.__module__))
        inner = [module[name] for name in hints if dataclasses.is_dataclass(module.get(name))]
        yield from inner
        yield from _inside(inner)


def test_every_record_has_its_section() -> None:
    assert sorted(written()) == sorted(records())


@pytest.mark.parametrize("name", sorted(records()))
def test_a_section_lists_the_fields_of_its_record(name: str) -> None:
    fields = [field.name for field in dataclasses.fields(records()[name]) if field.name != "more"]
    assert written()[name] == fields


def test_every_file_of_a_store_is_on_the_page(tmp_path: Path) -> None:
    """Of an earlier version's store; tests that train compare theirs."""
    assert unknown_files(ROOT / "tests/reports/fixture_store") == []
    (tmp_path / "runs/a/attempts/1").mkdir(parents=True)
    for name in ("runs/a/attempts/1/notes.json", "runs/a/attempts/1/stage.json", "runs/a/more.json"):
        (tmp_path / name).write_text("{}")
    assert unknown_files(tmp_path) == ["runs/a/attempts/1/notes.json", "runs/a/more.json"]


def test_every_module_that_the_page_names_exists() -> None:
    assert all((ROOT / path).exists() for path in re.findall(r"`((?:experiments|mpformer|analysis)/[\w/]+\.py)`", TEXT))
