"""MLflow as a mirror of the run store: filled in by one process, at any time, never in the way of training.

Nothing that trains talks to MLflow. ``launch`` starts one process of low priority (:func:`start_background_sync`) that
copies what the runs write; ``mpformer mlflow sync`` (:func:`sync`) does the same by hand and completes what is missing.
The default is a SQLite file in the run store; a server is named by ``--uri`` or ``MLFLOW_TRACKING_URI``.
"""

import contextlib
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.status.states import State, derive
from experiments.store import claims
from experiments.store.identity import eval_id
from experiments.store.launches import queued_runs
from experiments.store.run_dir import RunDir, Store
from mpformer.config.schema import validate
from mpformer.runtime import code
from mpformer.runtime.errors import UserError

if TYPE_CHECKING:
    from experiments.tracking.server import Mirror

_log = logging.getLogger(__name__)

PERIOD = 10.0
"""Seconds between two passes of the background process."""

LOWEST = 19
"""Niceness of the background process."""

RETRY_PERIOD = 60.0
"""Seconds until it tries again after a failure."""

_PASSWORD = re.compile(r"//[^/\s]+@")

_STATUS = {State.DONE: "FINISHED", State.FAILED: "FAILED", State.VOID: "KILLED", State.CANCELLED: "KILLED"}
_STATUS |= {State.TIMEOUT: "KILLED", State.LOST: "KILLED"}


@dataclass(frozen=True)
class Summary:
    """What one synchronisation did."""

    uri: str
    runs: int
    metrics: int
    artifacts: int
    damaged: int = 0

    def __str__(self) -> str:
        lost = f"; {self.damaged} damaged lines skipped" if self.damaged else ""
        done = f"{self.runs} runs up to date, {self.metrics} metrics and {self.artifacts} report files added{lost}"
        return f"MLflow at {shown(self.uri)}: {done}"


def default_uri(root: Path) -> str:
    """Return the server to use: ``MLFLOW_TRACKING_URI``, or a SQLite file in the run store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').resolve()}"


def shown(uri: str) -> str:
    """Return an address, or a text that has one in it, without a password."""
    return _PASSWORD.sub("//", uri)


def sync(store: Store, uri: str | None = None, patience: float = 20.0) -> Summary:
    """Bring a server up to the store; can be repeated and interrupted at any moment.

    Raises UserError, one line, if the server fails or if another process mirrors this store for more than ``patience``
    seconds: the background process of a launch ends soon after its last run.
    """
    if not (store.root / "runs").is_dir():
        raise UserError(f"there are no runs in {store.root}; launch a suite, or name another store with --root")
    uri = uri or default_uri(store.root)
    with _only_one(store, patience), _one_line(uri):
        return one_pass(connect(store, uri), store, uri)


@contextlib.contextmanager
def _only_one(store: Store, patience: float = 0.0) -> Iterator[None]:
    directory = store.root / "mlflow" / "claims"
    deadline = time.monotonic() + patience
    while (claim := claims.acquire(directory)) is None and time.monotonic() < deadline:
        time.sleep(0.5)
    if claim is None:
        raise UserError(
            "another process mirrors this store to MLflow already, until its runs end; nothing needs to be done"
        )
    with claims.held(claim):
        yield


@contextlib.contextmanager
def _one_line(uri: str) -> Iterator[None]:
    """Turn what MLflow, its transport and its database raise into one line."""
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        first = shown(" ".join(str(error).split()))[:200]
        raise UserError(
            f"MLflow at {shown(uri)} failed ({first}); no run is affected, fill it in later: mpformer mlflow sync"
        ) from error


def connect(store: Store, uri: str) -> "Mirror":
    """Return the mirror of a store on a server; a server that does not answer fails soon."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    from mlflow import MlflowClient

    from experiments.tracking.server import Mirror

    for name, level in (("mlflow", logging.WARNING), ("alembic", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    (store.root / "mlflow").mkdir(parents=True, exist_ok=True)
    local = uri.startswith("sqlite:")
    artifacts = (store.root / "mlflow" / "artifacts").resolve().as_uri() if local else None
    return Mirror(MlflowClient(tracking_uri=uri), store, shown(uri), artifacts)


def one_pass(mirror: "Mirror", store: Store, uri: str) -> Summary:
    """Copy everything that is new in the store."""
    from experiments.tracking.server import Listing, listings

    where = listings(store)
    queued = queued_runs(store)
    sent, damaged, count = mirror.sent, mirror.damaged, 0
    for run in (run for run in store.runs() if run.exists() and not run.packed):
        listing = where.get(run.run_id) or Listing(f"{run.record().config['dataset']['name']}/unlisted", {})
        if not mirror.settled(run, listing):
            mirror.run(run, listing, status(run, queued))
        count += 1
    added = sum(mirror.report(*report) for report in _reports(store))
    return Summary(uri, count, mirror.sent - sent, added, mirror.damaged - damaged)


def status(run: RunDir, queued: frozenset[str]) -> str:
    """Return MLflow's word for a run's state."""
    state = derive(run, eval_id(validate(dict(run.record().config))), queued).state
    return _STATUS.get(state, "RUNNING" if state is State.RUNNING else "SCHEDULED")


def _reports(store: Store) -> Iterator[tuple[Path, str]]:
    """Yield the folders of rendered suites with their experiments."""
    for name, record in store.suites().items():
        folder = store.root / "reports" / name
        if folder.is_dir():
            yield folder, f"{record.dataset}/{record.scale}"


def start_background_sync(root: Path, niceness: int = LOWEST) -> subprocess.Popen[bytes] | None:
    """Start the mirroring process of a store, if there is none; None (and a logged warning) if that fails.

    It has the lowest priority, so that on a full machine it waits for the trainings rather than slows them.
    It ends by itself when nothing of the store is running or waiting. Its log is ``<root>/mlflow/sync.log``.
    """
    folder = root / "mlflow"
    if claims.holder(folder / "claims") is not None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "sync.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "experiments.tracking.sync", str(root.resolve()), str(niceness)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | code.environment(threads=1),
            )  # fmt: skip
    except OSError as error:
        _log.warning("MLflow is not filled in: %s; later: mpformer mlflow sync", error)
        return None


def follow(store: Store, uri: str | None = None, period: float = PERIOD) -> None:
    """Mirror the store until nothing of it is running or waiting; failures of the server are retried."""
    uri = uri or default_uri(store.root)
    with _only_one(store):
        mirror: Mirror | None = None
        while True:
            active = bool(queued_runs(store))
            try:
                with _one_line(uri):
                    mirror = mirror or connect(store, uri)
                    _log.info("%s", one_pass(mirror, store, uri))
                pause = period
            except UserError as error:
                _log.warning("%s", error)
                mirror, pause = None, RETRY_PERIOD
            if not active:
                return
            time.sleep(pause)


def main(root: str, niceness: str) -> None:
    """Entry point of the background process."""
    with contextlib.suppress(OSError):
        os.nice(int(niceness))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with contextlib.suppress(UserError):  # another process does it already
        follow(Store(Path(root)))


if __name__ == "__main__":
    main(*sys.argv[1:])
