"""The tutorials' code runs, their commands and those of messages are real ones, and what they say of suites is so."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from experiments.cli.main import cli
from experiments.suites import catalogue, planning, rows, scales
from experiments.suites.planning import Request
from mpformer.runtime.errors import UserError

DOCS = Path(__file__).parents[1] / "docs"
TAUGHT = ("mask-weight", "two-noises", "mask-weight-elsewhere")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), flags=re.M | re.S)


@pytest.fixture
def taught(tmp_path: Path) -> Iterator[Path]:
    """The page's Python as a suites file; its suites are forgotten afterwards."""
    path = tmp_path / "my_suites.py"
    path.write_text("\n".join(blocks("suites.md", "python")))
    try:
        catalogue.add_file(path)
        yield path
    finally:
        for name in TAUGHT:
            rows.SUITES.pop(name, None)
        catalogue._SOURCES.clear()


@pytest.mark.usefixtures("taught")
def test_the_suites_of_the_tutorial_are_suites(tmp_path: Path) -> None:
    plan = planning.make(Request("mask-weight"), tmp_path)
    assert len(plan.unique) == 18
    assert [row.name for row in plan.rows][:2] == ["mask2former,weight=2", "mp-former,weight=2"]
    assert plan.suite.description == "Does the gain of mask piloting depend on how much the mask loss weighs?"
    same = {run.run_id for run in planning.make(Request("headline"), tmp_path).runs}
    assert same <= {run.run_id for run in plan.runs}, "weight 5 is the headline's"
    assert len(planning.make(Request("two-noises"), tmp_path).unique) == 4 * 5
    for dataset in ("cityscapes", "ade20k"):
        assert len(planning.make(Request("mask-weight-elsewhere", "paper", dataset), tmp_path).unique) == 9
    with pytest.raises(UserError, match="nuclei stands for neither"):
        planning.make(Request("mask-weight-elsewhere", dataset="nuclei"), tmp_path)


def test_the_tutorials_typo_is_refused_as_it_says() -> None:
    (shown,) = re.findall(
        r"^mpformer: (unknown configuration key .*), …$", (DOCS / "suites.md").read_text(), flags=re.M
    )
    with pytest.raises(UserError) as error:
        scales.base("mini").replace({"model.mask_wieght": 2.0})
    assert str(error.value).startswith(shown)


def test_the_tutorial_lists_the_arguments_of_a_suite() -> None:
    text = (DOCS / "suites.md").read_text()
    given = set(rows.Suite.__dataclass_fields__) - {"name", "make", "description"}
    table = re.findall(r"^\| (`.*?`) \|", text, flags=re.M)
    assert given == {name for line in table for name in re.findall(r"`(\w+)`", line)}
    listed = set(re.findall(r"`([a-z]+-?[a-z]*)`", text.split("with `--dataset nuclei`")[1].split("The others")[0]))
    runs = {n for n, s in catalogue.all_suites().items() if not s.why_not("nuclei")}
    assert listed == runs


@pytest.mark.parametrize("page", ["suites.md", "datasets.md", "models.md"])
def test_commands_of_the_pages_are_ones(page: str, taught: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(taught.parent)
    lines = [line.split("  #")[0] for block in blocks(page, "sh") for line in block.splitlines()]
    commands = [line.split()[1:] for line in lines if line.startswith("mpformer ")]
    assert len(commands) > 3
    for words in commands:
        command: click.Command = cli
        context = click.Context(command)
        while isinstance(command, click.Group):
            name, found, words = command.resolve_command(context, words)
            assert found is not None
            command, context = found, click.Context(found, info_name=name, parent=context)
        command.make_context(command.name, list(words))


NO_COMMAND = {"in", "has", "makes", "trains", "dataset"}
"""What may follow the program's name in a sentence about it."""


def _sentences(path: Path) -> Iterator[str]:
    """The strings of a module, docstrings too, with an X for each value that is put into them."""
    tree = ast.parse(path.read_text())
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.value


def _advised() -> Iterator[tuple[str, str]]:
    """Where a command of ours is named, in the code's messages and docstrings and on the pages, and its words."""
    modules = (path for room in ("mpformer", "experiments", "reports") for path in (DOCS.parent / room).rglob("*.py"))
    texts = [(path.name, text) for path in modules for text in _sentences(path)]
    texts += [(path.name, path.read_text()) for path in (DOCS.parent / "README.md", *DOCS.glob("*.md"))]
    for name, text in texts:
        for found in re.finditer(r"\bmpformer ([a-z][\w-]*[^\n`;:()]*)", text):
            yield name, found[1]


def test_commands_that_messages_and_pages_name_are_ones() -> None:
    seen, wrong = set(), []
    for where, text in _advised():
        words = text.split()
        command: click.Command | None = cli
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            word = words.pop(0).rstrip(".,'\"")
            command = command.get_command(click.Context(command), word)
            if command is None and word not in NO_COMMAND:
                wrong.append(f"{where}: {text}")
        if command is None or isinstance(command, click.Group):
            continue
        seen.add(command.name)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        asked = {word.partition("=")[0].rstrip(".,'\"") for word in words if re.match(r"--?[a-z]", word)}
        wrong += [f"{where}: {text}"] if asked - known - {"--help"} else []
    assert not wrong, "\n".join(wrong)
    assert {"launch", "status", "sync", "check"} <= seen
