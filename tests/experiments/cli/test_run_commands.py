"""The commands about runs themselves, once each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.execution import attempt
from experiments.execution.attempt import Options
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan
from mpformer.runtime.errors import UserError
from tests.support.executed_runs import Scorer, eval_id_of, execute

Make = Callable[..., Any]


def test_commands_about_runs(
    plan: Plan, store: Store, options: Options, counter: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The commands themselves, once each."""
    from click.testing import CliRunner

    from experiments.cli.run_commands import import_runs, prune, reevaluate, void

    (run,) = execute(plan, store, options, counter())
    monkeypatch.setattr(attempt, "Model", Scorer)
    where = ["--root", str(store.root)]
    (run.path / "checkpoints" / "iteration_000005.pth").write_text("x")
    cli = CliRunner()
    done = cli.invoke(prune, where)
    assert (done.exit_code, "nothing was removed: --yes does that" in done.output) == (0, True)
    assert "checkpoint of a run that is done" in done.output
    assert (run.path / "checkpoints" / "iteration_000005.pth").exists()
    assert "removed 1 of 1" in cli.invoke(prune, ["--yes", *where]).output
    assert isinstance(cli.invoke(prune, ["--yes", "--dry-run", *where]).exception, UserError)
    other = tmp_path / "third"
    done = cli.invoke(import_runs, [str(store.root), "--root", str(other)])
    assert "1 of 4 runs were imported" in done.output
    data = ["--data-root", str(options.data_root)]
    assert cli.invoke(reevaluate, [run.run_id, *where, *data], input="n\n").exit_code == 1
    done = cli.invoke(reevaluate, [run.run_id, "--yes", *where, *data])
    assert (done.exit_code, "done" in done.output) == (0, True)
    assert run.result(eval_id_of(run)).metrics == {"AP": 99.0}  # type: ignore[union-attr]
    done = cli.invoke(reevaluate, ["--suite", "headline", "--yes", *where, *data])
    assert done.exit_code == 0, done.output
    assert isinstance(cli.invoke(reevaluate, where).exception, UserError)
    assert isinstance(cli.invoke(void, [run.run_id, "--reason", " ", *where]).exception, UserError)
