"""What the commands that look at the store show: status, logs, differences.

Looking writes what Slurm said, for reports and for when it does not answer: ``scheduler.json`` its last word on the
queue, ``launches/<id>/usage.json`` what accounting says its jobs used.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from experiments.status import failures, notify, readahead, scheduler, standing, tables, usage
from experiments.status.scheduler import Answer
from experiments.status.standing import Standing
from experiments.status.states import RunState, State
from experiments.store import claims, records
from experiments.store.attempt_dir import FailureClass, Progress
from experiments.store.metrics import evaluations, last_evaluation
from experiments.store.records import RecordError
from experiments.store.run_dir import RunDir, Store
from mpformer.runtime.errors import choices

if TYPE_CHECKING:
    from rich.table import Table


def chosen(root: Path, suite: str | None, scale: str, dataset: str | None) -> list[dict[str, Any]]:
    """Return the records of a suite, or of all; raises UserError with the launched suites if there is none."""
    records = Store(root).suite_records()
    if suite is None:
        return records
    from experiments.suites import catalogue

    scale, dataset = catalogue.place(suite, scale, dataset)
    wanted = (suite, scale, dataset)
    found = [record for record in records if (record["suite"], record["scale"], record["dataset"]) == wanted]
    if not found:
        launched = [f"{record['suite']}@{record['scale']} on {record['dataset']}" for record in records]
        raise choices(
            "launched suite", f"{suite}@{scale} on {dataset}", launched or ["none yet: mpformer launch SUITE"]
        )
    return found


def views(
    root: Path,
    records: Sequence[Mapping[str, Any]],
    max_age: float = 0.0,
    tell: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Return the suites' records with the state of each run, as plain data; Slurm is asked once for all of them.

    ``scheduler`` says what Slurm did not answer (None where no unfinished run was ever given to it). Launches that have
    ended or stalled are told of, as their profiles say; ``tell`` gets a line for each telling that failed.
    """
    store, keys = Store(root), _keys(records)
    unread = [] if max_age else [store.run(run_id).path for run_id, _ in keys]  # a live table has looked before
    with readahead.ahead(unread):
        found = standing.of(store, keys, max_age)
        _aftermath(store, found, tell)
        return [_view(store, record, found) for record in records]


def refresh(root: Path, tell: Callable[[str], None]) -> None:
    """Look at all launched suites, so that the store holds what Slurm and its accounting say now; for reports."""
    store = Store(root)
    _aftermath(store, standing.of(store, _keys(store.suite_records())), tell)


def _keys(records: Sequence[Mapping[str, Any]]) -> list[standing.Key]:
    return [(run["run_id"], run["eval_id"]) for record in records for row in record["rows"] for run in row["runs"]]


def _aftermath(store: Store, found: Standing, tell: Callable[[str], None]) -> None:
    """What follows from runs being over: somebody is told, and what they used is written down."""
    usage.settle(store, {run_id for (run_id, _), state in found.states.items() if not state.active})
    for line in notify.check(store, found):
        tell(line)


