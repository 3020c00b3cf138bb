"""``mpformer suites``, ``plan`` and ``status``: what there is, what it will cost, where it stands."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from experiments.cli.console import new_console, print_json, warn
from experiments.cli.group import cli
from experiments.cli.options import json_option, plan_options, plan_request, root_options, scale_options
from mpformer.runtime.errors import UserError

if TYPE_CHECKING:
    from experiments.launch.costs import Cost
    from experiments.status.suite_view import SuiteView
    from experiments.store.suite_record import SuiteRecord
    from experiments.suites.planning import Plan


@cli.command()
@scale_options
@root_options
@json_option
def suites(scale: str, dataset: str | None, root: Path, data_root: Path, as_json: bool) -> None:
    """List the suites with the table of the paper that they stand for, their rows, seeds and cost."""
    from experiments.status.tables import duration
    from experiments.suites import catalogue

    for line in catalogue.broken():
        warn(line)
    chosen = catalogue.of_dataset(scale, dataset)
    listed = [_suite_record(suite, *suite.check(scale, dataset)) for suite in chosen]
    if as_json:
        return print_json(listed)
    for record in listed:
        seeds = ", ".join(map(str, record["seeds"]))
        click.echo(
            f"{record['suite']}: {record['title']} ({len(record['rows'])} rows x seeds {seeds} on {record['dataset']}, "
            f"about {duration(record['seconds'])} of one worker, declared; table of the paper: {record['paper_table']})"
        )
        if record["description"]:
            click.echo(f"    {record['description']}")
        for row in record["rows"]:
            reason = f"  (not applicable: {row['not_applicable']})" if row["not_applicable"] else ""
            click.echo(f"    {row['name']:<28} {row['label']}{reason}")
    return None


def _suite_record(suite: Any, scale: str, dataset: str) -> dict[str, Any]:
    from experiments.suites import planning

    rows = suite.rows(scale, dataset)
    return {
        "suite": suite.name,
        "title": suite.title,
        "description": suite.description,
        "paper_table": suite.paper_table,
        "scale": scale,
        "dataset": dataset,
        "baseline": suite.baseline,
        "primary": suite.primary,
        "seeds": list(suite.seeds.get(scale, ())),
        "seconds": planning.declared_seconds(suite, scale, dataset),
        "not_applicable": suite.why_not(dataset),
        "rows": [{**asdict(row), "changes": dict(row.changes), "seeds": list(row.seeds)} for row in rows],
    }


@cli.command()
@click.argument("suite")
@plan_options
@root_options
@click.option("--on", "profile", default="local", show_default=True, help="Profile to reckon the cost for.")
@json_option
def plan(suite: str, as_json: bool, root: Path, data_root: Path, profile: str, **asked: Any) -> None:
    """Show the runs of SUITE: their state, ids, and what they are expected to cost."""
    from experiments.launch import costs
    from experiments.status import standing
    from experiments.status.states import State
    from experiments.store.run_dir import Store
    from experiments.suites import catalogue, planning

    store, request = Store(root), plan_request(suite, **asked)
    catalogue.recall(store, suite, request.scale, request.dataset)
    resolved = planning.make(request, data_root)
    states = standing.look_at_plan(resolved, store)
    left = [run_id for run_id, state in states.items() if state.state is not State.DONE]
    where = costs.capacity(profile, len(left))
    expected = costs.estimates(resolved, store, where)
    cost = costs.of_plan(left, expected, where)
    runs = [
        {
            "row": run.row.name,
            "seed": run.seed,
            "run_id": run.run_id,
            "eval_id": run.eval_id,
            "state": states[run.run_id].label,
            "seconds": round(expected[run.run_id].seconds, 1),
            "seconds_source": expected[run.run_id].source,
        }
        for run in resolved.runs
    ]
    if as_json:
        return print_json({**_plan_head(resolved), "runs": runs, "cost": asdict(cost)})
    return _print_plan(resolved, runs, cost)


def _plan_head(resolved: "Plan") -> dict[str, Any]:
    skipped = {row.name: row.not_applicable for row in resolved.rows if row.not_applicable}
    return {
        "suite": resolved.suite.name,
        "scale": resolved.scale,
        "dataset": resolved.dataset,
        "missing": list(resolved.missing),
        "not_applicable": skipped,
    }


def _print_plan(resolved: "Plan", runs: Sequence[dict[str, Any]], cost: "Cost") -> None:
    from experiments.status.tables import duration

    click.echo(f"{resolved.suite.name}@{resolved.scale} on {resolved.dataset}: {resolved.suite.title}")
    wide = max(len(run["row"]) for run in runs)
    for run in runs:
        seconds = f"{duration(run['seconds']):>7} {run['seconds_source']}"
        click.echo(f"  {run['row']:<{wide}}  seed {run['seed']}  {run['state']:<12} {seconds}  {run['run_id']}")
    for name, reason in _plan_head(resolved)["not_applicable"].items():
        click.echo(f"  {name:<{wide}}  not applicable: {reason}")
    for line in cost.lines():
        click.echo(line)
    for line in resolved.missing:
        click.echo(f"missing: {line}")
    if not resolved.data.fingerprint:
        click.echo("the run ids are provisional: they contain the dataset's fingerprint")


@cli.command()
@click.argument("suite", required=False)
@plan_options
@root_options
@click.option("--watch", is_flag=True, help="A live table, until nothing is left to wait for; Ctrl-C ends it too.")
@json_option
def status(suite: str | None, root: Path, data_root: Path, watch: bool, as_json: bool, **asked: Any) -> None:
    """Show where the runs of SUITE stand (default: of every launched suite): by their files, then by Slurm.

    With --set, --row or --seeds it is about these runs, as `plan` resolves them, whatever was launched last.
    """
    from experiments.status import scheduler, suite_view, tables

    planned = any(asked[name] not in (None, ()) for name in ("rows", "seeds", "one_seed", "overrides"))
    if planned and suite is None:
        raise UserError("--set, --row and --seeds are about one suite: mpformer status SUITE --set KEY=VALUE")

    def views(max_age: float = 0.0) -> list["SuiteView"]:
        if planned and suite is not None:
            records = [_planned_record(suite, root, data_root, asked)]
        else:
            records = suite_view.chosen(root, suite, asked["scale"], asked["dataset"])
        return suite_view.views(root, records, max_age, warn)

    if as_json:
        return print_json([view.plain() for view in views()])
    if watch:
        return _watch_status(lambda: views(scheduler.ASK_PERIOD))
    found = views()
    for line in tables.notes(found):
        click.echo(line)
    console = new_console()
    for view in found:
        if len(view.runs) > tables.LONG:
            click.echo(tables.text(view, console.width))
        else:
            console.print(tables.table(view))
    if not found:
        click.echo(f"nothing was launched into {root} yet; start with: mpformer launch headline --root {root}")
    return None


def _planned_record(suite: str, root: Path, data_root: Path, asked: dict[str, Any]) -> "SuiteRecord":
    from experiments.store.run_dir import Store
    from experiments.suites import catalogue, planning

    request = plan_request(suite, **asked)
    catalogue.recall(Store(root), suite, request.scale, request.dataset)
    return planning.record_of(planning.make(request, data_root))


def _watch_status(views: Callable[[], list["SuiteView"]], period: float = 2.0) -> None:
    """Show the tables anew every few seconds until nothing is left to wait for, or Ctrl-C."""
    from rich.console import Group
    from rich.live import Live

    from experiments.status import tables
    from experiments.store import files

    live = Live(console=new_console(), auto_refresh=False)
    with live, files.remembering(), contextlib.suppress(KeyboardInterrupt):
        while True:
            found = views()
            live.update(Group(*tables.notes(found), *(tables.table(view) for view in found)), refresh=True)
            if not any(view.waited_for for view in found):
                return
            time.sleep(period)
