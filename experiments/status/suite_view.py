"""Where the runs of launched suites stand, with their scores and the time that is left: what ``mpformer status`` shows.

Looking writes what Slurm said, for reports and for when it does not answer: ``scheduler.json`` its last word on the
queue, ``launches/<id>/usage.json`` what accounting says its jobs used.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from experiments.status import failures, notify, standing, usage
from experiments.status.scheduler import Answer
from experiments.status.standing import Standing
from experiments.status.states import RunState, State
from experiments.store import launches
from experiments.store.files import side_by_side
from experiments.store.records import RecordError
from experiments.store.run_dir import RunDir, Store
from experiments.store.suite_record import SuiteRecord, SuiteRow, SuiteRun
from mpformer.runtime.errors import choices

_HEAD = ("suite", "scale", "dataset", "title", "primary", "baseline")
"""What is shown of a suite's own record."""

RATES = 3
"""Finished runs of a row from which its seconds per iteration are taken."""


@dataclass(frozen=True)
class Score:
    """A run's last scores: of all images when it is ``final``, of a few (a probe) at an iteration before."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    iteration: int | None = None
    final: bool = False


@dataclass(frozen=True)
class TimeLeft:
    """Seconds that a run still takes; None where nothing like it has been measured, or nothing is to come."""

    seconds: float | None = None
    source: str | None = None
    """Whose speed it is: the run's ``own``, that of its ``row``, or that of the ``suite``."""


@dataclass(frozen=True)
class Delta:
    """The primary metric beside that of the baseline row's run of the same seed; None where they cannot be compared."""

    mine: float | None = None
    baseline: float | None = None
    iteration: int | None = None
    """The last iteration where both were scored in the same way."""

    @property
    def value(self) -> float | None:
        """The difference."""
        return None if self.mine is None or self.baseline is None else self.mine - self.baseline

    def as_shown(self, decimals: int) -> float | None:
        """The difference of the two numbers as they are printed, which the rounded difference need not be."""
        if self.mine is None or self.baseline is None:
            return None
        return round(self.mine, decimals) - round(self.baseline, decimals)


@dataclass(frozen=True)
class RunLine:
    """One run of a suite with all that a table shows of it."""

    row: str
    seed: int
    eval_id: str
    state: RunState
    score: Score
    log_lines: tuple[str, ...] = ()
    """The lines of its log that tell why it failed, beyond what the state says already."""
    left: TimeLeft = TimeLeft()
    delta: Delta = Delta()

    @property
    def done(self) -> bool:
        """Whether it is trained and scored to the end."""
        return self.state.state is State.DONE

    def plain(self) -> dict[str, Any]:
        """Return it as one of the ``runs`` of ``status --json``."""
        state = self.state
        return {
            "row": self.row,
            "seed": self.seed,
            "run_id": state.run_id,
            "eval_id": self.eval_id,
            "state": str(state.state),
            "label": state.label,
            "failure_class": state.failure_class,
            "detail": state.detail,
            "lines": list(self.log_lines),
            "attempt": state.attempt,
            "job": state.job,
            "active": state.active,
            "progress": state.progress.known(),
            "metrics": dict(self.score.metrics),
            "metrics_iteration": self.score.iteration,
            "final": self.score.final,
            "eta_seconds": self.left.seconds,
            "eta_source": self.left.source,
            "delta": self.delta.value,
            "delta_iteration": self.delta.iteration,
        }


@dataclass(frozen=True)
class WorkLeft:
    """What training and evaluation of a suite are still to come."""

    runs: int
    running: int
    seconds: float
    """One run after the other, without the ``unknown`` runs."""
    unknown: int
    """Runs of which nothing like them has been measured."""


