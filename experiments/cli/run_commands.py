"""Commands about single runs: ``logs``, ``void``, ``diff``, ``compare``, ``reevaluate``, ``prune``, ``archive`` …"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from experiments.cli.console import print_json, print_outcome
from experiments.cli.group import cli
from experiments.cli.options import json_option, root_option, root_options, scale_options, yes_option
from mpformer.runtime.errors import UserError

if TYPE_CHECKING:
    from experiments.runs.importing import Handled
    from experiments.runs.reevaluating import Evaluation
    from experiments.store.run_dir import Store


@cli.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on until nothing works on the run, through requeues.")
@click.option("--attempt", type=int, default=None, help="An earlier attempt; default: the last.")
@click.option("--job", is_flag=True, help="What Slurm and submitit wrote of the run's last job instead.")
@root_option
def logs(run: str, follow: bool, attempt: int | None, job: bool, root: Path) -> None:
    """Print the log of RUN (its id, or the id's beginning or end)."""
    from experiments.status.logs import job_log, log
    from experiments.store.run_dir import Store

    store = Store(root)
    found = store.reading(store.find(run).run_id)
    if job:
        text = job_log(store, found)
        if not text:
            raise UserError(f"{found.run_id} has no log of a Slurm job; leave out --job")
        return click.echo(text, nl=False)
    for text in log(store, found, attempt, follow):
        click.echo(text, nl=False)
    return None


@cli.command()
@click.argument("run")
@click.option("--reason", required=True, help="Why the results must not be used.")
@root_option
def void(run: str, reason: str, root: Path) -> None:
    """Mark the results of RUN as void, visibly; the next launch does it again and keeps what was there aside."""
    from experiments.store.run_dir import Store

    if not reason.strip():
        raise UserError("--reason is shown wherever the run's number was: give one")
    found = Store(root).find(run)
    found.unpack()
    found.declare_void(reason)
    click.echo(f"{found.run_id} is void: {reason}")


@cli.command()
@click.argument("first")
@click.argument("second")
@root_option
@json_option
def diff(first: str, second: str, root: Path, as_json: bool) -> None:
    """Show how two runs differ: configuration, code, packages, threads."""
    from experiments.runs import differences
    from experiments.store.run_dir import Store

    store = Store(root)
    found = differences.difference(*(store.reading(store.find(name).run_id) for name in (first, second)))
    if as_json:
        return print_json(found)
    if not found:
        click.echo("no difference")
    for key, (one, other) in found.items():
        click.echo(f"{key}: {one!s} -> {other!s}")
    return None


@cli.command()
@click.argument("run")
@click.argument("run2")
@click.option("--metric", default="AP", show_default=True, help="AP, AP50, AP75, PQ, SQ, RQ or mIoU, as evaluated.")
@click.option("--resamples", type=click.IntRange(1), default=1000, show_default=True)
@json_option
@root_option
def compare(run: str, run2: str, metric: str, resamples: int, as_json: bool, root: Path) -> None:
    """Compare a score of two runs' checkpoints by resampling the images; says nothing of the methods."""
    from experiments.runs import comparing, visualizing
    from experiments.store.run_dir import Store

    store = Store(root)
    found = [visualizing.newest_evaluation(store.reading(store.find(name).run_id)) for name in (run, run2)]
    visualizing.check_comparable(found)
    test = comparing.bootstrap(found[0], found[1], metric, resamples)
    if as_json:
        return print_json(asdict(test))
    names = visualizing.labels(found)
    click.echo(
        f"{test.metric}: {names[1]} - {names[0]} = {test.effect:+.2f}, 95 % interval {test.low:+.2f} to "
        f"{test.high:+.2f}, p = {test.p:.3g}"
    )
    return click.echo(
        f"paired bootstrap over {test.images} images, {test.resamples} resamples: {test.about} (compare rows over "
        "seeds for that: mpformer report)"
    )


@cli.command()
@click.argument("runs", nargs=-1)
@click.option("--suite", default=None, help="All trained runs of this suite, instead of RUNS.")
@scale_options
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="evaluation.… or runtime.…; repeatable.")
@yes_option
@root_options
def reevaluate(
    runs: tuple[str, ...],
    suite: str | None,
    scale: str,
    dataset: str | None,
    overrides: tuple[str, ...],
    yes: bool,
    root: Path,
    data_root: Path,
) -> int:
    """Score trained RUNS anew, without training; earlier results of the setting are replaced at the end, and kept."""
    from experiments.runs import reevaluating
    from experiments.store.run_dir import Store
    from experiments.suites import planning

    if bool(runs) == bool(suite):
        raise UserError("say what to score: RUNS by their ids, or --suite SUITE")
    store = Store(root)
    changed = [planning.parse_override(text) for text in overrides]
    if suite:
        chosen = _of_suite(store, planning.Request(suite, scale, dataset), data_root, changed)
    else:
        chosen = reevaluating.chosen([store.find(name) for name in runs], changed, {})
    reevaluating.check(chosen, data_root)
    if not yes:
        click.confirm(f"score {len(chosen)} runs anew in this process, one after the other?", abort=True)
    ended = [_scored(one, store, data_root) for one in chosen]
    return 0 if all(ended) else 1


