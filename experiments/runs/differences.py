"""How two runs differ: their configurations, then the code, packages and threads of their last attempts."""

import hashlib
from typing import Any

from experiments.store.files import read_json
from experiments.store.run_dir import RunDir
from mpformer.config.dotted import leaves


def difference(first: RunDir, second: RunDir) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two runs, by dotted key: configuration, then code, packages and threads."""
    one, two = _described(first), _described(second)
    keys = dict.fromkeys((*one, *two))
    return {key: (one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)}


def _described(run: RunDir) -> dict[str, Any]:
    flat = dict(leaves(run.record()["config"]))
    attempts = run.attempts()
    origin = read_json(run.attempt(attempts[-1]) / "provenance.json") if attempts else None
    if isinstance(origin, dict):
        git = origin.get("git") or {}
        about = {"git.sha": git.get("sha"), "git.diff": _digest(git.get("diff")), "threads": origin.get("threads")}
        packages = {f"package.{name}": version for name, version in (origin.get("packages") or {}).items()}
        flat |= about | packages | {"python": origin.get("python"), "processor": origin.get("processor")}
    return flat


def _digest(text: str | None) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12] if text else "clean"
