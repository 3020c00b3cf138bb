"""What the page says about one run: what it changed, which code and machine made it, and how to repeat it."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from experiments import usage
from reports import caption, chart
from reports.collect import RowRuns, SuiteReport
from reports.escape import slug
from reports.runs import Attempt, RunView


@dataclass(frozen=True)
class Change:
    """A configuration key whose value differs from the baseline row's."""

    key: str
    baseline: str
    here: str


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def changes(here: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[Change]:
    """The keys that differ between two flat configurations, seed apart."""
    keys = [key for key in dict.fromkeys([*here, *baseline]) if key != "seed"]
    differ = [key for key in keys if here.get(key, _ABSENT) != baseline.get(key, _ABSENT)]
    return [Change(key, *(_shown(tree.get(key, _ABSENT)) for tree in (baseline, here))) for key in differ]


_ABSENT = object()


def _shown(value: Any) -> str:
    return "—" if value is _ABSENT else _json(value)


def _json(value: Any) -> str:
    """A value as JSON; plain ones are asked for again and again."""
    if isinstance(value, list | dict):
        return json.dumps(value)
    return _plain_json(type(value).__name__, value)


@cache
def _plain_json(_: str, value: Any) -> str:
    return json.dumps(value)  # by type too: 1, 1.0 and True are equal, and written differently


def repeat_command(record: Mapping[str, Any], row: RowRuns, view: RunView) -> str:
    """Shell lines that check out the code and repeat the run; every word quoted."""
    words = ["mpformer", "launch", record["suite"], "--scale", record["scale"]]
    if record.get("dataset"):
        words += ["--dataset", record["dataset"]]
    words += ["--row", row.name, "--seed", str(view.seed)]
    for key, value in (record.get("overrides") or {}).items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    command = shlex.join([*words, "--inline"])
    if not view.commits:
        return command
    commit = view.commits[-1]
    dirty = "  # and apply the uncommitted changes below" if commit.dirty else ""
    return f"git checkout {shlex.quote(commit.sha)}{dirty}\n{command}"


@dataclass(frozen=True)
class RunSection:
    """One run, ready for the page."""

    anchor: str
    view: RunView
    row: RowRuns
    repeat: str
    changes: tuple[Change, ...]
    curve: str
    facts: tuple[tuple[str, str], ...]
    diff: str
    config: str
    metrics: tuple[tuple[str, str], ...]

    @property
    def last_attempt(self) -> Attempt | None:
        """The attempt whose log is shown."""
        return self.view.attempts[-1] if self.view.attempts else None


def anchor(view: RunView) -> str:
    """The run's place on the page."""
    return f"run-{slug(view.run_id)}-{slug(view.eval_id)}"


def section(report: SuiteReport, row: RowRuns, view: RunView) -> RunSection:
    """Everything that the page says about a run."""
    base, here = _baseline_config(report, row, view.seed), flat(view.config)
    return RunSection(
        anchor(view),
        view,
        row,
        repeat_command(report.record, row, view),
        tuple(changes(here, base)) if base and here else (),
        chart.training_curve(view.lines, view.max_iter),
        tuple(_facts(view)),
        _diff(view),
        "\n".join(f"{key} = {_json(value)}" for key, value in here.items()),
        tuple(
            (key, f"{value:.2f}") for key, value in (view.result or {}).get("metrics", {}).items() if value is not None
        ),
    )


def _baseline_config(report: SuiteReport, row: RowRuns, seed: int) -> Mapping[str, Any]:
    """The flat configuration of the row's baseline, of this seed if there is one; empty for a baseline itself."""
    baseline = report.baseline_of(row)
    views = baseline.views if baseline else ()
    found = next((view for view in sorted(views, key=lambda view: view.seed != seed) if view.config), None)
    return flat(found.config) if found else {}


def _diff(view: RunView) -> str:
    git = view.provenance.get("git") or {}
    text = str(git.get("diff") or "")
    if git.get("diff_truncated"):
        text += "\n… (the rest was not kept)"
    if git.get("untracked"):
        text += "\nuntracked: " + ", ".join(git["untracked"])
    return text.strip("\n")


def _facts(view: RunView) -> list[tuple[str, str]]:
    found = view.provenance
    used = usage.of(view.directory)
    packages = ", ".join(f"{name} {version}" for name, version in (found.get("packages") or {}).items())
    facts = {
        "state": view.standing.state + (f" ({view.standing.reason})" if view.standing.reason else ""),
        "evaluation setting": view.eval_id,
        "commit": ", ".join(commit.label for commit in view.commits),
        "command": _command(found.get("command")),
        "host": str(found.get("host") or ""),
        "hardware": caption.hardware(found),
        "platform": str(found.get("platform") or ""),
        "Python": str(found.get("python") or ""),
        "packages": packages,
        "world size": str(found.get("world_size") or ""),
        "job": str(found.get("job_id") or ""),
        "trained in": _duration(view.trained.get("seconds")),
        "peak memory": _gib(view.trained.get("peak_memory_bytes")),
        "used": used.text() if used else "",
        "weights": str(view.trained.get("weights_sha256") or "")[:16],
        "scored with": _scorers(view),
    }
    return [(name, value) for name, value in facts.items() if value]


def _scorers(view: RunView) -> str:
    scorers = (view.result or {}).get("scorers") or {}
    return ", ".join(f"{name} {version}" for name, version in scorers.items())


def _command(words: Any) -> str:
    return shlex.join(map(str, words)) if isinstance(words, list) else str(words or "")


def _duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _gib(size: float | None) -> str:
    return f"{size / 2**30:.2f} GiB" if size else ""
