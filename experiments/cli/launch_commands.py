"""``mpformer launch``, ``retry`` and ``cancel``."""

import contextlib
import functools
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from experiments.cli.console import new_console, print_outcome, progress_bar, warn
from experiments.cli.group import cli
from experiments.cli.options import (
    LOCAL_OPTIONS,
    SLURM_OPTIONS,
    execution_options,
    plan_options,
    plan_request,
    root_options,
    yes_option,
)
from mpformer.runtime.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.launch.local import Launch
    from experiments.launch.profiles import LocalProfile, SlurmProfile
    from experiments.slurm.batches import Target
    from experiments.store.run_dir import Store
    from experiments.suites.planning import Plan, Request


_report_option = click.option(
    "--report/--no-report", default=True, help="At the end, the suite's table and verdict here, and its report's pages."
)


@cli.command()
@click.argument("suite")
@plan_options
@root_options
@execution_options
@click.option("--smoke", is_flag=True, help="First one short run a row; the arrays of jobs wait until all went well.")
@click.option("--dry-run", is_flag=True, help="Print the batch scripts; submit and write nothing.")
@click.option("--new", is_flag=True, help="Only runs that were never begun: what failed or was stopped is left alone.")
@click.option("--forget-nodes", is_flag=True, help="Let jobs begin again on nodes on which the suite's starts died.")
@click.option("--mlflow/--no-mlflow", "mirror", default=True, help="Mirror the runs to MLflow in the background.")
@_report_option
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
    forget_nodes: bool,
    mirror: bool,
    report: bool,
    inline_: bool,
    **asked: Any,
) -> int:
    """Train, evaluate and analyse what is missing of SUITE; what is done or running is left alone."""
    from experiments.launch import choosing, inputs
    from experiments.store.run_dir import Store
    from experiments.suites import catalogue, planning

    store, detach = Store(root), bool(asked["detach"])
    where, request = _profile_and_request(suite, on, asked)
    catalogue.recall(store, suite, request.scale, request.dataset)
    resolved = planning.make(request, data_root)
    resolved = choosing.only_new(resolved, store) if new else resolved
    if dry_run:
        return _print_scripts(resolved, store, on, where, smoke)
    resolved = inputs.fetch_weights(_with_data(resolved))
    if not resolved.missing:
        inputs.check_models(run.config for run in resolved.unique)
    if inline_:
        return _inline(resolved, store)
    if smoke:
        _with_queue(where, "--smoke")
    if forget_nodes:
        _forget_nodes(resolved, store, _with_queue(where, "--forget-nodes"))
    return _start(resolved, store, on, where, detach, smoke=smoke, mirror=mirror, report=report)


def _profile_and_request(suite: str, on: str, asked: dict[str, Any]) -> tuple["LocalProfile | SlurmProfile", "Request"]:
    """The profile with what the command line changes of it, and what is asked for."""
    from experiments.launch import profiles

    profile = profiles.load(on)
    local = isinstance(profile, profiles.LocalProfile)
    ours, others = (LOCAL_OPTIONS, SLURM_OPTIONS) if local else (SLURM_OPTIONS, LOCAL_OPTIONS)
    wrong = next((name for name in others if name != "detach" and asked.get(name)), None)
    if wrong is not None:
        valid = ", ".join(f"--{name.replace('_', '-')}" for name in ours)
        raise UserError(f"--{wrong.replace('_', '-')} does not apply to profile {on!r}; use {valid}")
    changes = {name: asked[name] for name in ours if name != "detach" and asked.get(name) is not None}
    rest = {name: value for name, value in asked.items() if name not in (*LOCAL_OPTIONS, *SLURM_OPTIONS)}
    return profile.model_copy(update=changes), plan_request(suite, **rest)


def _with_queue(where: "LocalProfile | SlurmProfile", option: str) -> "SlurmProfile":
    """The profile, if it is one with a queue; raises UserError."""
    from experiments.launch.profiles import SlurmProfile

    if not isinstance(where, SlurmProfile):
        raise UserError(f"{option} is for jobs in a queue; give a Slurm profile: --on PROFILE")
    return where


