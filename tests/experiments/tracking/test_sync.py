"""MLflow as a mirror: each metric exactly once, whatever happens to the files or to the process in between."""

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.store import claims
from experiments.store.files import append_json, read_json, write_json
from experiments.store.identity import eval_id
from experiments.store.mlflow_record import Copied
from experiments.store.run_dir import RunDir, Store
from experiments.tracking import sync
from experiments.tracking.server import BATCH, Mirror, Tail, checksum, listings, values
from mpformer.runtime.errors import UserError
from tests.support.present import present


def lines(first: int, last: int, *, scale: float = 1.0) -> list[dict[str, Any]]:
    """Training lines of iterations first … last, and a probe every fourth."""
    found: list[dict[str, Any]] = []
    for i in range(first, last + 1):
        found.append({"kind": "train", "iteration": i, "loss": scale / i, "lr": 1e-4, "seconds": 0.1, "time": 1e9 + i})
        if i % 4 == 0:
            found.append({"kind": "evaluation", "iteration": i, "metrics": {"AP": scale * i}, "time": 1e9 + i})
    return found


def write(run: RunDir, *many: list[dict[str, Any]]) -> None:
    run.metrics.write_text("".join(json.dumps(line) + "\n" for part in many for line in part))


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making one takes seconds, copying it none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mirrored(store: Store, one: RunDir, plan: Any, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A planned run of a launched suite, in a store whose MLflow database is there and empty."""
    from experiments.suites import planning

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    planning.write_record(plan, store, "mpformer launch headline")
    shutil.copy(empty_database, store.root / "mlflow.db")
    return one


@pytest.fixture
def history(store: Store) -> Callable[[], Counter[tuple[str, int, float]]]:
    """How often the server holds each (key, step, value), over all runs that are not deleted."""
    from mlflow import MlflowClient

    def read() -> Counter[tuple[str, int, float]]:
        client = MlflowClient(sync.default_uri(store.root))
        found: Counter[tuple[str, int, float]] = Counter()
        for run in client.search_runs([e.experiment_id for e in client.search_experiments()]):
            for key in run.data.metrics:
                found.update((m.key, m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))
        return found

    return read


def expected(*many: list[dict[str, Any]]) -> Counter[tuple[str, int, float]]:
    return Counter(
        (value.key, value.step, value.value) for part in many for line in part for value in values(line, "own")
    )


def restarted(store: Store) -> Mirror:
    return sync.connect(store, sync.default_uri(store.root))


def test_values_of_lines() -> None:
    train = {"kind": "train", "iteration": 7, "loss": 2.5, "loss_ce": 1, "note": "x", "ok": "y", "time": 12.0}
    assert [(v.key, v.step, v.value, v.timestamp) for v in values(train, "own")] == [
        ("loss", 7, 2.5, 12000), ("loss_ce", 7, 1.0, 12000),
    ]  # fmt: skip
    score = {"kind": "evaluation", "iteration": 9, "metrics": {"AP": 3.0, "APs": None}, "time": 1.0}
    assert [v.key for v in values(score, "own")] == ["probe/AP"]
    assert [v.key for v in values({**score, "final": True, "eval_id": "own"}, "own")] == ["AP"]
    assert [v.key for v in values({**score, "final": True, "eval_id": "other"}, "own")] == ["other/AP"]


def test_tail_reads_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n{"iteration": 2}\nnot json\n{"no": 1}\n{"iterat')
    tail = Tail(path)
    ((parsed, offset, last),) = tail.chunks(0)
    assert [line["iteration"] for line in parsed] == [1, 2]
    assert tail.damaged == 2
    assert path.read_bytes()[offset:] == b'{"iterat'
    copied = Copied("m", offset=offset, line=last)
    assert tail.only_grew(copied)
    path.write_bytes(path.read_bytes() + b'ion": 3}\n')
    assert tail.only_grew(copied)
    assert [line["iteration"] for parsed, _, _ in tail.chunks(offset) for line in parsed] == [3]
    path.write_bytes(b'{"iteration": 1}\n')
    assert not tail.only_grew(copied)
    path.write_bytes(b'{"iteration": 1}\n{"iteration": 9}\nnot json\n{"no": 2}\n{"iteration": 3}\n')
    assert not tail.only_grew(copied), "as long as before, another line at that place"


def test_a_run_is_copied_with_its_suite_toggles_and_state(store: Store, mirrored: RunDir, history: Any) -> None:
    from mlflow import MlflowClient

    write(mirrored, lines(1, 10))
    report = store.root / "reports" / "headline@mini"
    (report / "figures").mkdir(parents=True)
    (report / "index.html").write_text("<p>")
    (report / "figures" / "curves.png").write_bytes(b"png")
    first = sync.sync(store)
    assert (first.runs, first.metrics, first.artifacts) == (1, 32, 2)
    assert history() == expected(lines(1, 10))
    client = MlflowClient(sync.default_uri(store.root))
    experiment = client.get_experiment_by_name("shapes/mini")
    runs = {run.info.run_name: run for run in client.search_runs([present(experiment).experiment_id])}
    run = runs[mirrored.run_id]
    assert run.data.params["mp_queries"] == str(mirrored.config().toggles.mp_queries)
    assert run.data.params["schedule.max_iter"] == "12"
    assert run.data.tags["suites"] == "headline@mini"
    assert run.data.tags["suite.headline/mini"] == listings(store)[mirrored.run_id].rows["headline@mini"]
    assert run.info.status == "SCHEDULED", "planned, not started"
    artifacts = runs["report headline@mini"].info.run_id
    assert {file.path for file in client.list_artifacts(artifacts)} == {"figures", "index.html"}
    assert [file.path for file in client.list_artifacts(artifacts, "figures")] == ["figures/curves.png"]
    again = sync.sync(store)
    assert (again.metrics, again.artifacts) == (0, 0)


def test_growth_cut_back_and_resume_add_each_metric_once(store: Store, mirrored: RunDir, history: Any) -> None:
    """A killed run's file is cut back to the checkpoint; the same iterations come again at other times and speeds."""
    mirror, uri = restarted(store), sync.default_uri(store.root)
    write(mirrored, lines(1, 10))
    sync.one_pass(mirror, store, uri)
    write(mirrored, lines(1, 4))
    sync.one_pass(mirror, store, uri)
    assert history() == expected(lines(1, 4))
    again = [
        {**line, "time": line["time"] + 500} | ({"seconds": 0.7} if "loss" in line else {}) for line in lines(5, 14)
    ]
    write(mirrored, lines(1, 4), again[:4])
    sync.one_pass(mirror, store, uri)
    write(mirrored, lines(1, 4), again)
    sync.one_pass(mirror, store, uri)
    sync.one_pass(restarted(store), store, uri)
    assert history() == expected(lines(1, 4), again)


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_crash_around_the_request_loses_and_doubles_nothing(
    at: str, store: Store, mirrored: RunDir, history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(mirrored, lines(1, 10))
    mirror, uri = restarted(store), sync.default_uri(store.root)
    sync.one_pass(mirror, store, uri)
    write(mirrored, lines(1, 300))
    assert len(expected(lines(11, 300))) > BATCH, "several requests"
    real, count = mirror.client.log_batch, Counter[str]()

    def dying(*args: Any, **options: Any) -> None:
        count["calls"] += 1
        if count["calls"] == 2 and at == "before":
            raise KeyboardInterrupt
        real(*args, **options)
        if count["calls"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(mirror.client, "log_batch", dying)
    with pytest.raises(KeyboardInterrupt):
        sync.one_pass(mirror, store, uri)
    assert read_json(mirrored.path / "mlflow.json")["servers"][uri]["pending"] is True
    sync.one_pass(restarted(store), store, uri)
    assert history() == expected(lines(1, 300))


def test_a_ledger_that_the_server_contradicts_is_not_believed(
    store: Store, mirrored: RunDir, history: Any, empty_database: Path
) -> None:
    """The database was lost or replaced: everything is sent again, once."""
    write(mirrored, lines(1, 10))
    sync.sync(store)
    shutil.copy(empty_database, store.root / "mlflow.db")
    sync.sync(store)
    assert history() == expected(lines(1, 10))
    (mirrored.path / "mlflow.json").unlink()
    sync.sync(store)
    assert history() == expected(lines(1, 10))


def test_an_older_database_is_found_out(store: Store, mirrored: RunDir, history: Any, tmp_path: Path) -> None:
    write(mirrored, lines(1, 10))
    sync.sync(store)
    shutil.copy(store.root / "mlflow.db", tmp_path / "backup.db")
    write(mirrored, lines(1, 14))
    sync.sync(store)
    shutil.copy(tmp_path / "backup.db", store.root / "mlflow.db")
    sync.sync(store)
    assert history() == expected(lines(1, 14))


def test_a_record_of_an_earlier_version_is_read(store: Store, mirrored: RunDir, history: Any) -> None:
    write(mirrored, lines(1, 10))
    sync.sync(store)
    content = read_json(mirrored.path / "mlflow.json")
    for one in content["servers"].values():
        one |= {"high": {"loss": 10}, "state": None}
    write_json(mirrored.path / "mlflow.json", content)
    assert sync.sync(store).metrics == 0
    assert history() == expected(lines(1, 10))


def test_a_run_done_again_with_other_numbers_gets_a_new_mlflow_run(
    store: Store, mirrored: RunDir, history: Any
) -> None:
    write(mirrored, lines(1, 10))
    sync.sync(store)
    write(mirrored, lines(1, 10, scale=2.0))
    sync.sync(store)
    assert history() == expected(lines(1, 10, scale=2.0))


def test_final_scores_end_the_run(store: Store, mirrored: RunDir, history: Any) -> None:
    from mlflow import MlflowClient

    setting = eval_id(mirrored.config())
    final = {
        "kind": "evaluation",
        "iteration": 12,
        "metrics": {"AP": 50.0},
        "final": True,
        "eval_id": setting,
        "time": 2e9,
    }
    write(mirrored, lines(1, 12), [final])
    result = {"schema": 1, "run_id": mirrored.run_id, "eval_id": setting, "complete": True, "metrics": {"AP": 50.0}}
    write_json(mirrored.evaluation(setting) / "result.json", result)
    sync.sync(store)
    assert history()[("AP", 12, 50.0)] == 1
    client = MlflowClient(sync.default_uri(store.root))
    (run,) = client.search_runs([present(client.get_experiment_by_name("shapes/mini")).experiment_id])
    assert run.info.status == "FINISHED"


def test_only_one_process_mirrors(store: Store, mirrored: RunDir) -> None:
    claim = claims.acquire(store.root / "mlflow" / "claims")
    assert claim is not None
    with pytest.raises(UserError, match="another process mirrors this store"):
        sync.sync(store, patience=0)
    assert sync.start_background_sync(store.root) is None
    threading.Timer(0.3, claim.release).start()
    assert sync.sync(store).runs == 1, "it waits for one that is about to end"


def test_a_server_that_is_not_there_is_one_line_and_hides_the_password(store: Store, mirrored: RunDir) -> None:
    write(mirrored, lines(1, 4))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"MLflow at http://127.0.0.1:9 failed .* mpformer mlflow sync") as caught:
        sync.sync(store, "http://someone:secret@127.0.0.1:9")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert time.monotonic() - started < 60
    assert claims.holder(store.root / "mlflow" / "claims") is None, "free for the next try"


def test_a_store_without_runs_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no runs in"):
        sync.sync(Store(tmp_path / "nothing"))


def test_background_process_copies_and_ends_by_itself(store: Store, mirrored: RunDir, history: Any) -> None:
    write(mirrored, lines(1, 10))
    process = sync.start_background_sync(store.root, niceness=0)
    assert process is not None
    assert process.wait(200) == 0, (store.root / "mlflow" / "sync.log").read_text()
    assert history() == expected(lines(1, 10))


def test_growth_costs_the_new_lines_alone(store: Store, mirrored: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    write(mirrored, lines(1, 10))
    sync.one_pass(restarted(store), store, sync.default_uri(store.root))
    for line in lines(11, 12):
        append_json(mirrored.metrics, line)
    mirror, uri = restarted(store), sync.default_uri(store.root)
    monkeypatch.setattr(mirror.client, "create_run", lambda *_, **__: pytest.fail("sent anew"))
    added = sync.one_pass(mirror, store, uri).metrics
    assert added == len(expected(lines(11, 12)))
    assert (
        checksum(mirrored.metrics.read_bytes().splitlines(keepends=True)[-1])
        == read_json(mirrored.path / "mlflow.json")["servers"][uri]["line"]
    )
