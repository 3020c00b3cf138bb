"""The evaluation lines of a run's ``metrics.jsonl``, the file that MLflow mirrors."""

import json
from pathlib import Path
from typing import Any

from experiments.store.files import unless_kept


def last_evaluation(metrics: Path, tail: int = 262144) -> dict[str, Any]:
    """Return the last evaluation line of a ``metrics.jsonl``, looking at its last ``tail`` bytes at most."""
    return unless_kept(metrics, "last evaluation", lambda: _last_evaluation(metrics, tail), {})


def _last_evaluation(metrics: Path, tail: int) -> dict[str, Any]:
    try:
        with metrics.open("rb") as file:
            end = file.seek(0, 2)
            size = 4096
            while True:
                file.seek(max(0, end - size))
                found = _last_of(file.read(end - max(0, end - size)), whole=size >= end)
                if found or size >= min(end, tail):
                    return found
                size *= 4
    except OSError:
        return {}


def _last_of(text: bytes, whole: bool) -> dict[str, Any]:
    """The last evaluation among the lines; unless it is the whole file, the first line is cut off."""
    for line in reversed(text.splitlines()[0 if whole else 1 :]):
        if b'"evaluation"' in line and (parsed := _parsed(line)):
            return parsed
    return {}


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
