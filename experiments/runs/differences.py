"""How two runs differ: their configurations, then the code, packages and threads of their last attempts."""

import hashlib
from typing import Any

from experiments.store.run_dir import RunDir
from mpformer.config import dotted
from mpformer.config.dotted import leaves


def difference(first: RunDir, second: RunDir) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two runs, by dotted key: configuration, then code, packages and threads."""
    return dotted.difference(_described(first), _described(second))


def _described(run: RunDir) -> dict[str, Any]:
    flat = dict(leaves(run.record().config))
    last = run.last_attempt()
    origin = last.provenance() if last is not None else None
    if origin is not None:
        about = {"git.sha": origin.git.sha, "git.diff": _digest(origin.git.diff), "threads": origin.threads}
        packages = {f"package.{name}": version for name, version in origin.packages.items()}
        flat |= about | packages | {"python": origin.python, "processor": origin.processor}
    return flat


def _digest(text: str | None) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12] if text else "clean"
