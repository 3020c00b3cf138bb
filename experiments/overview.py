"""What the commands that look at the store show: status, logs, differences, datasets. Nothing here writes."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import claims, registry, watching
from experiments.states import RunState, State, derive, last_evaluation
from experiments.store import RunDir, Store, read_json
from experiments.worker import queued_runs
from mpformer.errors import choices

if TYPE_CHECKING:
    from rich.table import Table


def chosen(root: Path, suite: str | None, scale: str, dataset: str | None) -> list[dict[str, Any]]:
    """Return the records of a suite, or of all; raises UserError with the launched suites if there is none."""
    records = Store(root).suite_records()
    if suite is None:
        return records
    scale, dataset = registry.place(suite, scale, dataset)
    wanted = (suite, scale, dataset)
    found = [record for record in records if (record["suite"], record["scale"], record["dataset"]) == wanted]
    if not found:
        launched = [f"{record['suite']}@{record['scale']} on {record['dataset']}" for record in records]
        raise choices(
            "launched suite", f"{suite}@{scale} on {dataset}", launched or ["none yet: mpformer launch SUITE"]
        )
    return found


def view(root: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a suite's record with the state of each run, as plain data."""
    store = Store(root)
    queued = queued_runs(store)
    runs = []
    for row in record["rows"]:
        for run in row["runs"]:
            state = derive(store.run(run["run_id"]), run["eval_id"], queued)
            runs.append({"row": row["name"], **run, **_state_record(store, state)})
    head = {key: record[key] for key in ("suite", "scale", "dataset", "title", "primary", "baseline")}
    _add_deltas(runs, _baselines(record), record["primary"])
    return {**head, "counts": _counts(runs), "runs": runs}


def _state_record(store: Store, state: RunState) -> dict[str, Any]:
    last = last_evaluation(store.run(state.run_id).metrics)
    return {
        "state": str(state.state),
        "label": state.label,
        "failure_class": state.failure_class,
        "detail": state.detail,
        "attempt": state.attempt,
        "progress": dict(state.progress),
        "metrics": dict(state.metrics or last.get("metrics") or {}),
        "metrics_iteration": last.get("iteration"),
    }


def _baselines(record: Mapping[str, Any]) -> dict[str, str]:
    """The row that each row is compared with; a row that is compared with none has itself."""
    return {row["name"]: row.get("baseline") or record["baseline"] for row in record["rows"]}


def _add_deltas(runs: Sequence[dict[str, Any]], baselines: Mapping[str, str], primary: str) -> None:
    """Add the difference to the baseline row's run of the same seed, where both were scored at the same iteration."""
    known = {(run["row"], run["seed"]): run for run in runs}
    for run in runs:
        baseline = baselines[run["row"]]
        other = known.get((baseline, run["seed"])) if baseline != run["row"] else None
        one, two = run["metrics"].get(primary), (other or {}).get("metrics", {}).get(primary)
        comparable = other is not None and other["metrics_iteration"] == run["metrics_iteration"]
        run["delta"] = one - two if comparable and one is not None and two is not None else None


def _counts(runs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    labels = [run["label"] for run in runs]
    return {label: labels.count(label) for label in dict.fromkeys(labels)}


def table(content: Mapping[str, Any]) -> "Table":
    """Return a view as a table for the terminal."""
    counts = ", ".join(f"{count} {label}" for label, count in content["counts"].items())
    title = f"{content['suite']}@{content['scale']} on {content['dataset']}: {counts or 'no runs'}"
    *first, primary, run, detail = watching.columns(content["primary"])
    names = (*first, primary, "Δ", run, detail)
    return watching.compact(title, names, [_line(run, content) for run in content["runs"]])


def _line(run: Mapping[str, Any], content: Mapping[str, Any]) -> tuple[str, ...]:
    state = RunState(run["run_id"], State(run["state"]), "", run["failure_class"], progress=run["progress"])
    score = watching.score_text(run["metrics"], content["primary"])
    delta = "" if run["delta"] is None else f"{run['delta']:+.1f}"
    cells = (run["row"], str(run["seed"]), watching.coloured(state), *watching.progress_cells(state), score, delta)
    detail = "" if state.state is State.RUNNING else str(run["detail"])
    return (*cells, run["run_id"][-12:], detail)


def log(run: RunDir, attempt: int | None, follow: bool) -> Iterator[str]:
    """Yield the text of an attempt's log, with ``follow`` until nothing works on the run any more.

    Raises UserError if the run has no such attempt.
    """
    numbers = run.attempts()
    number = attempt if attempt is not None else max(numbers, default=0)
    if number not in numbers:
        raise choices(f"attempt of {run.run_id}", attempt or "(last)", numbers or ["none yet"])
    path = run.attempt(number) / "log.txt"
    position = 0
    while True:
        live = follow and claims.holder(run.path / "claims") == number
        if path.exists():
            with path.open(errors="replace") as file:
                file.seek(position)
                yield file.read()
                position = file.tell()
        if not live:
            return
        time.sleep(0.5)


def difference(first: RunDir, second: RunDir) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two runs, by dotted key: configuration, then code, packages and threads."""
    one, two = _described(first), _described(second)
    keys = dict.fromkeys((*one, *two))
    return {key: (one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)}


def _described(run: RunDir) -> dict[str, Any]:
    flat = dict(_flat(run.record()["config"], ""))
    attempts = run.attempts()
    origin = read_json(run.attempt(attempts[-1]) / "provenance.json") if attempts else None
    if isinstance(origin, dict):
        git = origin.get("git") or {}
        about = {"git.sha": git.get("sha"), "git.diff": _digest(git.get("diff")), "threads": origin.get("threads")}
        packages = {f"package.{name}": version for name, version in (origin.get("packages") or {}).items()}
        flat |= about | packages | {"python": origin.get("python"), "processor": origin.get("processor")}
    return flat


def _flat(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _digest(text: str | None) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12] if text else "clean"