@dataclass(frozen=True)
class SuiteView:
    """A launched suite and where each of its runs stands."""

    record: SuiteRecord
    answer: Answer | None
    """What Slurm answered; None where no unfinished run was ever given to it."""
    runs: tuple[RunLine, ...]
    bad_nodes: Mapping[str, int] = field(default_factory=dict)
    """Nodes that the suite's jobs avoid, with the number of starts that died there."""
    profile: str = ""
    """The profile of the last launch whose jobs avoid them."""

    @property
    def name(self) -> str:
        """The suite's name with its scale and dataset."""
        return f"{self.record.suite}@{self.record.scale} on {self.record.dataset}"

    @property
    def counts(self) -> dict[str, int]:
        """How many runs have each label, such as ``FAILED(nan)``."""
        return dict(Counter(run.state.label for run in self.runs))

    @property
    def waited_for(self) -> bool:
        """Whether something works on one of its runs or is about to, or one was not begun or not scored yet."""
        return any(run.state.active or run.state.state in (State.PLANNED, State.TRAINED) for run in self.runs)

    @property
    def left(self) -> WorkLeft:
        """The work that is left of all its runs."""
        waited_for = [run for run in self.runs if run.state.state not in (State.DONE, State.VOID)]
        known = [run.left.seconds for run in waited_for if run.left.seconds is not None]
        running = sum(run.state.state is State.RUNNING for run in waited_for)
        return WorkLeft(len(waited_for), running, sum(known), len(waited_for) - len(known))

    def plain(self) -> dict[str, Any]:
        """Return it as ``status --json`` prints it."""
        return {
            **{name: getattr(self.record, name) for name in _HEAD},
            "counts": self.counts,
            "scheduler": _plain_answer(self.answer) if self.answer is not None else None,
            "left": vars(self.left),
            "bad_nodes": dict(self.bad_nodes),
            "runs": [run.plain() for run in self.runs],
        }


def _plain_answer(answer: Answer) -> dict[str, Any]:
    said = {name: getattr(answer, name) for name in ("time", "controller", "accounting")}
    return {**said, "problems": list(answer.problems)}


def chosen(root: Path, suite: str | None, scale: str, dataset: str | None) -> list[SuiteRecord]:
    """Return the records of a suite, or of all; raises UserError with the launched suites if there is none."""
    store = Store(root)
    records = store.suite_records()
    if suite is None:
        return records
    from experiments.suites import catalogue

    catalogue.recall(store, suite, scale, dataset)
    scale, dataset = catalogue.check(suite, scale, dataset)
    wanted = (suite, scale, dataset)
    found = [record for record in records if (record.suite, record.scale, record.dataset) == wanted]
    if not found:
        launched = [f"{record.suite}@{record.scale} on {record.dataset}" for record in records]
        raise choices(
            "launched suite", f"{suite}@{scale} on {dataset}", launched or ["none yet: mpformer launch SUITE"]
        )
    return found


def views(
    root: Path,
    records: Sequence[SuiteRecord],
    max_age: float = 0.0,
    warn: Callable[[str], None] = lambda _: None,
) -> list[SuiteView]:
    """Return where the runs of the suites' records stand; Slurm is asked once for all of them.

    Notifications go out for launches that have ended or stalled, as their profiles say; ``warn`` gets a line for each
    that failed.
    """
    store = Store(root)
    found = standing.look(store, _keys(records), max_age)
    _after_looking(store, found, warn)
    return [_view(store, record, found) for record in records]


def refresh(root: Path, warn: Callable[[str], None]) -> None:
    """Look at all launched suites, so that the store holds what Slurm and its accounting say now; for reports."""
    store = Store(root)
    _after_looking(store, standing.look(store, _keys(store.suite_records())), warn)


def _keys(records: Sequence[SuiteRecord]) -> list[standing.Key]:
    return [(run.run_id, run.eval_id) for record in records for _, run in record.runs()]


def _after_looking(store: Store, found: Standing, warn: Callable[[str], None]) -> None:
    """What follows from runs being over: what they used is written down, and notifications go out."""
    usage.settle(store, {run_id for (run_id, _), state in found.states.items() if not state.active})
    for line in notify.check(store, found):
        warn(line)


def _view(store: Store, record: SuiteRecord, found: Standing) -> SuiteView:
    scored = cache(lambda run_id: store.run(run_id).scored())  # a run's own and a baseline's serve twice
    runs = side_by_side(lambda planned: _line(store, *planned, found, scored), record.runs())
    speeds, deltas = _speeds(store, runs), _deltas(runs, record, scored)
    lines = (
        replace(run, left=_time_left(store, run, speeds), delta=delta) for run, delta in zip(runs, deltas, strict=True)
    )
    return SuiteView(record, found.answer, tuple(lines), *_bad_nodes(store, record, found))


def _bad_nodes(store: Store, record: SuiteRecord, found: Standing) -> tuple[dict[str, int], str]:
    """The bad nodes of the suite's launches whose jobs Slurm still has, and the profile of the last of these."""
    waiting = {run_id for (run_id, _), state in found.states.items() if state.live}
    nodes: dict[str, int] = {}
    profile = ""
    for launched, about in launches.recorded(store, launches.DEATHS):
        ours = (about.suite, about.scale, about.dataset) == (record.suite, record.scale, record.dataset)
        if ours and not waiting.isdisjoint(about.runs):
            bad = launches.bad_nodes(launched.deaths_file)
            nodes, profile = nodes | bad, about.profile if bad else profile
    return nodes, profile


