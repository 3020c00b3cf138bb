"""Notifications that a suite has ended or stalls: one command or webhook of the profile, once an event.

A command gets the event as JSON on its standard input and its one-line text in ``MPFORMER_TEXT``; it is split into
words as a shell would, and no shell sees it. A webhook gets the same JSON by POST; ``text`` is what chat services show.
Every look at a store sends them: the report job of a launch, ``status``, ``status --watch`` and ``launch``.
"""

import contextlib
import hashlib
import json
import os
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.status import standing
from experiments.status.states import RunState, State
from experiments.store import claims
from experiments.store.launches import LaunchRecord, recorded
from experiments.store.run_dir import Store

STALLED = 1800.0
"""Seconds without an iteration or an evaluated image after which a running run counts as stuck."""

MARKERS = "notified"
"""Folder of a launch that holds an empty file for each event of which a notification was sent."""

PATIENCE = 30.0
"""Seconds that a command or webhook may take."""


def check(store: Store, found: standing.Standing) -> list[str]:
    """Notify of every launch among whose runs nothing moves any more; returns a line for each notification that failed.

    ``found`` are the states of runs at their evaluation settings; launches with runs that are not in it are left alone.
    """
    states = {run_id: state for (run_id, _), state in found.states.items()}
    troubles = []
    for launch, record in recorded(store):
        if record.notify and not (launch.path / MARKERS / "ended").exists():
            mine = [states[run_id] for run_id in record.runs if run_id in states]
            event = _event(mine) if mine and len(mine) == len(record.runs) else ""
            if event:
                troubles.append(_once(launch.path, event, record, mine))
    return [line for line in troubles if line]


def _event(states: Sequence[RunState]) -> str:
    """``ended`` if nothing is left to wait for, ``stalled`` if what is waited for does not move; else empty."""
    active = [state for state in states if state.active]
    if not active:
        return "ended"
    return "stalled" if all(_stuck(state) for state in active) else ""


def _stuck(state: RunState) -> bool:
    if state.state is State.RUNNING:
        beat = state.progress.time
        return beat is not None and time.time() - beat > STALLED
    return state.stuck


def _once(directory: Path, event: str, launch: LaunchRecord, states: Sequence[RunState]) -> str:
    """Notify unless it was done before: a marker made with O_EXCL says so; it goes if that failed."""
    stuck = "".join(f"{state.run_id}{state.label}" for state in states if state.active)
    name = event if event == "ended" else f"{event}-{hashlib.sha256(stuck.encode()).hexdigest()[:12]}"
    marker = directory / MARKERS / name
    with contextlib.suppress(OSError):  # a store that cannot be written: better not at all than at each look
        marker.parent.mkdir(exist_ok=True)
        if not claims.create(marker, ""):
            return ""
        trouble = send(launch.notify or "", _message(event, directory.name, launch, states))
        if trouble:
            marker.unlink()
            return f"{launch.suite} has {event}, but its profile's notify failed: {trouble}"
    return ""


def _message(event: str, name: str, launch: LaunchRecord, states: Sequence[RunState]) -> dict[str, Any]:
    counts = Counter(state.label for state in states)
    suite = f"{launch.suite}@{launch.scale} on {launch.dataset}"
    text = f"mpformer: {suite} has {event}: {', '.join(f'{count} {label}' for label, count in counts.items())}"
    runs = [{"run_id": state.run_id, "state": state.label, "detail": state.detail} for state in states]
    about = {"suite": launch.suite, "scale": launch.scale, "dataset": launch.dataset}
    return {"event": event, "text": text, **about, "launch": name, "counts": counts, "runs": runs}


def send(target: str, message: Mapping[str, Any]) -> str:
    """Call the command or webhook; returns one line if that failed."""
    import urllib.request  # takes a while to import, and `status` starts in less

    data = json.dumps(message).encode()
    try:
        if target.startswith(("http://", "https://")):
            request = urllib.request.Request(target, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=PATIENCE):
                return ""
        return _run(target, data, str(message["text"]))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())[:200]


def _run(command: str, data: bytes, text: str) -> str:
    environment = {**os.environ, "MPFORMER_TEXT": text}
    done = subprocess.run(shlex.split(command), input=data, env=environment, capture_output=True, timeout=PATIENCE)
    if done.returncode == 0:
        return ""
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"exit code {done.returncode}"
