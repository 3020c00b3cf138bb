"""What the pages for contributors name is there: files, tests, and what the recipes call by name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "docs/architecture.md")
PATH = r"(?<![\w/])(?:analysis|benchmarks|docs|experiments|locks|mpformer|reports|slurm|tests)/[\w./-]*\w"
NAME = r"`(_?[a-z]\w+|_?[A-Z][A-Z_]+|[A-Z][a-z]\w+)(?:\(\))?`"
MARKS = {"gpu", "slow"}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    code = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S))
    paths = set(re.findall(PATH, " ".join(code)))
    assert len(paths) > 20
    assert not {path for path in paths if not (ROOT / path).exists()}


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "CONTRIBUTING.md").read_text())
    assert links
    assert not {link for link in links if not (ROOT / link).exists()}


def test_names_of_a_recipe_stand_in_its_files() -> None:
    for recipe in (ROOT / "CONTRIBUTING.md").read_text().split("\n## ")[1:]:
        files = [ROOT / path for path in re.findall(PATH, recipe) if path.endswith(".py")]
        code = "\n".join(file.read_text() for file in files)
        names = set(re.findall(NAME, recipe)) - MARKS
        assert not {name for name in names if not re.search(rf"\b{name}\b", code)}, recipe.splitlines()[0]