def _of_suite(store: "Store", request: Any, data_root: Path, changed: Sequence[tuple[str, Any]]) -> "list[Evaluation]":
    from experiments.runs import reevaluating
    from experiments.suites import planning

    plan = planning.make(planning.as_launched(request, store), data_root)
    configs = {run.run_id: run.config for run in plan.unique}
    trained = [run for run in map(store.run, configs) if run.trained() is not None]
    if not trained:
        raise UserError(f"no run of {request.suite} is trained; start with: {planning.command('launch', plan, store)}")
    return reevaluating.chosen(trained, changed, configs)


def _scored(one: "Evaluation", store: "Store", data_root: Path) -> bool:
    from experiments.runs import reevaluating

    ending = reevaluating.evaluate(one, store, data_root)
    print_outcome(one.run.run_id, ending)
    return ending.outcome == "done"


@cli.command()
@click.argument("runs", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Only say what would go, and why. The default without --yes.")
@click.option("--yes", is_flag=True, help="Remove it.")
@root_option
@json_option
def prune(runs: tuple[str, ...], dry_run: bool, yes: bool, root: Path, as_json: bool) -> None:
    """List what runs have left behind and nobody needs, and with --yes remove it; whole RUNS only if you name them."""
    from experiments.runs import pruning
    from experiments.store.run_dir import Store

    if dry_run and yes:
        raise UserError("--dry-run removes nothing and --yes removes it: give one of them")
    store = Store(root)
    leavings, kept = pruning.find(store, [store.find(name) for name in runs])
    if as_json:
        print_json([asdict(one) | {"path": str(one.path)} for one in leavings])
    else:
        for one in leavings:
            click.echo(f"{one.bytes / 1e6:9.1f} MB  {one.path.relative_to(store.root)}  ({one.reason})")
        for line in kept:
            click.echo(line)
    total = f"{sum(one.bytes for one in leavings) / 1e6:.1f} MB in {sum(one.files for one in leavings)} files"
    if yes:
        click.echo(f"removed {pruning.remove(leavings, store)} of {len(leavings)} things: {total}", err=as_json)
    else:
        click.echo(f"{total} could go; nothing was removed: --yes does that", err=as_json)


@cli.command()
@click.argument("suite")
@scale_options
@click.option("--light", is_flag=True, help="Without weights, per-image tables and stored masks; --yes, or --out.")
@click.option("--no-images", is_flag=True, help="Without the images under the stored masks; --yes, or --out.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Into this store; here all stays as it is.")
@click.option("--seeds", default=None, help="Only these, such as 0,1,2 or 0-4.")
@click.option("--unpack", is_flag=True, help="The other way round: archived runs become directories again.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@yes_option
@root_option
@json_option
def archive(
    suite: str,
    scale: str,
    dataset: str | None,
    light: bool,
    no_images: bool,
    out: Path | None,
    seeds: str | None,
    unpack: bool,
    dry_run: bool,
    yes: bool,
    root: Path,
    as_json: bool,
) -> None:
    """Pack each finished run of SUITE into one file; report, status and import-runs read it as before."""
    from experiments.runs import archiving
    from experiments.status import suite_view
    from experiments.store.archive import Keeping
    from experiments.store.run_dir import Store
    from experiments.suites.planning import parse_seeds

    keeping = Keeping.LIGHT if light else Keeping.NO_IMAGES if no_images else Keeping.WHOLE
    if unpack and (light or no_images or out or seeds):
        raise UserError("--unpack puts back what there is: leave --light, --no-images, --out and --seeds out")
    if keeping is not Keeping.WHOLE and not (out or dry_run or yes):
        raise UserError(f"--{keeping} removes what it leaves out: say --yes, or archive into another store with --out")
    store, records = Store(root), suite_view.chosen(root, suite, scale, dataset)
    wanted = None if seeds is None else parse_seeds(seeds)
    if unpack:
        found = archiving.unpack(store, records, dry_run)
    elif out is None:
        found = archiving.archive(store, records, dry_run, keeping, wanted)
    else:
        found = archiving.archive_into(Store(out), store, records, dry_run, keeping, wanted)
    _print_handled(found, as_json)
    if not as_json:
        click.echo(f"{sum(one.what not in ('kept', 'refused') for one in found)} of {len(found)} runs")


def _print_handled(found: Sequence["Handled"], as_json: bool) -> None:
    if as_json:
        return print_json([asdict(one) for one in found])
    for one in found:
        click.echo(f"{one.what:<17} {one.run_id}{f': {one.reason}' if one.reason else ''}")
    return None


@cli.command("import-runs")
@click.argument("other", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only say what would be imported.")
@root_option
@json_option
def import_runs(other: Path, dry_run: bool, root: Path, as_json: bool) -> int:
    """Copy the sound runs of the store OTHER that are not here; ids, weights and results are checked first."""
    from experiments.runs import importing
    from experiments.store.run_dir import Store

    found = importing.import_runs(Store(root), Store(other), dry_run)
    _print_handled(found, as_json)
    if not as_json:
        count = sum(one.what in ("imported", "would import") for one in found)
        click.echo(f"{count} of {len(found)} runs {'would be' if dry_run else 'were'} imported")
    return 1 if any(one.what == "refused" for one in found) else 0