def _print_scripts(resolved: "Plan", store: "Store", on: str, where: Any, smoke: bool) -> int:
    from experiments.launch.profiles import SlurmProfile
    from experiments.slurm import batches, submission

    if not isinstance(where, SlurmProfile):
        raise UserError(f"--dry-run prints batch scripts, and profile {on!r} has none; look with: mpformer plan")
    for text in submission.scripts(resolved, store, batches.Target(on, where, smoke)):
        click.echo(text)
    return 0


def _forget_nodes(resolved: "Plan", store: "Store", where: "SlurmProfile") -> None:
    from experiments.slurm import submission

    count = submission.forget_nodes(resolved, store, where.exclude)
    click.echo(f"{count} waiting jobs may begin on any node of theirs again")


def _start(
    resolved: "Plan",
    store: "Store",
    on: str,
    where: "LocalProfile | SlurmProfile",
    detach: bool = False,
    *,
    smoke: bool = False,
    retry: tuple[str, ...] = (),
    mirror: bool = False,
    report: bool = False,
) -> int:
    """Hand the missing runs to Slurm, or start them on this machine and follow them, unless ``detach``.

    Returns 1 if not everything was handed over that could be, or not all of them are done then. With ``report`` what
    came of runs on this machine is the end.
    """
    from experiments.launch import local, watching
    from experiments.launch.profiles import SlurmProfile
    from experiments.slurm.batches import Target
    from experiments.tracking import sync

    if isinstance(where, SlurmProfile):
        return _submit(resolved, store, Target(on, where, smoke), retry)
    with contextlib.nullcontext() if detach else watching.ended_with_the_command():
        started = local.start(resolved, store, where, command=command_line(), retry=retry)
        if mirror and started.started:
            sync.start_background_sync(store.root)
        code = _watch_launch(resolved, store, started, detach, new_console())
        if report and not detach:
            _report(resolved, store)
        return code


def _submit(resolved: "Plan", store: "Store", target: "Target", retry: tuple[str, ...]) -> int:
    """Hand the missing runs to Slurm and say what was handed over; 1 if not everything was that could be."""
    from experiments.slurm import submission
    from experiments.suites import planning

    done = submission.launch(resolved, store, target, command=command_line(), retry=retry)
    _say_what_is_left_alone(done.left_alone, resolved, store, click.echo)
    queued = [one for one in done.submissions if one.job_id]
    for one in queued:
        click.echo(f"  {one.job_id}  {one.stage:<8}  {len(one.runs) or 1} jobs  {one.name}")
    if queued:
        click.echo(f"queued {len(done.started)} runs: {done.directory}")
        click.echo(f"nothing has to stay open; look with: {planning.command('status', resolved, store, '--watch')}")
    elif not done.problem:
        click.echo("nothing to start: every run is done, running, queued, or failed")
    if done.left_over:
        last_job = target.profile.report is not False
        then = "the last job launches them" if last_job else "launch again when there is room"
        click.echo(f"{done.left_over} runs do not fit in the queue now ({done.limit}): {then}")
    if done.problem:
        click.echo(f"mpformer: {done.problem}; what was not queued starts with the next launch", err=True)
    return 1 if done.problem else 0


def _say_what_is_left_alone(
    left_alone: Mapping[str, str], resolved: "Plan", store: "Store", say: Callable[[str], None]
) -> None:
    from experiments.suites import planning

    for run_id, reason in left_alone.items():
        say(f"{run_id} failed ({reason}) and would again")
    if left_alone:
        say(f"to start it anyway: {planning.command('retry', resolved, store)}")


def _report(resolved: "Plan", store: "Store") -> None:
    """Run the command ``report``, which another package adds; what goes wrong with it is no failure of the launch."""
    command = cli.get_command(click.get_current_context(), "report")
    where = ["--scale", resolved.scale, "--dataset", resolved.dataset, "--root", str(store.root)]
    try:
        if command is not None:
            command.main([resolved.suite.name, *where], standalone_mode=False)
    except UserError as error:
        warn(f"no report: {error}")


def _inline(resolved: "Plan", store: "Store") -> int:
    import logging

    from experiments.launch import local

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    ending = local.inline(resolved, store, command_line())
    return print_outcome(resolved.unique[0].run_id, ending)