def view(root: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return one suite's record with the state of each run."""
    return views(root, [record])[0]


def _view(store: Store, record: Mapping[str, Any], found: Standing) -> dict[str, Any]:
    runs = []
    for row in record["rows"]:
        for run in row["runs"]:
            state = found.states[run["run_id"], run["eval_id"]]
            runs.append({"row": row["name"], **run, **_state_record(store, state)})
    head = {key: record[key] for key in ("suite", "scale", "dataset", "title", "primary", "baseline")}
    _add_times(store, runs)
    _add_deltas(store, runs, _baselines(record), record["primary"])
    return {**head, "counts": _counts(runs), "scheduler": _scheduler(found.answer), "left": _left(runs), "runs": runs}


def _scheduler(answer: Answer | None) -> dict[str, Any] | None:
    if answer is None:
        return None
    return {
        "time": answer.time,
        "controller": answer.controller,
        "accounting": answer.accounting,
        "problems": list(answer.problems),
    }


_FAILED = (State.FAILED, State.LOST, State.TIMEOUT)


def _state_record(store: Store, state: RunState) -> dict[str, Any]:
    run = store.run(state.run_id)
    last = {} if state.state is State.DONE else last_evaluation(run.metrics)
    at = state.progress.iteration if state.state is State.DONE else last.get("iteration")
    return {
        "state": str(state.state),
        "label": state.label,
        "failure_class": state.failure_class,
        "detail": state.detail,
        "lines": list(_telling(run, state)) if state.state in _FAILED else [],
        "attempt": state.attempt,
        "job": state.job,
        "active": state.active,
        "progress": state.progress.known(),
        "metrics": dict(state.metrics or last.get("metrics") or {}),
        "metrics_iteration": at,
        "final": state.state is State.DONE or bool(last.get("final")),
    }


def _telling(run: RunDir, state: RunState) -> tuple[str, ...]:
    """The lines of the attempt's log that tell why it failed, beyond what the detail says already."""
    log = run.attempt(state.attempt).log if state.attempt else None
    return tuple(line for line in state.lines or failures.read([log]).lines if line not in state.detail)


def _add_times(store: Store, runs: Sequence[dict[str, Any]]) -> None:
    """Add the seconds that each run still takes: as its trainer measures them, else by runs of its row, else of others.

    ``eta_source`` says which: ``own``, ``row``, ``suite``; both are None where nothing has been measured.
    """
    each: dict[str, list[float]] = {}
    for run in runs:
        if run["state"] == State.DONE and len(each.get(run["row"], ())) < RATES:
            trained = store.run(run["run_id"]).trained()
            if trained is not None and trained.seconds and trained.iterations:
                each.setdefault(run["row"], []).append(trained.seconds / trained.iterations)
    known = {row: median(rates) for row, rates in each.items()}
    for run in runs:
        run["eta_seconds"], run["eta_source"] = _time_left(store, run, known)


RATES = 3
"""Finished runs of a row from which its seconds per iteration are taken."""


def _time_left(store: Store, run: Mapping[str, Any], known: Mapping[str, float]) -> tuple[float | None, str | None]:
    progress = run["progress"]
    if run["state"] in (State.DONE, State.VOID):
        return None, None
    if run["state"] == State.RUNNING and progress.get("eta_seconds") is not None:
        return progress["eta_seconds"], "own"
    rate = known.get(run["row"], median(known.values()) if known else None)
    if rate is None:
        return None, None
    most = progress.get("max_iter") or _max_iter(store.run(run["run_id"]))
    left = max(0, most - progress.get("iteration", 0))
    return left * rate, "row" if run["row"] in known else "suite"


def _max_iter(run: RunDir) -> int:
    with contextlib.suppress(RecordError):
        record = run.sound_record()
        return int((record.config.get("schedule") or {}).get("max_iter", 0)) if record is not None else 0
    return 0


def _left(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds of training and evaluation that are left, one run after the other; ``unknown`` runs are not in it."""
    waited_for = [run for run in runs if run["state"] not in (State.DONE, State.VOID)]
    known = [run["eta_seconds"] for run in waited_for if run["eta_seconds"] is not None]
    running = sum(run["state"] == State.RUNNING for run in waited_for)
    return {"runs": len(waited_for), "running": running, "seconds": sum(known), "unknown": len(waited_for) - len(known)}


def _left_text(left: Mapping[str, Any]) -> str:
    if not left["seconds"]:
        return ""
    wide = (
        f", about {tables.duration(left['seconds'] / left['running'])} at the present width" if left["running"] else ""
    )
    unknown = f", {left['unknown']} runs not counted: nothing like them has been measured" if left["unknown"] else ""
    return f"; {tables.duration(left['seconds'])} of runs left, as measured{wide}{unknown}"


def _baselines(record: Mapping[str, Any]) -> dict[str, str]:
    """The row that each row is compared with; a row that is compared with none has itself."""
    return {row["name"]: row.get("baseline") or record["baseline"] for row in record["rows"]}


def _add_deltas(store: Store, runs: Sequence[dict[str, Any]], baselines: Mapping[str, str], primary: str) -> None:
    """Add the difference to the baseline row's run of the same seed, at the last iteration where both were scored."""
    known = {(run["row"], run["seed"]): run for run in runs}
    probes = cache(lambda run_id: _probes(store.run(run_id).metrics, primary))  # a baseline's serves many rows
    for run in runs:
        baseline = baselines[run["row"]]
        other = known.get((baseline, run["seed"])) if baseline != run["row"] else None
        run["delta"], run["delta_iteration"] = _delta(run, other, primary, probes) if other else (None, None)


def _delta(
    run: Mapping[str, Any], other: Mapping[str, Any], primary: str, probes: Callable[[str], Mapping[int, float]]
) -> tuple[float | None, int | None]:
    """Final scores with final ones, probes (a few images) with probes of the same iteration."""
    if run["state"] == other["state"] == State.DONE:
        return _difference(run, other, primary)
    if not run["metrics"] or not other["metrics"]:
        return None, None
    if run["metrics_iteration"] == other["metrics_iteration"] and not (run["final"] or other["final"]):
        return _difference(run, other, primary)
    mine, theirs = probes(run["run_id"]), probes(other["run_id"])
    both = mine.keys() & theirs.keys()
    return (mine[max(both)] - theirs[max(both)], max(both)) if both else (None, None)


def _difference(run: Mapping[str, Any], other: Mapping[str, Any], primary: str) -> tuple[float | None, int | None]:
    one, two = run["metrics"].get(primary), other["metrics"].get(primary)
    return (None, None) if one is None or two is None else (one - two, run["metrics_iteration"])


def _probes(metrics: Path, primary: str) -> dict[int, float]:
    lines = [line for line in evaluations(metrics) if not line.get("final")]
    scores = {line.get("iteration"): (line.get("metrics") or {}).get(primary) for line in lines}
    return {int(at): value for at, value in scores.items() if at is not None and isinstance(value, int | float)}


def _counts(runs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    labels = [run["label"] for run in runs]
    return {label: labels.count(label) for label in dict.fromkeys(labels)}


LONG = 100
"""Runs from which on a suite is shown as plain aligned text (a table takes a millisecond a line), live without DONE."""


def table(content: Mapping[str, Any]) -> "Table":
    """Return a view as a table for a terminal; of a long one, without what is done."""
    runs = content["runs"]
    shown = [run for run in runs if run["state"] != State.DONE] if len(runs) > LONG else runs
    lines = []
    for run in shown:
        cells = [tables.escaped(cell) for cell in _cells(run, content)]
        cells[_STATE] = tables.coloured(_state(run))
        lines.append(cells)
    return tables.compact(_title(content), _names(content), lines)


def text(content: Mapping[str, Any]) -> str:
    """Return a view as plain aligned text, every run of it."""
    lines = [_names(content), *(_cells(run, content) for run in content["runs"])]
    kept = [index for index in range(len(lines[0])) if any(line[index] for line in lines[1:])]
    widths = [max(len(line[index]) for line in lines) for index in kept[:-1]] + [0]
    shown = ("  ".join(line[i].ljust(w) for i, w in zip(kept, widths, strict=True)).rstrip() for line in lines)
    return "\n".join((_title(content), *(line.replace("\n", " | ") for line in shown)))


def _title(content: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {label}" for label, count in content["counts"].items())
    suite = f"{content['suite']}@{content['scale']} on {content['dataset']}"
    return f"{suite}: {counts or 'no runs'}{_left_text(content['left'])}"


def _names(content: Mapping[str, Any]) -> tuple[str, ...]:
    *first, primary, run, detail = tables.columns(content["primary"])
    return (*first, primary, "Δ", run, "job", detail)


_STATE = 2
"""Column of the state."""


def _state(run: Mapping[str, Any]) -> RunState:
    return RunState(
        run["run_id"],
        State(run["state"]),
        "",
        FailureClass(run["failure_class"]),
        progress=records.decode(Progress, run["progress"], run["run_id"]),
    )


def _cells(run: Mapping[str, Any], content: Mapping[str, Any]) -> tuple[str, ...]:
    score = tables.score_text(run["metrics"], content["primary"])
    iteration, loss, eta = tables.progress_cells(_state(run))
    if run["active"] and not eta and run["eta_seconds"] is not None:
        eta = f"~{tables.duration(run['eta_seconds'])}"  # of the run itself, not of its waiting
    cells = (run["row"], str(run["seed"]), run["label"], iteration, loss, eta, score)
    plain = run["state"] == State.RUNNING and run["detail"] in ("start", "train", "evaluate")
    detail = "\n".join([] if plain else [line for line in (run["detail"], *run["lines"]) if line])
    return (*cells, _delta_text(run), run["run_id"][-12:], run["job"], detail)


def _delta_text(run: Mapping[str, Any]) -> str:
    if run["delta"] is None:
        return ""
    at = "" if run["delta_iteration"] == run["metrics_iteration"] else f" @{run['delta_iteration']}"
    return f"{run['delta']:+.1f}{at}"


def notes(contents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line for each thing that Slurm did not answer."""
    heads = [content["scheduler"] for content in contents if content["scheduler"]]
    lines = [f"{line}: states are what files and accounting say" for head in heads for line in head["problems"]]
    return list(dict.fromkeys(lines))


def log(store: Store, run: RunDir, attempt: int | None, follow: bool, period: float = 0.5) -> Iterator[str]:
    """Yield the text of an attempt's log, the last one's by default.

    With ``follow``: until nothing works on the run any more; through requeues, into the attempts that come after.
    A run that waits in a queue says so. Raises UserError if the run has no such attempt.
    """
    numbers = run.attempts()
    if attempt is not None or (numbers and not follow):
        number = attempt if attempt is not None else max(numbers)
        if number not in numbers:
            raise choices(f"attempt of {run.run_id}", number, numbers or ["none yet"])
        yield from _attempt_log(run, number, follow, period)
        return
    state = _state_of(store, run)
    if not numbers and not state.active:
        yield from _no_attempt(store, run, state)
        return
    yield from _followed(store, run, numbers, follow, period)


def _followed(store: Store, run: RunDir, numbers: Sequence[int], follow: bool, period: float) -> Iterator[str]:
    first = shown = max(numbers, default=1) - 1
    said = ""
    while True:
        for number in [number for number in run.attempts() if number > shown]:
            yield f"--- attempt {number} ---\n" if shown > first else ""
            yield from _attempt_log(run, number, follow, period)
            shown = number
        state = _state_of(store, run)
        if not state.active:
            return
        if state.state is not State.RUNNING and state.detail != said:
            said = state.detail
            yield f"{state.label}: {said}{f' (job {state.job})' if state.job else ''}\n"
        if not follow:
            return
        time.sleep(period)


def _state_of(store: Store, run: RunDir) -> RunState:
    from experiments.store.identity import eval_id

    key = (run.run_id, eval_id(run.config()))
    return standing.of(store, [key], scheduler.ASK_PERIOD).states[key]


def _no_attempt(store: Store, run: RunDir, state: RunState) -> Iterator[str]:
    """What there is of a run without an attempt: its job's log, if the job got that far."""
    text = job_log(store, run)
    if not text:
        raise choices(f"attempt of {run.run_id}", "(last)", ["none yet"])
    yield f"{state.label}: {state.detail}; the log of job {state.job}:\n{text}"


def job_log(store: Store, run: RunDir) -> str:
    """Return what Slurm and submitit wrote of the run's last job; empty if there is nothing."""
    place = scheduler.placements(store, [run.run_id], scheduler.ASK_PERIOD)[0].get(run.run_id)
    path = scheduler.log_of(store.root, place) if place is not None else None
    return path.read_text(errors="replace") if path is not None else ""


def _attempt_log(run: RunDir, number: int, follow: bool, period: float) -> Iterator[str]:
    path = run.attempt(number).log
    position = 0
    while True:
        live = follow and claims.holder(run.claims) == number
        if path.exists():
            with path.open(errors="replace") as file:
                file.seek(position)
                yield file.read()
                position = file.tell()
        if not live:
            return
        time.sleep(period)
