"""Suites of one's own: in a file, from the environment, from a package, and as a store recorded them (issue 12, 3)."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.execution import attempt
from experiments.slurm import code_snapshot
from experiments.store.run_dir import Store
from experiments.suites import catalogue, planning
from experiments.suites.planning import Request
from experiments.suites.rows import SUITES
from mpformer.runtime.errors import UserError

FILE = '''
from experiments.suites.rows import Row, suite

@suite(title="Weight of the mask loss", baseline="weight=5", seeds={"mini": (0,)})
def NAME(scale, dataset):
    """Does it hang on the weight?"""
    for weight in (2.0, 5.0):
        yield Row(f"weight={weight:g}", f"weight {weight:g}", {"model.mask_weight": weight})
'''

Call = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def forget() -> Iterator[Callable[[], None]]:
    """Forget what was added, as a new process does not know it."""
    catalogue.all_suites()
    own, modules = dict(SUITES), set(sys.modules)

    def forget() -> None:
        for name in set(SUITES) - set(own):
            del SUITES[name]
        catalogue._SOURCES.clear()
        catalogue._BROKEN.clear()
        catalogue._load_others.cache_clear()
        for name in [name for name in sys.modules if name.startswith("laboratory") and name not in modules]:
            del sys.modules[name]

    forget()
    yield forget
    forget()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_suites.py"
    path.write_text(FILE.replace("NAME", "mask_weight"))
    return path


@pytest.fixture
def call(
    forget: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    counter: type,
    data_root: Path,
    tmp_path: Path,
) -> Call:
    """A command as in a process of its own, with the counter for a trainer; returns exit code and output."""
    monkeypatch.setenv("MPFORMER_ROOT", str(tmp_path / "store"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data_root))
    monkeypatch.setattr(attempt, "Model", counter)

    def execute(*words: str) -> tuple[int, str]:
        forget()
        monkeypatch.setattr(sys, "argv", ["mpformer", *words])
        with pytest.raises(SystemExit) as end:
            main.main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out + printed.err

    return execute


@pytest.mark.parametrize("before", [True, False], ids=["before the command", "after it"])
def test_every_command_that_takes_a_suite_takes_one_of_a_file(call: Call, file: Path, before: bool) -> None:
    option = ("--suites", str(file))

    def told(*words: str) -> tuple[int, str]:
        return call(*option, *words) if before else call(*words, *option)

    assert "mask-weight: Weight of the mask loss" in told("suites")[1]
    assert "weight=2  seed 0  PLANNED" in told("plan", "mask-weight")[1]
    for row in ("weight=2", "weight=5"):
        launched = told("launch", "mask-weight", "--row", row, "--inline", "--set", "schedule.max_iter=12")
        assert launched[0] == 0, launched[1]
    assert "DONE" in told("status", "mask-weight")[1]
    assert told("report", "mask-weight", "--format", "md")[0] == 0
    assert "nothing of it is running" in told("cancel", "mask-weight")[1]
    assert "no failed run to retry" in told("retry", "mask-weight")[1]
    code, said = told("reevaluate", "--suite", "mask-weight", "--yes")
    assert code == 0, said


def test_what_was_launched_is_known_from_the_store_alone(call: Call, file: Path, tmp_path: Path) -> None:
    """With the file changed since, then gone: what was launched is what counts."""
    short = ("--row", "weight=2", "--inline", "--set", "schedule.max_iter=12")
    assert call("launch", "mask-weight", "--suites", str(file), *short)[0] == 0
    (record,) = Store(tmp_path / "store").suite_records()
    kept = tmp_path / "store" / record.file
    assert kept.read_text() == file.read_text()
    assert kept.name == "my_suites.py"
    file.unlink()
    assert "weight=5  seed 0  PLANNED" in call("plan", "mask-weight")[1]
    assert "DONE" in call("status", "mask-weight")[1]
    assert "no failed run to retry" in call("retry", "mask-weight")[1]
    assert call("reevaluate", "--suite", "mask-weight", "--yes")[0] == 0
    assert "mask-weight@mini" in call("report", "mask-weight", "--format", "md")[1]
    assert call("launch", "mask-weight", *short)[0] == 0
    assert "unknown suite 'mask-weight'" in call("plan", "mask-weight", "--root", str(tmp_path / "other"))[1]


def test_a_snapshot_of_the_code_knows_the_suites_of_its_store(file: Path, data_root: Path, tmp_path: Path) -> None:
    """As the last job of a launch on Slurm does: other code, no file, no environment."""
    store = Store(tmp_path / "store")
    catalogue.add_file(file)
    planning.write_record(planning.make(Request("mask-weight"), data_root), store, "")
    code = code_snapshot.take(store)
    script = "import experiments.cli.main as m, sys; print(m.__file__); m.main()"
    words = ("plan", "mask-weight", "--root", str(store.root), "--data-root", str(data_root))
    environment = {key: value for key, value in os.environ.items() if key != catalogue.ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=tmp_path, env={**environment, "PYTHONPATH": str(code)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith(str(code)), done.stderr
    assert "weight=2  seed 0" in done.stdout


def test_the_environment_names_files(call: Call, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "others.py"
    other.write_text(FILE.replace("NAME", "other_weight"))
    monkeypatch.setenv("MPFORMER_SUITES", f"{file}{os.pathsep}{other}")
    assert "weight=2" in call("plan", "mask-weight")[1]
    assert "weight=2" in call("plan", "other-weight")[1]
    monkeypatch.setenv("MPFORMER_SUITES", str(tmp_path / "gone.py"))
    code, said = call("plan", "headline")
    assert (code, said.splitlines()[0]) == (
        2, f"mpformer: cannot read suites file {tmp_path / 'gone.py'}: No such file or directory",
    )  # fmt: skip


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A distribution whose module ``laboratory`` defines suites."""
    about = tmp_path / "site" / "laboratory-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: laboratory\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[mpformer.suites]\nours = laboratory\n")
    (tmp_path / "site" / "laboratory.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")