def _with_data(resolved: "Plan") -> "Plan":
    """Prepare drawn images that are not there yet."""
    from experiments.launch import inputs

    if not resolved.data.preparable:
        return resolved
    with progress_bar(new_console(), f"preparing {resolved.dataset}") as progress:
        return inputs.prepare_data(resolved, progress)


def _watch_launch(resolved: "Plan", store: "Store", started: "Launch", detach: bool, console: "Console") -> int:
    from experiments.launch import watching
    from experiments.status import suite_view
    from experiments.status.states import State
    from experiments.suites import planning

    say = functools.partial(console.print, soft_wrap=True, markup=False)
    _say_what_is_left_alone(started.left_alone, resolved, store, say)
    count = len(started.started)
    if count:
        workers = f"{started.width.workers} workers of {started.width.threads} threads"
        say(f"launched {count} runs on {workers}: {started.directory}")
    else:
        say("nothing to start: every run is done, running, or failed")
    if detach:
        say(f"they go on by themselves; look with: {planning.command('status', resolved, store, '--watch')}")
        return 0
    states = watching.follow(resolved, store, started, console)
    for line in started.problems():
        say(line)
    suite_view.refresh(store.root, warn)
    rest = [state for state in states if state.state is not State.DONE]
    say(f"{len(states) - len(rest)} of {len(states)} runs done")
    for state in rest:
        say(f"{state.run_id}: {state.label} {state.detail}")
    return 1 if rest else 0


@cli.command()
@click.argument("suite")
@plan_options
@root_options
@click.option("--class", "classes", multiple=True, help="Only this failure class, such as oom; may be repeated.")
@click.option(
    "--grow",
    metavar="KEY=FACTOR,…",
    help="More of what was short: memory=1.5 for the runs of class oom, time=2 for those of class timeout; times what "
    "the profile says, on Slurm.",
)
@execution_options
@_report_option
def retry(
    suite: str,
    root: Path,
    data_root: Path,
    classes: tuple[str, ...],
    grow: str | None,
    on: str,
    report: bool,
    **asked: Any,
) -> int:
    """Start the failed runs of SUITE again, those too that would fail again; earlier attempts are kept."""
    from experiments.launch import choosing
    from experiments.store.run_dir import Store
    from experiments.suites import planning

    store = Store(root)
    where, request = _profile_and_request(suite, on, asked)
    every = planning.make(planning.as_launched(request, store), data_root)
    if grow is not None:
        return _retry_grown(every, store, on, _with_queue(where, "--grow"), grow)
    resolved, kinds = choosing.only_failed(every, store, classes)
    return _start(resolved, store, on, where, bool(asked["detach"]), retry=kinds, report=report)


def _retry_grown(every: "Plan", store: "Store", on: str, where: "SlurmProfile", grow: str) -> int:
    """Start the runs that each key helps against, with more of it than the profile says; 1 if not all could be."""
    from experiments.launch import choosing, profiles

    grown = {key: where.grown(key, factor) for key, factor in profiles.growth(grow).items()}  # type: ignore[arg-type]
    helped = {profiles.GROWS[key]: profile for key, profile in grown.items()}
    _, kinds = choosing.only_failed(every, store, tuple(helped))
    chosen = {kind: choosing.only_failed(every, store, (kind,))[0] for kind in kinds}
    return max(_start(plan, store, on, helped[kind], retry=(kind,)) for kind, plan in chosen.items())


@cli.command()
@click.argument("suite")
@plan_options
@root_options
@yes_option
@click.option("--now", is_flag=True, help="Do not wait for checkpoints: Slurm ends running jobs too.")
def cancel(suite: str, root: Path, data_root: Path, yes: bool, now: bool, **asked: Any) -> int:
    """Have the running runs of SUITE checkpoint and end, and take waiting ones from the queue; launching continues."""
    from experiments.launch import choosing
    from experiments.runs import cancelling
    from experiments.store.run_dir import Store
    from experiments.suites import planning

    store = Store(root)
    resolved = planning.make(planning.as_launched(plan_request(suite, **asked), store), data_root)
    active = [state for state in choosing.snapshot(resolved, store) if state.active]
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


def command_line() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
