"""Launching on Slurm: the missing runs of a plan as job arrays, submitted and left alone.

Nothing stays alive here. What was submitted is in the launch's journal (:mod:`experiments.store.journal`), how the runs
do in their own files.
"""

import contextlib
import json
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.execution.attempt import Options, Runner, Stage
from experiments.execution.worker import Task
from experiments.launch import smoke
from experiments.launch.begin import Beginning, begin, new_id, to_start
from experiments.launch.profiles import PARTS, SlurmProfile
from experiments.slurm import arrays, code_snapshot
from experiments.slurm import limits as site
from experiments.slurm.arrays import Array
from experiments.slurm.batches import Batch, Target, divide, without
from experiments.slurm.job import SlurmJob
from experiments.slurm.limits import Limits
from experiments.slurm.report_job import ReportJob
from experiments.status import scheduler, slurm_client
from experiments.status.slurm_client import SlurmError
from experiments.store import journal
from experiments.store.files import append_line
from experiments.store.journal import BatchRun, Journal, Submission
from experiments.store.launches import DEATHS, FORGET, SLURM, LaunchDir, LaunchRecord, recorded
from experiments.store.run_dir import Store
from experiments.suites import catalogue
from experiments.suites.planning import Plan, PlannedRun
from mpformer.runtime.errors import UserError


@dataclass(frozen=True)
class Submitted:
    """What a launch handed to Slurm."""

    id: str
    directory: Path
    started: tuple[PlannedRun, ...] = ()
    submissions: tuple[Submission, ...] = ()
    left_alone: dict[str, str] = field(default_factory=dict)
    """Failed runs that would fail again, with their failure class."""
    left_over: int = 0
    """Runs that the site's limits do not admit now."""
    limit: str = ""
    """The limit that leaves them over."""
    problem: str = ""
    """Why not everything was submitted, if so."""


def launch(
    plan: Plan,
    store: Store,
    target: Target,
    *,
    command: str = "",
    retry: tuple[str, ...] = (),
    runner: Runner | None = None,
) -> Submitted:
    """Submit what is missing of a plan and return.

    Raises UserError if there is no Slurm here or it does not answer, if data or weights are missing, or if nothing more
    may be submitted now; OSError if the store cannot be written.
    """
    site.require()
    _check_path(store)
    with begin(plan, store, command, retry) as beginning:
        done = Submitted(beginning.id, beginning.directory, left_alone=beginning.left_alone)
        _report_on_the_lost(plan, store, target)
        if not beginning.missing:
            return done
        limits = site.limits(target.profile)
        batches, left = divide(beginning.missing, store, target, limits)
        if not batches:
            raise UserError(f"nothing more may be submitted now: {limits.reason} leaves room for {limits.submit} jobs")
        code = code_snapshot.take(store)
        work = _Work(plan, store.root.resolve(), done.id, target, code, retry, runner, bool(left))
        started = without(beginning.missing, left)
        # a report that is to launch something more stands for its own launch
        last = None if left or target.profile.resubmit else _waiting_report(plan, store)
        _write_launch(work, limits, started, command, own_report=last is None)
        problem = _submit(work, batches, limits.cluster, beginning, last)
    submissions = tuple(journal.of_launch(store, done.id).submissions())
    done = replace(done, started=started, submissions=submissions, problem=problem)
    return replace(done, left_over=len(left), limit=limits.reason)


def scripts(plan: Plan, store: Store, target: Target) -> Iterator[str]:
    """Yield the batch scripts that a launch would hand to ``sbatch`` now, in order; nothing is written or submitted.

    Ids that only a submission can tell stand there as ``<id of batch 0>``. Where Slurm is not here or does not answer,
    its defaults are the limits, and a comment says so.
    """
    _check_path(store)
    missing, _ = to_start(plan, store)
    limits, note = _limits_or_defaults(target.profile)
    batches, _ = divide(missing, store, target, limits)
    yield from (f"# {line}\n" for line in (*(f"missing: {line}" for line in plan.missing), note) if line)
    work = _Work(plan, store.root.resolve(), new_id(), target, code_snapshot.folder(store))
    for batch in batches:
        ids = {number: f"<id of batch {number}>" for number in range(batch.number)}
        yield arrays.script(work.array(batch, ids))


def _limits_or_defaults(profile: SlurmProfile) -> tuple[Limits, str]:
    """The site's limits, or Slurm's defaults and why."""
    try:
        site.require()
        return site.limits(profile), ""
    except UserError as error:
        assumed = Limits(array=profile.max_array or site.DEFAULT_ARRAY - 1, submit=profile.max_submit)
        return assumed, f"arrays of up to {assumed.array} jobs, Slurm's default: {error}"


def _check_path(store: Store) -> None:
    problem = arrays.folder_problem(store.root.resolve())
    if problem:
        raise UserError(problem)


