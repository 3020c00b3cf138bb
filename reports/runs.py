"""One run as a report sees it: state, numbers and provenance, read from plain files that may be half-written."""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import layer_table
from analysis.jumps import jump_rates
from analysis.layer_table import LayerTable
from experiments.status.scheduler import NOWHERE, Placement
from experiments.status.states import RunState, State, derive
from experiments.store import records
from experiments.store.attempt_dir import AttemptDir, AttemptRecord, FailureClass, Git, Provenance
from experiments.store.files import json_lines
from experiments.store.identity import SCHEME
from experiments.store.records import RecordError
from experiments.store.run_dir import RunDir, RunRecord, Store, Trained, Void
from mpformer.config.dotted import leaves

if TYPE_CHECKING:
    import pandas as pd

FAILURES: Mapping[FailureClass, str] = {
    FailureClass.NONE: "",
    FailureClass.OOM: "out of memory",
    FailureClass.TIMEOUT: "time limit",
    FailureClass.NAN: "non-finite loss",
    FailureClass.NODE: "node failure",
    FailureClass.DISK: "disk full",
    FailureClass.IMPORT: "import error",
    FailureClass.DATA: "bad data",
    FailureClass.CONFIG: "bad configuration",
    FailureClass.KILLED: "killed",
    FailureClass.CLAIM_LOST: "taken over by another process",
    FailureClass.CLAIMED: "another job works on it",
    FailureClass.ERROR: "error",
}


@dataclass(frozen=True)
class Standing:
    """What became of a run: its state's name, and one clause saying why there is no number yet (empty when DONE)."""

    state: str
    reason: str = ""
    short: str = ""


@dataclass(frozen=True)
class Commit:
    """The code that made a number; ``dirty`` names the uncommitted change by a digest."""

    sha: str
    dirty: str = ""

    @property
    def label(self) -> str:
        """``abcdef12`` or ``abcdef12 + changes 9a8b7c6d``."""
        return self.sha[:8] + (f" + changes {self.dirty}" if self.dirty else "")


@dataclass(frozen=True)
class Attempt:
    """One execution of a stage of a run."""

    directory: AttemptDir
    record: AttemptRecord
    provenance: Provenance | None

    @property
    def job(self) -> str:
        """The scheduler's id of the job that executed it, as the scheduler writes it; empty without one."""
        origin = self.provenance or Provenance()
        return self.record.execution.job or origin.array_id or origin.job_id


@dataclass(frozen=True)
class RunView:
    """Everything a report needs of one run at one evaluation setting. Properties read their file once, when asked."""

    seed: int
    eval_id: str
    directory: RunDir
    standing: Standing = field(default_factory=lambda: Standing("PLANNED"))
    wanted: Mapping[str, Any] = field(default_factory=dict)
    """The evaluation setting, where the suite's record has it."""

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.directory.run_id

    @cached_property
    def record(self) -> RunRecord | None:
        """What the run is; None if it was never launched, or cannot be read."""
        with contextlib.suppress(RecordError):
            return self.directory.sound_record()
        return None

    @property
    def config(self) -> Mapping[str, Any]:
        """The full configuration as plain data; empty if it is not known."""
        return self.record.config if self.record is not None else {}

    @cached_property
    def flat(self) -> Mapping[str, Any]:
        """The configuration by dotted keys."""
        return dict(leaves(self.config))

    @cached_property
    def trained(self) -> Trained:
        """How it was trained; an empty record if it is not, or cannot be read."""
        with contextlib.suppress(RecordError):
            return self.directory.trained() or Trained("")
        return Trained("")

    @cached_property
    def void(self) -> Void | None:
        """Why its results are void; None if they are not."""
        with contextlib.suppress(RecordError):
            return self.directory.void()
        return None

    @cached_property
    def result(self) -> Mapping[str, Any] | None:
        """The result of this evaluation setting as plain data, if it is complete and finite."""
        return _plain_result(self.directory, self.eval_id)

    @cached_property
    def layer_table(self) -> LayerTable | None:
        """``layers.parquet`` of this evaluation setting; None if it is absent or damaged."""
        try:
            return layer_table.read(self.directory.evaluation(self.eval_id) / "layers.parquet")
        except (OSError, ValueError):
            return None

    @cached_property
    def probes(self) -> "pd.DataFrame | None":
        """``probes.parquet``; None if it is absent or damaged."""
        path = self.directory.path / "probes.parquet"
        if not path.exists():
            return None
        import pandas as pd

        try:
            found = pd.read_parquet(path)
        except (OSError, ValueError):
            return None
        return found if {"iteration", "layer", "stability"} <= set(found.columns) else None

    def jump_rate(self, *, late: bool = False) -> float | None:
        """The jump rate in percent, at least once or after layer 1, from ``layers.parquet``."""
        rates = jump_rates(self.layer_table) if self.layer_table is not None else None
        return None if rates is None or not rates.objects else rates.late if late else rates.once

    @cached_property
    def other_result(self) -> Mapping[str, Any] | None:
        """The newest complete result of another evaluation setting: a stale number."""
        folder = self.directory.path / "evals"
        names = [path.name for path in _newest_first(folder) if path.name != self.eval_id]
        results = (_plain_result(self.directory, name) for name in names)
        return next((found for found in results if found is not None), None)

    @property
    def outdated(self) -> dict[str, Any]:
        """What of the other result's evaluation setting is not as it is wanted now; empty where that is not known."""
        name = (self.other_result or {}).get("eval_id", "")
        made = self.directory.setting(self.directory.evaluation(name)) if name else None
        return {key: value for key, value in (made or {}).items() if key in self.wanted and self.wanted[key] != value}

    @property
    def old_scheme(self) -> bool:
        """Whether the run was named by an older identity scheme."""
        return self.record is not None and self.record.scheme != SCHEME

    @cached_property
    def lines(self) -> tuple[Mapping[str, Any], ...]:
        """``metrics.jsonl``; a line cut short by a crash is left out."""
        return json_lines(self.directory.metrics)

    @property
    def evaluations(self) -> list[Mapping[str, Any]]:
        """The evaluations logged during training."""
        return [line for line in self.lines if line.get("kind") == "evaluation"]

    @property
    def iteration(self) -> int:
        """The last iteration that was logged; 0 before the first."""
        return max((int(line.get("iteration", 0)) for line in self.lines), default=0)

    @property
    def max_iter(self) -> int:
        """The iterations of the schedule; 0 if it is unknown."""
        return int(_mapping(self.config.get("schedule")).get("max_iter", 0))

    @cached_property
    def attempts(self) -> tuple[Attempt, ...]:
        """The attempts, in order."""
        return tuple(_attempt(self.directory.attempt(number)) for number in self.directory.attempts())

    @property
    def training(self) -> list[Attempt]:
        """The attempts that trained and said where they ran, in order."""
        return [a for a in self.attempts if a.provenance and a.record.stage in ("all", "train")]

    @property
    def provenance(self) -> Provenance:
        """Provenance of the last attempt that trained; empty if none said."""
        return (self.training[-1].provenance if self.training else None) or Provenance()

    @cached_property
    def commits(self) -> tuple[Commit, ...]:
        """The versions of the code that trained the run: more than one where it was resumed by another version."""
        found = (commit_of(attempt.provenance) for attempt in self.training)
        return tuple(dict.fromkeys(commit for commit in found if commit is not None))


