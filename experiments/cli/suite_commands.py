"""``mpformer suites``, ``plan``, ``status``, ``report`` and ``visualize``: what there is and where it stands."""

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
    from experiments.suites.planning import Plan


@cli.command()
@scale_options
@json_option
def suites(scale: str, dataset: str | None, as_json: bool) -> None:
    """List the suites with the table of the paper that they stand for, their rows, seeds and cost."""
    from experiments.status.tables import duration
    from experiments.suites import rows as registry

    chosen = registry.of_dataset(scale, dataset)
    listed = [_suite_record(suite, *suite.place(scale, dataset)) for suite in chosen]
    if as_json:
        return print_json(listed)
    for record in listed:
        click.echo(
            f"{record['suite']}: {record['title']} ({len(record['rows'])} rows x seeds {_listed(record['seeds'])} on "
            f"{record['dataset']}, about {duration(record['seconds'])} of one worker, declared; "
            f"table of the paper: {record['paper_table']})"
        )
        if record["description"]:
            click.echo(f"    {record['description']}")
        for row in record["rows"]:
            reason = f"  (not applicable: {row['not_applicable']})" if row["not_applicable"] else ""
            click.echo(f"    {row['name']:<28} {row['label']}{reason}")
    return None


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


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
        "not_applicable": suite.not_applicable.get(dataset, ""),
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
    from experiments.status.states import State
    from experiments.store.run_dir import Store
    from experiments.suites import planning

    resolved = planning.make(plan_request(suite, **asked), data_root)
    store = Store(root)
    states = planning.states(resolved, store)
    left = [run_id for run_id, state in states.items() if state.state is not State.DONE]
    where = costs.place(profile, len(left))
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
@scale_options
@root_options
@click.option("--watch", is_flag=True, help="A live table; Ctrl-C ends it.")
@json_option
def status(
    suite: str | None, scale: str, dataset: str | None, root: Path, data_root: Path, watch: bool, as_json: bool
) -> None:
    """Show where the runs of SUITE stand (default: of every launched suite): by their files, then by Slurm."""
    from experiments.status import scheduler, suite_view

    def views(max_age: float = 0.0) -> list[dict[str, Any]]:
        return suite_view.views(root, suite_view.chosen(root, suite, scale, dataset), max_age, tell=warn)

    if as_json:
        return print_json(views())
    if watch:
        return _watch_status(lambda: views(scheduler.ASK_PERIOD))
    found = views()
    for line in suite_view.notes(found):
        click.echo(line)
    for view in found:
        if len(view["runs"]) > suite_view.LONG:
            click.echo(suite_view.text(view))
        else:
            new_console().print(suite_view.table(view))
    if not found:
        click.echo(f"nothing was launched into {root} yet; start with: mpformer launch headline")
    return None


def _watch_status(views: Callable[[], list[dict[str, Any]]], period: float = 2.0) -> None:
    """Show the tables anew every few seconds until Ctrl-C."""
    from rich.console import Group
    from rich.live import Live

    from experiments.status import suite_view

    with Live(console=new_console(), auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            found = views()
            live.update(Group(*suite_view.notes(found), *(suite_view.table(view) for view in found)), refresh=True)
            time.sleep(period)


@cli.command()
@click.argument("suites", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All launched suites, with an overview; no names: too.")
@scale_options
@root_options
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Directory; default: <root>/reports.")
@click.option("--format", "formats", multiple=True, help="Only this format (md, tex, csv, json, html ...); repeatable.")
@click.option("--column", "columns", multiple=True, help="A column of the table, instead of the suite's; repeatable.")
@click.option("--decimals", type=click.IntRange(0, 6), default=None, help="Decimals of the table; default: per metric.")
@click.option("--check", is_flag=True, help="Compare with the published numbers; exit code 1 if one is outside.")
@json_option
def report(
    suites: tuple[str, ...],
    everything: bool,
    scale: str,
    dataset: str | None,
    root: Path,
    data_root: Path,
    out: Path | None,
    formats: tuple[str, ...],
    columns: tuple[str, ...],
    decimals: int | None,
    check: bool,
    as_json: bool,
) -> int:
    """Write tables (Markdown, LaTeX, ...) and self-contained pages for SUITES (none: all that were launched)."""
    from experiments.status import suite_view
    from experiments.suites import rows as registry
    from reports import build

    if everything and suites:
        raise UserError(f"--all is every suite that was launched; leave it out, or {', '.join(suites)}")
    for name in suites:
        registry.find(name).place(scale, dataset)
    if not suites:
        registry.of_dataset(scale, dataset)
    if check:
        return _check_report(suites, root, scale, dataset)
    suite_view.refresh(root, warn)
    paths = build.build(
        suites,
        root,
        scale=scale,
        dataset=dataset,
        out=out,
        formats=formats or build.FORMATS,
        columns=columns,
        decimals=decimals,
    )
    if as_json:
        print_json([str(path) for path in paths])
    else:
        click.echo("\n".join(str(path) for path in paths))
    return 0


def _check_report(suites: tuple[str, ...], root: Path, scale: str, dataset: str | None) -> int:
    from reports import build

    outside, others = build.check(suites, root, scale=scale, dataset=dataset)
    click.echo("\n".join([*outside, *others]))
    return 1 if outside else 0


@cli.command()
@click.argument("run")
@click.argument("run2", required=False)
@click.option("--images", default="", metavar="ID,ID", help="These images; masks that are not there are computed.")
@click.option("--worst", type=click.IntRange(1), default=None, metavar="N", help="The N most inconsistent objects.")
@click.option("--everywhere", is_flag=True, help="With --worst: of all evaluated images, not of the kept ones.")
@click.option("--query", type=click.IntRange(0), default=None, help="Only objects that end on this query.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=None, help="Page to write.")
@root_options
def visualize(
    run: str,
    run2: str | None,
    images: str,
    worst: int | None,
    everywhere: bool,
    query: int | None,
    out: Path | None,
    root: Path,
    data_root: Path,
) -> None:
    """Write a page that shows the masks of RUN (beside those of RUN2) layer by layer; opens without a server."""
    from experiments.runs import visualizing
    from experiments.store.run_dir import Store
    from reports.explorer import build_explorer

    if everywhere and worst is None:
        raise UserError("--everywhere says where to look for the worst objects: give --worst N too")
    found = [visualizing.newest_evaluation(Store(root).find(name)) for name in (run, run2) if name is not None]
    visualizing.check_comparable(found)
    chosen = visualizing.chosen_images(found, images, worst if everywhere else None)
    visualizing.complete(found, chosen, data_root)
    page = out or visualizing.default_page(root, found)
    folders, labels = [one.folder for one in found], visualizing.labels(found)
    click.echo(build_explorer(folders, page, images=chosen, worst=worst, query=query, labels=labels))