# --- submitting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What the batches of a launch are made from."""

    plan: Plan
    root: Path
    launch: str
    target: Target
    code: Path
    retry: tuple[str, ...] = ()
    runner: Runner | None = None
    left_over: bool = False

    @property
    def directory(self) -> Path:
        return self.root / "launches" / self.launch

    def name(self, batch: Batch) -> str:
        """A job name that no other batch has; the suite first, since squeue shows the beginning."""
        suite = re.sub(r"[^A-Za-z0-9_.-]", "_", self.plan.suite.name)
        return f"{suite}.{self.launch}.{batch.number}"

    def profile(self, batch: Batch) -> SlurmProfile:
        part = next((part for part in PARTS if part == batch.stage), None)
        profile = self.target.profile if part is None else self.target.profile.part(part)
        return profile.model_copy(update={"parallelism": batch.parallelism})

    def array(self, batch: Batch, ids: dict[int, str]) -> Array:
        """The array of a batch; ``ids`` are those of the batches before it. Batches that failed are not waited for."""
        after = [(kind, [ids[number] for number in numbers if number in ids]) for kind, numbers in batch.after]
        dependency = ",".join(f"{kind}:{':'.join(found)}" for kind, found in after if found)
        folder = self.directory / "jobs" / str(batch.number)
        name, profile = self.name(batch), self.profile(batch)
        return Array(profile, name, batch.count, folder, self.code, dependency)

    def functions(self, batch: Batch) -> list[Callable[[], Any]]:
        """What the elements call."""
        if batch.stage == "report":
            plan, again = self.plan, self.target.profile.resubmit
            arguments = (*_arguments(plan, self.target), *_suites_file(plan, Store(self.root)))
            where = (plan.suite.name, plan.scale, plan.dataset)
            return [ReportJob(self.root, *where, self.code, arguments, self.left_over, again)]
        profile = self.profile(batch)
        root = self.directory / smoke.FOLDER if batch.stage == "smoke" else self.root
        data = self.plan.data_root.resolve()
        options = Options(data, self.launch, profile.cpus, stage_to=profile.stage_to)
        stage: Stage = "all" if batch.stage == "smoke" else batch.stage
        tasks = [Task(run.run_id, run.eval_id, run.config) for run in batch.runs]
        work = (root, self.launch, options, stage, self.retry, self.runner)
        return [SlurmJob(*work, task=task, code=self.code) for task in tasks]


def _arguments(plan: Plan, target: Target) -> tuple[str, ...]:
    """The command line, after suite, scale and dataset, of a further launch of this plan."""
    request, profile = plan.request, target.profile
    on = str(Path(target.name).resolve()) if target.name.endswith((".yaml", ".yml")) else target.name
    words = ["--data-root", str(plan.data_root.resolve()), "--on", on, "--parallelism", str(profile.parallelism)]
    for name, value in (("--max-array", profile.max_array), ("--max-submit", profile.max_submit)):
        words += [name, str(value)] if value is not None else []
    words += [word for row in request.rows for word in ("--row", row)]
    words += ["--seeds", ",".join(map(str, request.seeds))] if request.seeds else []
    words += [word for key, value in request.overrides for word in ("--set", f"{key}={json.dumps(value)}")]
    return tuple(words)


def _suites_file(plan: Plan, store: Store) -> tuple[str, ...]:
    """The option that defines a suite of a file of one's own as it is now; packages are there in a job too."""
    source = catalogue.source(plan.suite)
    if source is None or source.package:
        return ()
    return "--suites", str(store.root.resolve() / store.keep_suites_file(source.name, source.text))


def _write_launch(work: _Work, limits: Limits, started: Sequence[PlannedRun], command: str, own_report: bool) -> None:
    plan, target = work.plan, work.target
    about = LaunchRecord(
        plan.suite.name, plan.scale, plan.dataset, command, tuple(run.run_id for run in started), time.time(),
        target.profile.notify, executor=SLURM, profile=target.name, cluster=limits.cluster, code=str(work.code),
        report=own_report and target.profile.report is not False,
    )  # fmt: skip
    LaunchDir(work.directory).write(about)


def _submit(
    work: _Work,
    batches: Sequence[Batch],
    cluster: str,
    beginning: Beginning,
    last: "_Waiting | None" = None,
) -> str:
    """Submit the batches one after the other; returns why not all of them were, empty if they were.

    After a refusal only the report follows, on what is in the queue; where one waits already, it waits for these too.
    """
    book = Journal(work.directory / journal.FILE)
    ids: dict[int, str] = {}
    problem = ""
    for batch in batches:
        if problem and (batch.stage != "report" or not ids):
            continue
        if batch.stage == "report" and last is not None and _waits_for(last, ids.values()):
            continue
        try:
            beginning.confirm()
            ids[batch.number] = _submit_one(work, batch, ids, cluster, book)
        except SlurmError as error:
            problem = problem or f"sbatch: {error.said}"
        except OSError as error:
            problem = problem or f"sbatch: {error}"
        except UserError as error:  # another launch goes on in this one's place: what is missing is its
            return problem or str(error)
    return problem


