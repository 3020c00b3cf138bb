"""reevaluate: finished runs are scored again, and keep their result unless that succeeds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from experiments.execution.attempt import Options
from experiments.runs import reevaluating
from experiments.status import standing
from experiments.status.states import State
from experiments.store import claims
from experiments.store.files import read_json
from experiments.store.run_dir import RunDir, Store
from experiments.suites.planning import Plan
from mpformer.runtime.errors import UserError
from tests.support.executed_runs import Scorer, execute

Make = Callable[..., Any]


def test_reevaluate_scores_again_without_training_and_keeps_the_earlier_result(
    plan: Plan, store: Store, options: Options, counter: Make, setting: Callable[[RunDir], str]
) -> None:
    (run,) = execute(plan, store, options, counter())
    weights = read_json(run.path / "trained.json")["weights_sha256"]
    (one,) = reevaluating.chosen([run], [], {})
    reevaluating.check([one], options.data_root)
    ending = reevaluating.evaluate(one, store, options.data_root, Scorer())
    assert ending.outcome == "done"
    assert run.result(setting(run)).metrics == {"AP": 99.0}  # type: ignore[union-attr]
    (earlier,) = (run.path / "superseded").glob("*/*/result.json")
    assert read_json(earlier)["metrics"]["AP"] == 12.5
    assert (earlier.parent / "layers.parquet").exists()
    assert read_json(run.path / "trained.json")["weights_sha256"] == weights
    (other,) = reevaluating.chosen([run], [("evaluation.layer_mask_images", 3)], {})
    assert reevaluating.evaluate(other, store, options.data_root, Scorer()).outcome == "done"
    assert len(list(run.path.glob("evals/*/result.json"))) == 2, "another setting has a directory of its own"
    assert len(list((run.path / "superseded").iterdir())) == 1


@dataclass(frozen=True)
class _Fails:
    """Fails in the middle of scoring, in one of the ways there are."""

    error: BaseException

    def evaluate(self, config: Any, weights: Path, out: Path, data_root: Path, progress: Any) -> dict[str, Any]:
        (out / "layers.parquet").write_text("half of it")
        raise self.error


@pytest.mark.parametrize("error", [UserError("no such data"), KeyboardInterrupt(), MemoryError(), OSError(28, "full")])
def test_reevaluate_that_does_not_succeed_leaves_the_result_in_place(
    plan: Plan, store: Store, options: Options, counter: Make, setting: Callable[[RunDir], str], error: BaseException
) -> None:
    """Issue 12, 5.1: a finished run stays DONE, with its number, whatever becomes of a second scoring."""
    (run,) = execute(plan, store, options, counter())
    place = run.evaluation(setting(run))
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    (one,) = reevaluating.chosen([run], [], {})
    assert reevaluating.evaluate(one, store, options.data_root, _Fails(error)).outcome != "done"  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert not (run.path / "superseded").exists()
    state = standing.look(store, [(run.run_id, setting(run))]).states[run.run_id, setting(run)]
    assert (state.state, state.metrics["AP"]) == (State.DONE, 12.5)


def test_reevaluate_checks_data_and_weights_of_all_runs_first(
    plan: Plan, store: Store, options: Options, counter: Make, tmp_path: Path
) -> None:
    """Issue 12, 5.1: a wrong --data-root or a damaged weights file is one line, before anything is touched."""
    from click.testing import CliRunner

    from experiments.cli.run_commands import reevaluate

    runs = execute(plan, store, options, counter(), 2)
    attempts = [run.attempts() for run in runs]
    wrong = ["--yes", "--root", str(store.root), "--data-root", str(tmp_path / "elsewhere")]
    done = CliRunner().invoke(reevaluate, [*(run.run_id for run in runs), *wrong])
    assert isinstance(done.exception, UserError)
    assert "or name the right --data-root" in str(done.exception)
    (runs[1].path / "checkpoints" / "final.pth").write_text("damaged")
    chosen = reevaluating.chosen(runs, [], {})
    with pytest.raises(UserError, match=r"the weights of .* are missing or damaged: `mpformer launch` trains"):
        reevaluating.check(chosen, options.data_root)
    assert [run.attempts() for run in runs] == attempts


def test_reevaluate_refuses_what_would_train(plan: Plan, store: Store, options: Options, counter: Make) -> None:
    run, other = execute(plan, store, options, counter(), 2)
    with pytest.raises(UserError, match="would change what is trained"):
        reevaluating.chosen([run], [("schedule.max_iter", 3)], {})
    (other.path / "trained.json").unlink()
    with pytest.raises(UserError, match="nothing is trained of"):
        reevaluating.chosen([run, other], [], {})
    claim = claims.acquire(run.path / "claims")
    assert claim is not None
    with pytest.raises(UserError, match="being worked on"):
        reevaluating.check(reevaluating.chosen([run], [], {}), options.data_root)
