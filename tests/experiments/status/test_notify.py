"""Notifications: a command or a webhook, once an event, and again only if it failed."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from experiments.launch import begin
from experiments.status import notify, standing
from experiments.status.states import State
from experiments.store import claims
from experiments.store.attempt_dir import Progress
from experiments.store.files import write_json
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan


@pytest.fixture
def launched(plan: Plan, store: Store, tmp_path: Path) -> Callable[[str], Path]:
    """A launch of the plan whose profile has somebody to notify."""
    begin.record(plan, store, "")

    def launch(target: str) -> Path:
        about = {"suite": "headline", "scale": "mini", "dataset": "shapes", "notify": target}
        write_json(store.launches / "l" / "launch.json", {**about, "runs": [run.run_id for run in plan.unique]})
        return store.launches / "l"

    return launch


def _standing(plan: Plan, store: Store) -> standing.Standing:
    return standing.look(store, [(run.run_id, run.eval_id) for run in plan.unique])


def test_a_command_is_notified_of_the_end_once_and_no_shell_reads_it(
    plan: Plan, store: Store, tmp_path: Path, launched: Callable[[str], Path]
) -> None:
    out, hit = tmp_path / "out $(touch x); it's", tmp_path / "hit"
    script = tmp_path / "tell"
    script.write_text('#!/bin/sh\n{ cat; echo; echo "$MPFORMER_TEXT"; } >> "$1"\n')
    script.chmod(0o755)
    launched(f'{script} "{out}" ; touch {hit}')
    assert notify.check(store, _standing(plan, store)) == []
    assert notify.check(store, _standing(plan, store)) == []
    message, text = out.read_text().splitlines()
    assert json.loads(message)["event"] == "ended"
    assert json.loads(message)["counts"] == {"PLANNED": 4}
    assert text == "mpformer: headline@mini on shapes has ended: 4 PLANNED"
    assert not hit.exists(), "; is an argument like any other"


def test_no_notification_goes_out_while_something_works(
    plan: Plan, store: Store, launched: Callable[[str], Path]
) -> None:
    directory = launched("/bin/false")
    claim = claims.acquire(store.run(plan.unique[0].run_id).path / "claims")
    assert claim is not None
    assert notify.check(store, _standing(plan, store)) == []
    assert not (directory / notify.MARKERS).exists()


def test_a_notification_that_failed_is_said_and_tried_again(
    plan: Plan, store: Store, launched: Callable[[str], Path]
) -> None:
    launched("/bin/sh -c 'echo no network >&2; exit 3'")
    for _ in range(2):
        (line,) = notify.check(store, _standing(plan, store))
        assert line == "headline has ended, but its profile's notify failed: no network"


def test_held_jobs_and_silent_runs_are_a_stall(
    plan: Plan, store: Store, tmp_path: Path, launched: Callable[[str], Path]
) -> None:
    directory = launched("/bin/true")
    found = _standing(plan, store)
    held = {
        key: replace(
            state, state=State.QUEUED, detail="held (JobHeldUser): scontrol release 1_0", live=True, stuck=True
        )
        for key, state in found.states.items()
    }
    assert notify.check(store, standing.Standing(held)) == []
    (marker,) = (directory / notify.MARKERS).iterdir()
    assert marker.name.startswith("stalled-")
    notify.check(store, standing.Standing(held))
    assert len(list((directory / notify.MARKERS).iterdir())) == 1
    waiting = {key: replace(state, detail="Priority", stuck=False) for key, state in held.items()}
    silent = {
        key: replace(
            state, state=State.RUNNING, detail="train", progress=Progress(time=time.time() - 2 * notify.STALLED)
        )
        for key, state in held.items()
    }
    notify.check(store, standing.Standing(waiting))
    assert len(list((directory / notify.MARKERS).iterdir())) == 1
    notify.check(store, standing.Standing(silent))
    assert len(list((directory / notify.MARKERS).iterdir())) == 2


class _Hook(BaseHTTPRequestHandler):
    received: list[Any] = []  # noqa: RUF012

    def do_POST(self) -> None:
        self.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def webhook() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook"
    server.shutdown()
    server.server_close()


def test_a_webhook_gets_the_event(
    plan: Plan, store: Store, webhook: str, launched: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    launched(webhook)
    assert notify.check(store, _standing(plan, store)) == []
    (message,) = _Hook.received
    assert message["text"].endswith("has ended: 4 PLANNED")
    assert message["suite"] == "headline"
