"""The ``mpformer`` command. Everything heavy is imported inside the command that needs it."""

import contextlib
import errno
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from experiments.cli import model_commands, run_commands
from mpformer.runtime.errors import RunFailure, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.launch.costs import Cost
    from experiments.launch.profiles import LocalProfile, SlurmProfile
    from experiments.status.states import RunState
    from experiments.store.run_dir import Store
    from experiments.suites.planning import Plan, Request

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)

Command = Callable[..., Any]


def main() -> None:
    """Entry point: exit code 0 fine, 1 runs failed, 2 a mistake the user can mend (one line), 130 Ctrl-C."""
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except (UserError, RunFailure) as error:
        _exit(str(error), error.exit_code)
    except click.exceptions.Abort:
        _exit("interrupted", 130)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # `mpformer … | head`
        sys.exit(0)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        _exit(f"cannot write {error.filename or ''}: {error.strerror}; free some space or choose another --root", 2)


def _exit(message: str, code: int) -> None:
    click.echo(f"mpformer: {message}", err=True)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="mpformer")
def cli() -> None:
    """Reproduce, ablate and explain MP-Former: launch a named suite, read its tables.

    \b
    mpformer suites                  what there is
    mpformer launch headline         train, evaluate, analyse what is missing
    mpformer report headline         tables and figures beside the paper's numbers
    """


def _root_options(command: Command) -> Command:
    store = click.option(
        "--root", envvar="MPFORMER_ROOT", default="store", show_default=True, type=click.Path(path_type=Path),
        help="Run store.  [env: MPFORMER_ROOT]",
    )  # fmt: skip
    data = click.option(
        "--data-root", envvar="DETECTRON2_DATASETS", default="datasets", show_default=True,
        type=click.Path(path_type=Path), help="Datasets.  [env: DETECTRON2_DATASETS]",
    )  # fmt: skip
    return store(data(command))


def _scale_options(command: Command) -> Command:
    scale = click.option("--scale", default="mini", show_default=True, help="mini or paper.")
    dataset = click.option("--dataset", default=None, help="Dataset, where a scale has several (mini: shapes, nuclei).")
    return scale(dataset(command))


def _plan_options(command: Command) -> Command:
    for option in (
        click.option("--seed", "one_seed", type=int, default=None, help="One seed."),
        click.option("--seeds", default=None, help="Seeds, such as 0,1,2 or 0-4; default: the suite's."),
        click.option("--row", "rows", multiple=True, help="Only this row; may be given several times."),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE",
            help="Change a configuration key of every row, such as schedule.max_iter=300 (milestones move along). "
            "This changes the runs' identity.",
        ),
    ):  # fmt: skip
        command = option(command)
    return _scale_options(command)