_Scored = Callable[[str], Sequence[Mapping[str, Any]]]
"""The evaluation lines of a run's curve."""


def _line(store: Store, row: SuiteRow, run: SuiteRun, found: Standing, scored: _Scored) -> RunLine:
    """What a run's own files say; what is left and the differences need the suite's other runs too."""
    directory, state = store.run(run.run_id), found.states[run.run_id, run.eval_id]
    score, log_lines = _score(state, scored), _log_lines(directory, state)
    return RunLine(row.name, run.seed, run.eval_id, state, score, log_lines)


def _score(state: RunState, scored: _Scored) -> Score:
    if state.state is State.DONE:
        return Score(state.metrics, state.progress.iteration, final=True)
    last = next(reversed(scored(state.run_id)), {})
    return Score(state.metrics or last.get("metrics") or {}, last.get("iteration"), bool(last.get("final")))


def _log_lines(run: RunDir, state: RunState) -> tuple[str, ...]:
    if not state.state.failed:
        return ()
    log = run.attempt(state.attempt).log if state.attempt else None
    return tuple(line for line in state.lines or failures.read([log]).lines if line not in state.detail)


def _speeds(store: Store, runs: Sequence[RunLine]) -> dict[str, float]:
    """Seconds per iteration by row, where runs of it are finished."""
    each: dict[str, list[float]] = {}
    for run in runs:
        if run.done and len(each.get(run.row, ())) < RATES:
            trained = store.run(run.state.run_id).trained()
            if trained is not None and trained.seconds and trained.iterations:
                each.setdefault(run.row, []).append(trained.seconds / trained.iterations)
    return {row: median(rates) for row, rates in each.items()}


def _time_left(store: Store, run: RunLine, speeds: Mapping[str, float]) -> TimeLeft:
    """As its trainer measures it, else by the finished runs of its row, else by those of other rows."""
    state, progress = run.state.state, run.state.progress
    if state in (State.DONE, State.VOID):
        return TimeLeft()
    if state is State.RUNNING and progress.eta_seconds is not None:
        return TimeLeft(progress.eta_seconds, "own")
    speed = speeds.get(run.row, median(speeds.values()) if speeds else None)
    if speed is None:
        return TimeLeft()
    most = progress.max_iter or _max_iter(store.run(run.state.run_id))
    return TimeLeft(max(0, most - (progress.iteration or 0)) * speed, "row" if run.row in speeds else "suite")


def _max_iter(run: RunDir) -> int:
    with contextlib.suppress(RecordError):
        record = run.sound_record()
        return int((record.config.get("schedule") or {}).get("max_iter", 0)) if record is not None else 0
    return 0


def _deltas(runs: Sequence[RunLine], record: SuiteRecord, scored: _Scored) -> list[Delta]:
    """Each run's difference to the baseline row's run of the same seed."""
    baselines = {row.name: row.baseline or record.baseline for row in record.rows}
    known = {(run.row, run.seed): run for run in runs}

    def delta(run: RunLine) -> Delta:
        baseline = baselines[run.row]
        other = known.get((baseline, run.seed)) if baseline != run.row else None
        return _delta(run, other, record.primary, scored) if other else Delta()

    return side_by_side(delta, runs)


def _delta(run: RunLine, other: RunLine, primary: str, scored: _Scored) -> Delta:
    """Final scores with final ones, probes with probes of the same iteration."""
    mine, theirs = run.score, other.score
    if run.done and other.done:
        first, second = mine.metrics.get(primary), theirs.metrics.get(primary)
        return Delta() if first is None or second is None else Delta(first, second, mine.iteration)
    if not mine.metrics or not theirs.metrics:
        return Delta()
    one, two = (_probes(scored(each.state.run_id), primary) for each in (run, other))
    both = one.keys() & two.keys()
    return Delta(one[max(both)], two[max(both)], max(both)) if both else Delta()


def _probes(lines: Sequence[Mapping[str, Any]], primary: str) -> dict[int, float]:
    """The primary metric of each scoring of a few images, by iteration."""
    probes = [line for line in lines if not line.get("final")]
    scores = {line.get("iteration"): (line.get("metrics") or {}).get(primary) for line in probes}
    return {int(at): value for at, value in scores.items() if at is not None and isinstance(value, int | float)}
