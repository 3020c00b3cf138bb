"""What a run's page says: what it changed, which code and machine made it, and how to repeat it."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from analysis.architecture import architecture
from experiments.status import usage
from experiments.store import mlflow_record
from experiments.store.mlflow_record import Copied
from experiments.store.suite_record import SuiteRecord
from mpformer.config.dotted import MISSING, difference
from reports import caption, chart
from reports.collect import RowRuns, SuiteReport, trusted
from reports.escape import clean, slug
from reports.model import Kind
from reports.runs import Attempt, Commit, RunView


@dataclass(frozen=True)
class Change:
    """A configuration key whose value differs from the baseline row's."""

    key: str
    baseline: str
    here: str


def changes(here: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[Change]:
    """The keys that differ between two flat configurations, seed apart."""
    found = difference(here, baseline, MISSING)
    return [Change(key, _shown(theirs), _shown(mine)) for key, (mine, theirs) in found.items() if key != "seed"]


def _shown(value: Any) -> str:
    return "—" if value is MISSING else _json(value)


def _json(value: Any) -> str:
    """A value as JSON; plain ones are asked for again and again."""
    if isinstance(value, list | dict):
        return json.dumps(value)
    return _plain_json(type(value).__name__, value)


@cache
def _plain_json(_: str, value: Any) -> str:
    return json.dumps(value)  # by type too: 1, 1.0 and True are equal, and written differently


def repeat_command(record: SuiteRecord, row: RowRuns, view: RunView) -> str:
    """Shell lines that check out the code and repeat one run in the foreground; every word quoted."""
    command = shlex.join([*_launch(record, row, view), "--seed", str(view.seed), "--inline"])
    return "\n".join([*_checkout(view.commits[-1:]), command])


def repeat_row(record: SuiteRecord, row: RowRuns) -> str:
    """Shell lines that repeat every number of a row: all its seeds, trained by the commits that trained them."""
    seeds = ",".join(str(view.seed) for view in row.views)
    commits = list(dict.fromkeys(view.commits[-1] for view in row.views if view.commits))
    return "\n".join([*_checkout(commits), shlex.join([*_launch(record, row, row.views[0]), "--seeds", seeds])])


def _launch(record: SuiteRecord, row: RowRuns, view: RunView) -> list[str]:
    """The launch of a row into a store of its own, since the run's store has the runs already."""
    root = view.directory.root.resolve()
    words = ["mpformer", "launch", record.suite]
    if record.file and not record.package:
        words += ["--suites", str(root / record.file)]
    words += ["--scale", record.scale]
    if record.dataset:
        words += ["--dataset", record.dataset]
    words += ["--row", row.name]
    for key, value in record.overrides.items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    if record.data_root:
        words += ["--root", f"{root}-repeated", "--data-root", record.data_root]
    return words


def _checkout(commits: Sequence[Commit]) -> list[str]:
    """One line a commit; all but the first are comments, for one checkout cannot be two."""
    lines = []
    for number, commit in enumerate(commits):
        dirty = "  # and apply the uncommitted changes of the run's page" if commit.dirty else ""
        lines.append(("# some seeds: " if number else "") + f"git checkout {shlex.quote(commit.sha)}{dirty}")
    return lines


@dataclass(frozen=True)
class Mirrored:
    """Where a run is on an MLflow server: an address for a browser, or how to open the database that it is in."""

    server: str
    run: str
    address: str = ""
    command: str = ""


def mlflow_runs(view: RunView) -> tuple[Mirrored, ...]:
    """The run on every MLflow server that it was copied to, from what the mirror wrote (``mlflow.json``)."""
    return tuple(_mirrored(uri, copied) for uri, copied in mlflow_record.copies(view.directory).items())


def _mirrored(uri: str, copied: Copied) -> Mirrored:
    run, experiment = copied.mlflow_run, copied.experiment
    if not uri.startswith(("http://", "https://")):
        return Mirrored(uri, run, command=f"mlflow ui --backend-store-uri {shlex.quote(uri)}")
    place = f"experiments/{quote(experiment, '')}/runs/{quote(run, '')}" if experiment else ""
    return Mirrored(uri, run, address=f"{uri.rstrip('/')}/#/{place}")


@dataclass(frozen=True)
class RunSection:
    """One run as its page shows it: what is not asked for is not made."""

    report: SuiteReport
    row: RowRuns
    view: RunView

    @property
    def file(self) -> str:
        """The run's page, from the page of its suite; stable, so that it can be linked to."""
        return f"runs/{slug(self.view.run_id)}-{slug(self.view.eval_id)}.html"

    @property
    def repeat(self) -> str:
        """The commands that repeat the run."""
        return repeat_command(self.report.record, self.row, self.view)

    @property
    def repeat_row(self) -> str:
        """The commands that repeat its row."""
        return repeat_row(self.report.record, self.row)

    @property
    def toggles(self) -> list[tuple[str, str]]:
        """The row's toggles, by name."""
        return [(key, _json(value)) for key, value in self.row.toggles.items()]

    @cached_property
    def changes(self) -> list[Change]:
        """In what the run's configuration differs from that of its row's baseline."""
        base = _baseline_config(self.report, self.row, self.view.seed)
        return changes(self.view.flat, base) if base and self.view.flat else []

    @cached_property
    def curves(self) -> tuple[Markup, ...]:
        """Loss and scores over iterations."""
        return chart.curves(self.view.lines, self.view.max_iter)

    @cached_property
    def facts(self) -> list[tuple[str, str]]:
        """Where the run comes from, by name."""
        return _facts(self.view)

    @cached_property
    def mlflow(self) -> tuple[Mirrored, ...]:
        """The run's copies."""
        return mlflow_runs(self.view)

    @cached_property
    def diff(self) -> str:
        """The uncommitted changes."""
        return _diff(self.view)

    @cached_property
    def config(self) -> str:
        """The full configuration, a key a line."""
        return "\n".join(f"{key} = {_json(value)}" for key, value in self.view.flat.items())

    @cached_property
    def metrics(self) -> list[tuple[str, str]]:
        """The numbers of its result, by name."""
        found = (self.view.result or {}).get("metrics", {})
        return [(key, f"{value:.2f}") for key, value in found.items() if value is not None]

    @cached_property
    def architecture(self) -> Markup:
        """The drawing of the model; empty where nothing is known of it yet."""
        layers = self.view.config.get("model", {}).get("decoder_layers")
        toggles = {key: clean(value) if isinstance(value, str) else value for key, value in self.row.toggles.items()}
        return Markup(architecture(toggles, int(layers)) if toggles and layers else "")

    @property
    def kind(self) -> Kind:
        """What its numbers are: results only where the run counts."""
        if self.view.void is not None:
            return Kind.VOID
        return Kind.VALUE if trusted(self.view) else Kind.STALE

    @property
    def anchor(self) -> str:
        """The run's line on the page of its suite."""
        return f"run-{slug(self.view.run_id)}-{slug(self.view.eval_id)}"

    @property
    def last_attempt(self) -> Attempt | None:
        """The attempt whose log is shown."""
        return self.view.attempts[-1] if self.view.attempts else None


def sections(report: SuiteReport) -> list[tuple[RowRuns, list[RunSection]]]:
    """The runs of every row, in table order."""
    return [(row, [RunSection(report, row, view) for view in row.views]) for row in report.rows]


def _baseline_config(report: SuiteReport, row: RowRuns, seed: int) -> Mapping[str, Any]:
    """The flat configuration of the row's baseline, of this seed if there is one; empty for a baseline itself."""
    baseline = report.baseline_of(row)
    views = baseline.views if baseline else ()
    found = next((view for view in sorted(views, key=lambda view: view.seed != seed) if view.config), None)
    return found.flat if found else {}


def _diff(view: RunView) -> str:
    git = view.provenance.git
    text = git.diff
    if git.diff_truncated:
        text += "\n… (the rest was not kept)"
    if git.untracked:
        text += "\nuntracked: " + ", ".join(git.untracked)
    return text.strip("\n")


def _facts(view: RunView) -> list[tuple[str, str]]:
    found, said = view.provenance, view.trained.more.get("numerics")
    numerics = said if isinstance(said, Mapping) else {}
    packages = ", ".join(f"{name} {version}" for name, version in found.packages.items())
    facts = {
        "state": view.standing.state + (f" ({view.standing.reason})" if view.standing.reason else ""),
        "evaluation setting": view.eval_id,
        "commit": ", ".join(commit.label for commit in view.commits),
        "command": shlex.join(found.command),
        "host": found.host,
        "hardware": caption.hardware(found),
        "platform": found.platform,
        "Python": found.python,
        "packages": packages,
        "world size": str(found.world_size or ""),
        "threads": str(found.threads or ""),
        "jobs": ", ".join(dict.fromkeys(filter(None, (attempt.job for attempt in view.attempts)))),
        "used": used.text() if (used := usage.used_by(view.directory)) else "",
        "trained in": _duration(view.trained.seconds),
        "so far": _so_far(view) if view.trained.seconds is None else "",
        "peak memory of training": _gib(view.trained.peak_memory_bytes),
        "evaluated in": _duration((view.result or {}).get("seconds")),
        "peak memory of evaluation": _gib((view.result or {}).get("peak_memory_bytes")),
        "resumed training": str(numerics.get("resume") or ""),
        "numerics": "; ".join(f"{name}: {value}" for name, value in numerics.items() if name != "resume"),
        "weights": view.trained.weights_sha256[:16],
        "scored with": _scorers(view),
    }
    return [(name, value) for name, value in facts.items() if value]


def _so_far(view: RunView) -> str:
    """The seconds of an iteration as logged, from the first line on."""
    known = [line["seconds"] for line in view.lines if isinstance(line.get("seconds"), int | float)]
    return f"{sum(known) / len(known):.3g} s an iteration, up to iteration {view.iteration}" if known else ""


def _scorers(view: RunView) -> str:
    scorers = (view.result or {}).get("scorers") or {}
    return ", ".join(f"{name} {version}" for name, version in scorers.items())


def _duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _gib(size: float | None) -> str:
    return f"{size / 2**30:.2f} GiB" if size else ""
