"""A real MLflow server that dies while runs are being mirrored, a mirroring process that is killed, and a training that
is killed too and resumed.
"""

import contextlib
import io
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.launch import inputs, local, watching
from experiments.launch.machine import Width
from experiments.store.files import append_json, read_json
from experiments.store.identity import eval_id
from experiments.store.launches import LaunchDir
from experiments.store.run_dir import RunDir, Store
from experiments.suites import planning
from experiments.suites.planning import Plan, Request
from experiments.tracking import server as mirror
from experiments.tracking import sync
from mpformer.runtime.errors import UserError
from tests.support.run_directory_page import unknown_files
from tests.support.small_runs import Paced

pytestmark = pytest.mark.slow

ITERATIONS = 1500

_WITHOUT_JOBS = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""The server's job executor is half of its start-up, and of no use here."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """``mlflow server`` on SQLite, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder, env=_WITHOUT_JOBS
            )
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def metrics(self) -> Counter[tuple[str, int, float]]:
        """Every row of the server's own table, duplicates included; those of runs that were deleted are in its bin."""
        rows = "select key, step, value from metrics join runs using (run_uuid) where lifecycle_stage = 'active'"
        with contextlib.closing(sqlite3.connect(self.folder / "mlflow.db")) as database:
            return Counter(database.execute(rows).fetchall())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "server")
    try:
        made.start()
        yield made
    finally:
        made.kill()


def loss(iteration: int) -> float:
    return random.Random(iteration).random()


def write_slowly(run: RunDir, ended: threading.Event) -> None:
    """What a training does, compressed: a line every few milliseconds."""
    for i in range(1, ITERATIONS + 1):
        append_json(run.metrics, {"kind": "train", "iteration": i, "loss": loss(i), "lr": 1 / i, "time": time.time()})
        time.sleep(0.004)
    ended.set()


def sync_process(store: Store, url: str) -> subprocess.Popen[bytes]:
    code = (
        "from experiments.tracking import sync; from experiments.store.run_dir import Store; from pathlib import Path\n"
    )
    code += f"s = Store(Path({str(store.root)!r})); m = sync.connect(s, {url!r})\n"
    code += f"while True: sync.one_pass(m, s, {url!r}); print('pass', flush=True)"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def sync_until_it_fails(store: Store, server: Server) -> None:
    threading.Timer(0.2, server.kill).start()
    while True:
        sync.sync(store, server.url)


def test_a_server_that_dies_and_comes_back_holds_every_metric_once(
    server: Server, store: Store, one: RunDir, plan: Any
) -> None:
    planning.write_record(plan, store, "")
    ended = threading.Event()
    writer = threading.Thread(target=write_slowly, args=(one, ended), daemon=True)
    writer.start()

    killed = sync_process(store, server.url)  # a mirroring process, killed while it copies
    assert killed.stdout is not None
    assert killed.stdout.readline() == b"pass\n"
    time.sleep(0.3)
    killed.kill()
    killed.wait()

    with pytest.raises(UserError, match="no run is affected"):  # the server, killed while a synchronisation runs
        sync_until_it_fails(store, server)
    server.kill()
    server.start()

    writer.join()
    assert ended.is_set(), "the writer was never held up"
    sync.sync(store, server.url)
    assert sync.sync(store, server.url).metrics == 0
    found = server.metrics()
    assert set(found.values()) == {1}
    losses = {step: value for key, step, value in found if key == "loss"}
    assert losses == {i: loss(i) for i in range(1, ITERATIONS + 1)}
    assert len(found) == 2 * ITERATIONS


SMALL: dict[str, Any] = {
    "dataset.shapes.side": 64,
    "dataset.shapes.train_images": 8,
    "dataset.shapes.val_images": 4,
    "model.decoder_layers": 3,
    "model.queries": 8,
    "model.train_points": 64,
    "schedule.batch_size": 1,
    "schedule.max_iter": 80,
    "runtime.checkpoint_period": 10,
    "runtime.eval_period": 40,
    "runtime.log_period": 1,
    "runtime.probe_images": 2,
}


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Plan, Path]:
    """One piloted run of a real model, its dataset prepared; and where the datasets are."""
    data = tmp_path / "data"
    request = Request("headline", rows=("mp-former",), seeds=(0,), overrides=tuple(SMALL.items()))
    return inputs.prepare_data(planning.make(request, data)), data