def _place_options(command: Command) -> Command:
    for option in (
        click.option("--max-submit", type=click.IntRange(1), default=None, help="Most jobs in the queue."),
        click.option("--max-array", type=click.IntRange(1), default=None, help="Most jobs an array."),
        click.option("--parallelism", type=click.IntRange(1), default=None, help="Most jobs of the suite at a time."),
        click.option("--detach", is_flag=True, help="Return at once; the workers go on. (Jobs in a queue always do.)"),
        click.option("--threads", type=click.IntRange(1), default=None, help="Threads a worker."),
        click.option(
            "--workers", type=click.IntRange(1), default=None, help="Worker processes; default: by cores and memory."
        ),
        click.option(
            "--on", default="local", show_default=True, metavar="PROFILE",
            help="Where: a profile of slurm/profiles, or the path of a YAML file.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


_json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


@cli.command()
@_scale_options
@_json_option
def suites(scale: str, dataset: str | None, as_json: bool) -> None:
    """List the suites with the table of the paper that they stand for, their rows, seeds and cost."""
    from experiments.status.tables import duration
    from experiments.suites import rows as registry

    chosen = registry.of_dataset(scale, dataset)
    listed = [_suite_record(suite, *suite.place(scale, dataset)) for suite in chosen]
    if as_json:
        return _print_json(listed)
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
@_plan_options
@_root_options
@click.option("--on", "profile", default="local", show_default=True, help="Profile to reckon the cost for.")
@_json_option
def plan(suite: str, as_json: bool, root: Path, data_root: Path, profile: str, **asked: Any) -> None:
    """Show the runs of SUITE: their state, ids, and what they are expected to cost."""
    from experiments.launch import costs
    from experiments.status.states import State
    from experiments.store.run_dir import Store
    from experiments.suites import planning

    resolved = planning.make(_request(suite, **asked), data_root)
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
        return _print_json({**_plan_head(resolved), "runs": runs, "cost": asdict(cost)})
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


def _request(
    suite: str,
    scale: str,
    dataset: str | None,
    rows: Sequence[str],
    seeds: str | None,
    one_seed: int | None,
    overrides: Sequence[str],
) -> "Request":
    from experiments.suites import planning

    if seeds is not None and one_seed is not None:
        raise UserError("give --seed or --seeds, not both")
    chosen = (one_seed,) if one_seed is not None else planning.parse_seeds(seeds) if seeds is not None else ()
    changed = tuple(planning.parse_override(text) for text in overrides)
    for key, _ in changed:
        if key == "seed":
            raise UserError("the seed is not an override; use --seed or --seeds")
    return planning.Request(suite, scale, dataset, tuple(rows), chosen, changed)


def _as_launched(request: "Request", store: "Store") -> "Request":
    """Fill in rows, seeds and overrides that were not given from the suite's last launch."""
    from experiments.suites import planning

    return planning.as_launched(request, store)


@cli.command()
@click.argument("suite")
@_plan_options
@_root_options
@_place_options
@click.option("--smoke", is_flag=True, help="First one short run a row; the arrays of jobs wait until all went well.")
@click.option("--dry-run", is_flag=True, help="Print the batch scripts; submit and write nothing.")
@click.option("--new", is_flag=True, help="Only runs that were never begun: what failed or was stopped is left alone.")
@click.option("--mlflow/--no-mlflow", "mirror", default=True, help="Mirror the runs to MLflow in the background.")
@click.option(
    "--inline", "inline_", is_flag=True, help="Execute one run (--row, --seed) in this process, for a debugger."
)
def launch(
    suite: str,
    root: Path,
    data_root: Path,
    on: str,
    smoke: bool,
    dry_run: bool,
    new: bool,
    mirror: bool,
    inline_: bool,
    **asked: Any,
) -> int:
    """Train, evaluate and analyse what is missing of SUITE; what is done or running is left alone."""
    from experiments.launch import local as launching
    from experiments.launch.profiles import SlurmProfile
    from experiments.store.run_dir import Store
    from experiments.suites import planning

    console = _console()
    store = Store(root)
    where, rest = _place(on, asked)
    resolved = planning.make(_request(suite, **rest), data_root)
    resolved = launching.only_new(resolved, store) if new else resolved
    if dry_run:
        return _print_scripts(resolved, store, data_root, on, where, smoke)
    resolved = launching.fetch_weights(_with_data(resolved, data_root, console), data_root)
    if inline_:
        return _inline(resolved, store, data_root)
    if isinstance(where, SlurmProfile):
        return _submit(resolved, store, data_root, on, where, smoke)
    if smoke:
        raise UserError("--smoke is for jobs in a queue; give a Slurm profile: --on PROFILE")
    width = launching.Width(where.workers or launching.fit(None, len(resolved.unique)).workers, where.threads)
    about: dict[str, Any] = {"command": _command(), "width": width, "notify": where.notify}
    started = launching.launch(resolved, store, data_root, **about)
    if mirror and started.started:
        _mirror(root)
    return _watch_launch(resolved, store, started, width, bool(asked["detach"]), console)


def _place(on: str, asked: dict[str, Any]) -> tuple["LocalProfile | SlurmProfile", dict[str, Any]]:
    """The profile with what the command line changes of it, and the options that are not about it."""
    from experiments.launch import profiles

    profile = profiles.load(on)
    local = isinstance(profile, profiles.LocalProfile)
    ours, others = (_LOCAL, _SLURM) if local else (_SLURM, _LOCAL)
    wrong = next((name for name in others if name != "detach" and asked.get(name)), None)
    if wrong is not None:
        raise UserError(f"--{wrong.replace('_', '-')} does not apply to profile {on!r}; use {_flags(ours)}")
    changes = {name: asked[name] for name in ours if name != "detach" and asked.get(name) is not None}
    rest = {name: value for name, value in asked.items() if name not in (*_LOCAL, *_SLURM)}
    return profile.model_copy(update=changes), rest


_LOCAL = ("workers", "threads", "detach")
_SLURM = ("parallelism", "max_array", "max_submit")


def _flags(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _print_scripts(
    resolved: "Plan", store: "Store", data_root: Path, on: str, where: Any, smoke: bool, retry: tuple[str, ...] = ()
) -> int:
    from experiments.launch.profiles import SlurmProfile
    from experiments.slurm import submission

    if not isinstance(where, SlurmProfile):
        raise UserError(f"--dry-run prints batch scripts, and profile {on!r} has none; look with: mpformer plan")
    target = submission.Target(on, where, smoke)
    for text in submission.scripts(resolved, store, data_root, target, retry):
        click.echo(text)
    return 0


def _submit(
    resolved: "Plan",
    store: "Store",
    data_root: Path,
    on: str,
    profile: "SlurmProfile",
    smoke: bool,
    retry: tuple[str, ...] = (),
) -> int:
    """Hand the missing runs to Slurm and say what was handed over; 1 if not everything was that could be."""
    from experiments.slurm import submission

    target = submission.Target(on, profile, smoke)
    done = submission.launch(resolved, store, data_root, target, command=_command(), retry=retry)
    for run_id, reason in done.left_alone.items():
        click.echo(f"{run_id} failed ({reason}) and would again: `mpformer retry` starts it anyway")
    queued = [one for one in done.submissions if one.job_id]
    for one in queued:
        click.echo(f"  {one.job_id}  {one.stage:<8}  {len(one.runs) or 1} jobs  {one.name}")
    if queued:
        click.echo(f"queued {len(done.started)} runs: {done.directory}")
        click.echo(f"nothing has to stay open; look with: mpformer status {resolved.suite.name} --watch")
    elif not done.problem:
        click.echo("nothing to start: every run is done, running, queued, or failed")
    if done.left_over:
        then = "the last job launches them" if profile.report is not False else "launch again when there is room"
        click.echo(f"{done.left_over} runs do not fit in the queue now ({done.limit}): {then}")
    if done.problem:
        click.echo(f"mpformer: {done.problem}; what was not queued starts with the next launch", err=True)
    return 1 if done.problem else 0


def _mirror(root: Path) -> None:
    """Start mirroring to MLflow; whatever comes of it, the launch goes on."""
    from experiments.tracking import sync

    sync.start_background_sync(root)


def _inline(resolved: "Plan", store: "Store", data_root: Path) -> int:
    import logging

    from experiments.launch import local as launching

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    outcome = launching.inline(resolved, store, data_root, _command())
    click.echo(f"{resolved.unique[0].run_id}: {outcome.name} {outcome.failure_class} {outcome.detail}".rstrip())
    return {"failed": 1, "interrupted": 130}.get(outcome.name, 0)


def _with_data(resolved: "Plan", data_root: Path, console: "Console") -> "Plan":
    """Prepare drawn images that are not there yet."""
    from experiments.launch import local as launching

    if not resolved.data.preparable:
        return resolved
    with _progress(console, f"preparing {resolved.dataset}") as progress:
        return launching.prepare_data(resolved, data_root, progress)


def _watch_launch(resolved: "Plan", store: "Store", started: Any, width: Any, detach: bool, console: "Console") -> int:
    from experiments.launch import watching
    from experiments.status import suite_view
    from experiments.status.states import State

    for run_id, reason in started.left_alone.items():
        console.print(f"{run_id} failed ({reason}) and would again: `mpformer retry` starts it anyway", soft_wrap=True)
    count = len(started.started)
    if count:
        workers = min(width.workers, count)
        console.print(
            f"launched {count} runs on {workers} workers of {width.threads} threads: {started.directory}",
            soft_wrap=True,
        )
    else:
        console.print("nothing to start: every run is done, running, or failed")
    if detach:
        console.print(f"they go on by themselves; look with: mpformer status {resolved.suite.name} --watch")
        return 0
    states = watching.follow(resolved, store, started, console)
    for line in started.problems():
        console.print(line, soft_wrap=True, markup=False)
    suite_view.refresh(store.root, _warn)
    return _summary(states, State.DONE, console)


def _summary(states: "Sequence[RunState]", done: Any, console: "Console") -> int:
    rest = [state for state in states if state.state is not done]
    console.print(f"{len(states) - len(rest)} of {len(states)} runs done")
    for state in rest:
        console.print(f"{state.run_id}: {state.label} {state.detail}", soft_wrap=True, highlight=False, markup=False)
    return 1 if rest else 0


@cli.command()
@click.argument("suite", required=False)
@_scale_options
@_root_options
@click.option("--watch", is_flag=True, help="A live table; Ctrl-C ends it.")
@_json_option
def status(
    suite: str | None, scale: str, dataset: str | None, root: Path, data_root: Path, watch: bool, as_json: bool
) -> None:
    """Show where the runs of SUITE stand (default: of every launched suite): by their files, then by Slurm."""
    from experiments.status import scheduler, suite_view

    def views(max_age: float = 0.0) -> list[dict[str, Any]]:
        return suite_view.views(root, suite_view.chosen(root, suite, scale, dataset), max_age, tell=_warn)

    if as_json:
        return _print_json(views())
    if watch:
        return _watch_status(lambda: views(scheduler.ASK_PERIOD))
    found = views()
    for line in suite_view.notes(found):
        click.echo(line)
    for view in found:
        if len(view["runs"]) > suite_view.LONG:
            click.echo(suite_view.text(view))
        else:
            _console().print(suite_view.table(view))
    if not found:
        click.echo(f"nothing was launched into {root} yet; start with: mpformer launch headline")
    return None


def _warn(line: str) -> None:
    click.echo(f"mpformer: {line}", err=True)


def _watch_status(views: Callable[[], list[dict[str, Any]]], period: float = 2.0) -> None:
    """Show the tables anew every few seconds until Ctrl-C."""
    from rich.console import Group
    from rich.live import Live

    from experiments.status import suite_view

    with Live(console=_console(), auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            found = views()
            live.update(Group(*suite_view.notes(found), *(suite_view.table(view) for view in found)), refresh=True)
            time.sleep(period)


@cli.command()
@click.argument("run")
@click.argument("run2", required=False)
@click.option("--images", default="", metavar="ID,ID", help="These images; masks that are not there are computed.")
@click.option("--worst", type=click.IntRange(1), default=None, metavar="N", help="The N most inconsistent objects.")
@click.option("--everywhere", is_flag=True, help="With --worst: of all evaluated images, not of the kept ones.")
@click.option("--query", type=click.IntRange(0), default=None, help="Only objects that end on this query.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=None, help="Page to write.")
@_root_options
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


@cli.command()
@click.argument("suites", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All launched suites, with an overview; no names: too.")
@_scale_options
@_root_options
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Directory; default: <root>/reports.")
@click.option("--format", "formats", multiple=True, help="Only this format (md, tex, csv, json, html ...); repeatable.")
@click.option("--column", "columns", multiple=True, help="A column of the table, instead of the suite's; repeatable.")
@click.option("--decimals", type=click.IntRange(0, 6), default=None, help="Decimals of the table; default: per metric.")
@click.option("--check", is_flag=True, help="Compare with the published numbers; exit code 1 if one is outside.")
@_json_option
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
    suite_view.refresh(root, _warn)
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
        _print_json([str(path) for path in paths])
    else:
        click.echo("\n".join(str(path) for path in paths))
    return 0


def _check_report(suites: tuple[str, ...], root: Path, scale: str, dataset: str | None) -> int:
    from reports import build

    outside, others = build.check(suites, root, scale=scale, dataset=dataset)
    click.echo("\n".join([*outside, *others]))
    return 1 if outside else 0


@cli.group()
def data() -> None:
    """Prepare and check datasets."""


@data.command("prepare")
@click.argument("name")
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option("--crop", type=click.IntRange(32), default=128, show_default=True, help="Side of the crops of nuclei.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="dataset.shapes.… for shapes.")
@_root_options
def data_prepare(
    name: str, source: Path | None, crop: int, overrides: Sequence[str], root: Path, data_root: Path
) -> None:
    """Write dataset NAME (shapes; nuclei from SOURCE) under the data root, or convert a release that lies there
    (coco, ade20k, cityscapes); what is done is left alone, what was interrupted goes on."""
    from experiments.suites import planning, scales
    from mpformer.data import convert, prepare

    with _progress(_console(), f"preparing {name}") as progress:
        if name == "shapes":
            config = scales.base("mini", "shapes").replace(dict(planning.parse_override(text) for text in overrides))
            assert config.dataset.shapes is not None
            path = prepare.prepare_shapes(config.dataset.shapes, data_root, progress)
        elif name == "nuclei":
            if source is None:
                raise UserError("nuclei needs its source: mpformer data prepare nuclei SRC (directory or archive)")
            path = prepare.prepare_nuclei(source, data_root, crop, progress)
        else:
            prepare.check_name(name)
            path = convert.convert(name, data_root, progress)
    click.echo(path)


@data.command("check")
@click.argument("name")
@_root_options
@click.option("--full", is_flag=True, help="Compare every file with its checksum, not the annotation files alone.")
@_json_option
def data_check(name: str, root: Path, data_root: Path, full: bool, as_json: bool) -> int:
    """Say what of dataset NAME is under the data root, what is missing and where to get it; open a sample."""
    from mpformer.data import prepare

    found = prepare.check(name, data_root, full)
    if as_json:
        _print_json([{**asdict(report), "ok": report.ok} for report in found])
    else:
        for line in (line for report in found for line in report.lines()):
            click.echo(line)
    return 0 if all(report.ok for report in found) else 2


@cli.group()
def mlflow() -> None:
    """Mirror runs to MLflow."""


@mlflow.command("sync")
@_root_options
@click.option("--uri", default=None, help="Tracking server; default: a SQLite file in the run store.")
def mlflow_sync(root: Path, data_root: Path, uri: str | None) -> None:
    """Bring MLflow up to the run store; can be repeated, and never disturbs training."""
    from experiments.store.run_dir import Store
    from experiments.tracking import sync

    click.echo(sync.sync(Store(root), uri))


@cli.command()
@_root_options
@_json_option
def doctor(root: Path, data_root: Path, as_json: bool) -> int:
    """Say what is installed and in use, train two iterations, and what to do about what is missing."""
    from experiments.cli import doctor as checks

    return int(checks.run(root=root, data_root=data_root, as_json=as_json) or 0)


@cli.command()
@click.argument("suite")
@_plan_options
@_root_options
@click.option("--failed", is_flag=True, required=True, help="Retry the failed runs (the only kind there is to retry).")
@click.option("--class", "classes", multiple=True, help="Only this failure class, such as oom; may be repeated.")
@_place_options
def retry(
    suite: str, root: Path, data_root: Path, failed: bool, classes: tuple[str, ...], on: str, **asked: Any
) -> int:
    """Start the failed runs of SUITE again, those too that would fail again; earlier attempts are kept."""
    from experiments.launch import local as launching
    from experiments.launch.profiles import SlurmProfile
    from experiments.store.run_dir import Store
    from experiments.suites import planning

    store = Store(root)
    where, rest = _place(on, asked)
    request = _as_launched(_request(suite, **rest), store)
    resolved = launching.only_failed(planning.make(request, data_root), store, classes)
    kinds = launching.failure_classes(resolved, store)
    if isinstance(where, SlurmProfile):
        return _submit(resolved, store, data_root, on, where, smoke=False, retry=kinds)
    width = launching.Width(where.workers or launching.fit(None, len(resolved.unique)).workers, where.threads)
    about: dict[str, Any] = {"command": _command(), "width": width, "notify": where.notify}
    started = launching.launch(resolved, store, data_root, retry=kinds, **about)
    return _watch_launch(resolved, store, started, width, bool(asked["detach"]), _console())


@cli.command()
@click.argument("suite")
@_plan_options
@_root_options
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--now", is_flag=True, help="Do not wait for checkpoints: Slurm ends running jobs too.")
def cancel(suite: str, root: Path, data_root: Path, yes: bool, now: bool, **asked: Any) -> int:
    """Have the running runs of SUITE checkpoint and end, and take waiting ones from the queue; launching continues."""
    from experiments.launch import local as launching
    from experiments.runs import cancelling
    from experiments.store.run_dir import Store
    from experiments.suites import planning

    store = Store(root)
    resolved = planning.make(_as_launched(_request(suite, **asked), store), data_root)
    active = [state for state in launching.snapshot(resolved, store) if state.active]
    if not active:
        click.echo("nothing of it is running or waiting")
        return 0
    if not yes:
        for state in active:
            click.echo(f"{state.run_id}: {state.label} {state.detail}".rstrip())
        click.confirm(f"cancel {len(active)} runs?", abort=True)
    done = cancelling.cancel(store, active, now)
    click.echo(f"asked {done.asked} runs to end" + (f", cancelled {len(done.jobs)} jobs in Slurm" if done.jobs else ""))
    if done.trouble:
        click.echo(f"mpformer: {done.trouble}: waiting jobs end when they begin; or cancel again later", err=True)
    return 1 if done.trouble else 0


for _single in (*model_commands.COMMANDS, *run_commands.COMMANDS):
    cli.add_command(_single)


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


def _print_json(content: Any) -> None:
    click.echo(json.dumps(content, indent=1))


@contextlib.contextmanager
def _progress(console: "Console", title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, a few lines elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not console.is_terminal:
        yield _printed_progress(title)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _printed_progress(title: str) -> Callable[[int, int], None]:
    shown = [-1]

    def show(done: int, total: int) -> None:
        quarter = 4 * done // max(total, 1)
        if quarter != shown[0]:
            shown[0] = quarter
            click.echo(f"{title}: {done}/{total}")

    return show


if __name__ == "__main__":
    main()