def commit_of(provenance: Provenance | None) -> Commit | None:
    """The commit of a provenance record; None outside a git checkout."""
    git = provenance.git if provenance is not None else Git()
    return Commit(git.sha, _dirty(git)) if git.sha else None


def _dirty(git: Git) -> str:
    """A digest of what was not committed, or an empty string."""
    if not git.dirty:
        return ""
    return hashlib.sha256(repr((git.diff, list(git.untracked))).encode()).hexdigest()[:8]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _plain_result(run: RunDir, eval_id: str) -> Mapping[str, Any] | None:
    """A result as plain data, like the lines of ``metrics.jsonl`` that stand in for it; None if there is none."""
    with contextlib.suppress(RecordError):
        result = run.result(eval_id)
        return records.encode(result) if result is not None else None
    return None


def _newest_first(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return []


def _attempt(directory: AttemptDir) -> Attempt:
    """An attempt with what can be read of it; a record that cannot be read shows in the run's standing."""
    try:
        return Attempt(directory, directory.record() or AttemptRecord(), directory.provenance())
    except RecordError:
        return Attempt(directory, AttemptRecord(), None)


class Reader:
    """Reads runs of one store, each at most once, however many suites share it."""

    def __init__(
        self, store: Store, queued: frozenset[str] = frozenset(), placements: Mapping[str, Placement] = NOWHERE
    ) -> None:
        self.store = store
        self.queued = queued
        self.placements = placements
        self._views: dict[tuple[str, str], RunView] = {}

    def view(self, seed: int, run_id: str, eval_id: str, wanted: Mapping[str, Any] | None = None) -> RunView:
        """The run at this evaluation setting, ``wanted`` where it is known, with its standing."""
        key = (run_id, eval_id)
        if key not in self._views:
            bare = RunView(seed, eval_id, self.store.reading(run_id), wanted=wanted or {})
            self._views[key] = replace(bare, standing=standing(bare, self.queued, self.placements))
        return self._views[key]


def standing(
    view: RunView, queued: frozenset[str] = frozenset(), placements: Mapping[str, Placement] = NOWHERE
) -> Standing:
    """A run's state (:func:`experiments.status.states.derive`) as a clause that says why there is no number yet.

    ``placements`` is what Slurm said when it was last asked (:func:`experiments.status.scheduler.remembered`).
    """
    found = derive(view.directory, view.eval_id, queued, placements)
    if found.state is State.PLANNED:
        return Standing("PLANNED", "never launched" if not view.record else "not started", "not started")
    return describe(found, view.iteration if found.state in _WITH_ITERATION else 0, view.max_iter)


_WITH_ITERATION = (State.RUNNING, State.FAILED, State.LOST, State.CANCELLED, State.TIMEOUT)
_SHORT = {
    State.VOID: "void",
    State.TRAINED: "not evaluated",
    State.QUEUED: "queued",
    State.REQUEUED: "requeued",
    State.CANCELLED: "cancelled",
    State.TIMEOUT: "time limit",
    State.LOST: "lost",
    State.UNKNOWN: "unknown",
}


def describe(found: RunState, iteration: int, max_iter: int) -> Standing:
    """The clause of a state; a failure is named by its class."""
    state = found.state
    if state is State.DONE:
        return Standing(state)
    at = f"iteration {iteration} of {max_iter}" if max_iter else f"iteration {iteration}"
    if state is State.RUNNING:
        return Standing(state, at, f"{iteration}/{max_iter}")
    short = FAILURES[found.failure_class] if state is State.FAILED else _SHORT[state]
    word = f"failed ({short})" if state is State.FAILED else short
    where = f" at {at}" if iteration else ""
    return Standing(state, f"{word}{where}" + (f": {found.detail}" if found.detail else ""), short or "failed")