def test_a_package_adds_suites(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, FILE.replace("NAME", "mask_weight"))
    launched = call("launch", "mask-weight", "--row", "weight=2", "--inline", "--set", "schedule.max_iter=12")
    assert launched[0] == 0, launched[1]
    (record,) = Store(tmp_path / "store").suite_records()
    assert (record.package, Path(record.file).name) == ("laboratory 1.0", "laboratory.py")
    monkeypatch.undo()
    monkeypatch.setenv("MPFORMER_ROOT", str(tmp_path / "store"))
    assert "weight=2" in call("plan", "mask-weight")[1], "where the package is not installed, the record knows"


def test_a_broken_package_leaves_the_other_suites_alone(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "import no_such_module")
    line = "suites of laboratory 1.0 (laboratory) cannot be loaded: ModuleNotFoundError: No module named"
    code, said = call("suites")
    assert (code, line in said) == (0, True)
    assert call("plan", "headline")[0] == 0
    code, said = call("plan", "mask-weight")
    assert (code, line in said) == (2, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = 1 / 0\n", r"suites file .*my_suites.py fails in line 2: ZeroDivisionError: division by zero"),
        ("def (:\n", r"suites file .*my_suites.py fails: SyntaxError: .*line 1"),
        ("x = 1\n", r"suites file .*my_suites.py defines no suite: docs/suites.md shows how"),
        (FILE.replace("NAME", "headline"), r"my_suites.py: suite 'headline' is already defined in .*ablations.py"),
        (FILE.replace("NAME", "mine").replace("baseline=", "base="), r"my_suites.py fails in line 4: TypeError: "),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    before = set(SUITES)
    with pytest.raises(UserError, match=message) as error:
        catalogue.add_file(file)
    assert "\n" not in str(error.value)
    assert set(SUITES) == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("yield Row('a', 1 / 0)", r"yields no rows: ZeroDivisionError: division by zero \(.*my_suites.py, line 7\)"),
        ("yield 'a'", "yields 'a', which is no Row"),
    ],
)
def test_rows_that_cannot_be_made_are_one_line(file: Path, rows: str, message: str, tmp_path: Path) -> None:
    head = FILE.replace("NAME", "mine").partition("    for weight")[0]
    file.write_text(f"{head}    {rows}\n")
    catalogue.add_file(file)
    with pytest.raises(UserError, match=message):
        planning.make(Request("mine"), tmp_path)


def test_the_nearer_file_counts(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option's before the environment's, that before a package's; two of one place may not share a name."""
    text = file.read_text()
    monkeypatch.setenv("MPFORMER_SUITES", str(tmp_path / "environment.py"))
    (tmp_path / "environment.py").write_text(text.replace("Weight of the mask loss", "the environment's"))
    install(tmp_path, monkeypatch, text.replace("Weight of the mask loss", "the package's"))
    assert catalogue.find("mask-weight").title == "the environment's"
    catalogue._load_others.cache_clear()
    catalogue._SOURCES.clear()
    del SUITES["mask-weight"]
    catalogue.add_file(file)
    assert catalogue.find("mask-weight").title == "Weight of the mask loss"
    catalogue.add_file(file)
    again = tmp_path / "again.py"
    again.write_text(text + "\n")
    with pytest.raises(UserError, match=r"again.py: suite 'mask-weight' is already defined in .*my_suites.py"):
        catalogue.add_file(again)
