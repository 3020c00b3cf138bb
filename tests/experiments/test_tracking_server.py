"""A real MLflow server that dies while runs are being mirrored, and a mirroring process that is killed too."""

import contextlib
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

from experiments import planning, tracking
from experiments.store import RunDir, Store, append_json
from mpformer.errors import UserError

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
        """Every row of the server's own table, duplicates included."""
        with contextlib.closing(sqlite3.connect(self.folder / "mlflow.db")) as database:
            return Counter(database.execute("select key, step, value from metrics").fetchall())


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
    code = "from experiments import tracking; from experiments.store import Store; from pathlib import Path\n"
    code += f"s = Store(Path({str(store.root)!r})); m = tracking.connect(s, {url!r})\n"
    code += f"while True: tracking.one_pass(m, s, {url!r}); print('pass', flush=True)"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def sync_until_it_fails(store: Store, server: Server) -> None:
    threading.Timer(0.2, server.kill).start()
    while True:
        tracking.sync(store, server.url)


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
    tracking.sync(store, server.url)
    assert tracking.sync(store, server.url).metrics == 0
    found = server.metrics()
    assert set(found.values()) == {1}
    losses = {step: value for key, step, value in found if key == "loss"}
    assert losses == {i: loss(i) for i in range(1, ITERATIONS + 1)}
    assert len(found) == 2 * ITERATIONS