@contextlib.contextmanager
def mirroring(store: Store, url: str) -> Iterator[None]:
    """Mirror again and again meanwhile, whatever becomes of the server."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            with contextlib.suppress(UserError):
                sync.sync(store, url, patience=0)
            time.sleep(0.3)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def written(run: RunDir) -> int:
    return run.metrics.read_text().count("\n") if run.metrics.exists() else 0


def checkpoints(run: RunDir) -> list[Path]:
    return list((run.path / "checkpoints").glob("iteration_*"))


def wait(moment: Any, what: str) -> None:
    end = time.monotonic() + 400
    while not moment():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def kill_training(started: Any, run: RunDir) -> None:
    """SIGKILL the attempt and what started it, without a chance to say anything."""
    number = max(run.attempts())
    for worker in LaunchDir(started.directory).live_workers():
        os.kill(worker, signal.SIGSTOP)
    assert not (run.path / "claims" / f"{number}.released").exists(), "the training was over before it was killed"
    os.kill(read_json(run.path / "claims" / str(number))["pid"], signal.SIGKILL)
    assert checkpoints(run), "something to resume from"
    started.kill()
    wait(lambda: not started.working(), "the workers never ended")


def mpformer(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "experiments.cli.main", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_training_killed_and_resumed_while_its_server_dies_is_there_once(
    server: Server, trained: tuple[Plan, Path], tmp_path: Path
) -> None:
    plan, _ = trained
    store = Store(tmp_path / "store")
    run = store.run(plan.runs[0].run_id)

    with mirroring(store, server.url):
        # slowed down: a quick training would be over before a slow server had told of it
        started = local.launch(plan, store, width=Width(1, 1), runner=Paced(0.1))
        wait(server.metrics, "nothing was mirrored while it trained")
        server.kill()
        before = written(run)
        wait(lambda: written(run) > before + 12, "the training was held up by the dead server")
        wait(lambda: checkpoints(run), "no checkpoint was written")
        kill_training(started, run)
        server.start()
        watching.follow(plan, store, local.launch(plan, store, width=Width(1, 1)), Console(file=io.StringIO()))

    mpformer("mlflow", "sync", "--root", str(store.root), "--uri", server.url)
    assert run.attempts() == [1, 2]
    setting = eval_id(run.config())
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    expected = {(value.key, value.step): value.value for line in lines for value in mirror.values(line, setting)}
    found = server.metrics()
    assert set(found.values()) == {1}
    assert len(found) == len(expected), "one value a key and step"
    held = {(key, step): value for key, step, value in found}
    assert held == expected
    assert ("AP", 80) in held, "the final score"

    # the report is there too, and the run's page leads to the run on the server
    mpformer("report", "headline", "--root", str(store.root))
    mpformer("mlflow", "sync", "--root", str(store.root), "--uri", server.url)
    files = {path.name for path in (server.folder / "artifacts").rglob("*")}
    assert {"table.md", "table.tex", "macros.tex", "table.csv", "table.json", "index.html", "training.svg"} <= files
    assert {"training.pdf", "training.png", "training.csv"} <= files
    mpformer("report", "headline", "--root", str(store.root))
    (page,) = (store.root / "reports" / "headline@mini" / "runs").glob("*.html")
    address = page.read_text().partition(f'href="{server.url}/#/experiments/')[2].partition('"')[0]
    experiment, _, identifier = address.partition("/runs/")
    with urllib.request.urlopen(f"{server.url}/api/2.0/mlflow/runs/get?run_id={identifier}", timeout=60) as answer:
        about = json.load(answer)["run"]["info"]
    assert (about["experiment_id"], about["run_name"], about["status"]) == (experiment, run.run_id, "FINISHED")
    unknown = [name for name in unknown_files(store.root) if not name.endswith("/witness.jsonl")]  # the test's own
    assert unknown == [], "docs/run_directory.md names every file"
