"""The evaluation lines of a run's ``metrics.jsonl``, the file that MLflow mirrors."""

import json
from pathlib import Path
from typing import Any

from experiments.store.files import unless_kept


def evaluations(metrics: Path) -> list[dict[str, Any]]:
    """Return every evaluation line of a ``metrics.jsonl``, oldest first."""
    return unless_kept(metrics, "evaluations", lambda: _evaluations(metrics), [])


def _evaluations(metrics: Path) -> list[dict[str, Any]]:
    try:
        lines = metrics.read_bytes().splitlines()
    except OSError:
        return []
    return [parsed for line in lines if b'"evaluation"' in line and (parsed := _parsed(line))]


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