def _submit_one(work: _Work, batch: Batch, ids: dict[int, str], cluster: str, book: Journal) -> str:
    array = work.array(batch, ids)
    runs = tuple(BatchRun(run.run_id, run.eval_id) for run in batch.runs)
    if batch.stage == "smoke":
        smoke.create(work.directory, batch.runs)
    functions = work.functions(batch)
    where = (work.target.name, cluster, array.profile.clusters or "", work.launch)
    about = Submission(batch.number, batch.stage, array.name, runs, time.time(), *where)
    book.submitting(about)
    job_id = _insist(about, book, lambda: arrays.submit(array, functions))
    book.submitted(batch.number, job_id)
    return job_id


_Waiting = tuple[Submission, tuple[str, ...]]
"""A report job of the suite that has not begun (one is enough), and the ids of the suite's arrays that Slurm has."""


def _waits_for(last: _Waiting, ids: Iterable[str]) -> bool:
    """Have the report wait for these arrays too; False if Slurm does not let it: it may have begun."""
    report, after = last
    words = (f"JobId={report.job_id}", f"Dependency=afterany:{':'.join(dict.fromkeys((*after, *ids)))}")
    try:
        slurm_client.call("scontrol", "update", *words, clusters=report.clusters)
    except SlurmError:
        return False
    return True


def _launches(plan: Plan, every: Iterable[tuple[LaunchDir, LaunchRecord]]) -> list[tuple[LaunchDir, LaunchRecord]]:
    """Those of the launches that are the suite's, at its scale and on its dataset."""
    whose = (plan.suite.name, plan.scale, plan.dataset)
    return [each for each in every if (each[1].suite, each[1].scale, each[1].dataset) == whose]


def _waiting_report(plan: Plan, store: Store) -> _Waiting | None:
    ours = [launched.id for launched, _ in _launches(plan, recorded(store))]
    batches = [one for one in journal.submissions(store, ours) if one.job_id is not None]
    jobs = [job for job in scheduler.ask(batches).jobs if not job.over] if batches else []
    waiting, live = {job.name for job in jobs if job.waiting}, {job.name for job in jobs}
    reports = [one for one in batches if one.stage == "report" and one.name in waiting]
    if not reports:
        return None
    after = tuple(one.job_id for one in batches if one.stage != "report" and one.name in live and one.job_id)
    return reports[-1], after


def _report_on_the_lost(plan: Plan, store: Store, target: Target) -> None:
    """Submit the report of earlier launches of the suite whose launcher died before it could, while their jobs live.

    One that is refused is left out: it stops no launch, and the next one tries again.
    """
    for launched, about in _launches(plan, recorded(store)):
        if not about.report:
            continue
        book = journal.of_launch(store, launched.id)
        batches = book.submissions()
        if any(one.stage == "report" and one.error is None for one in batches):
            continue
        queued = [one for one in batches if one.job_id is not None]
        answer = scheduler.ask(queued)
        live = {job.name for job in answer.jobs if not job.over}
        ids = {one.batch: one.job_id for one in queued if one.name in live and one.job_id is not None}
        if ids:
            work = _Work(plan, store.root.resolve(), book.launch, target, Path(about.code))
            report = Batch(1 + max(one.batch for one in batches), "report", (), (("afterany", tuple(ids)),))
            with contextlib.suppress(SlurmError):
                _submit_one(work, report, ids, answer.cluster, book)


def forget_nodes(plan: Plan, store: Store, exclude: str | None) -> int:
    """Let the waiting jobs of the suite's launches begin on nodes again that they avoid; returns how many jobs.

    ``exclude`` are the nodes that they avoid all the same, the profile's. Raises SlurmError.
    """
    names = set()
    for launched, _ in _launches(plan, recorded(store, DEATHS)):
        names |= {one.name for one in journal.of_launch(store, launched.id).submissions()}
        append_line(launched.deaths_file, FORGET)
    jobs, _ = scheduler.live_elements(store, {run.run_id for run in plan.unique})
    waiting = [job for job in jobs if job.waiting and job.name in names]
    for job in waiting:
        words = (f"JobId={job.id}", f"ExcNodeList={exclude or ''}")
        slurm_client.call("scontrol", "update", *words, clusters=job.clusters)
    return len(waiting)


PAUSES = (1.0, 3.0, 6.0, 12.0, 24.0)
"""Seconds before each further attempt at an ``sbatch`` that failed for the moment."""


def _insist(about: Submission, book: Journal, submit: Callable[[], str]) -> str:
    """Submit a batch, again and again if that fails for the moment only; returns its id, or raises SlurmError.

    ``sbatch`` may give up although the controller took the batch: before another attempt Slurm is asked for its name.
    If it cannot be asked either, the journal leaves open what became of the batch, and the next launch asks.
    """
    pauses = iter(PAUSES)
    known = True
    while True:
        if known:  # what became of the last attempt: otherwise another one might submit the batch twice
            try:
                return submit()
            except SlurmError as error:
                refusal = error
        pause = next(pauses, None) if refusal.passing else None
        time.sleep((pause or 0.0) * random.uniform(0.8, 1.2))
        answer = scheduler.ask([about])
        if answer.jobs:
            return answer.jobs[0].id.partition("_")[0]
        known = answer.controller
        if pause is None:
            if known:
                book.failed(about.batch, refusal.said)
            raise refusal
