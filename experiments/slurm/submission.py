"""Launching on Slurm: the missing runs of a plan as job arrays, submitted and left alone.

Nothing stays alive here. What was submitted is in the launch's journal (:mod:`experiments.store.journal`), which runs
are this launch's to submit in their reservations (:mod:`experiments.slurm.reservations`), how they do in their own
files.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.execution.attempt import Options, Runner, Stage
from experiments.execution.staging import Staged
from experiments.execution.worker import Task
from experiments.launch import local, smoke
from experiments.launch.profiles import PARTS, SlurmProfile
from experiments.slurm import arrays, code_snapshot, reservations
from experiments.slurm import limits as site
from experiments.slurm.arrays import Array
from experiments.slurm.job import SlurmJob
from experiments.slurm.limits import Limits
from experiments.slurm.report_job import ReportJob
from experiments.status import scheduler
from experiments.store import journal
from experiments.store.files import write_json
from experiments.store.journal import BatchRun, BatchStage, Journal, Submission
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan, PlannedRun
from mpformer.runtime.errors import UserError

DOUBT_SECONDS = 20.0
"""Time in which an ``sbatch`` whose launcher was killed may still reach the controller."""


@dataclass(frozen=True)
class Target:
    """Where to submit to, and how."""

    name: str
    """The profile's name, or the path of its file."""
    profile: SlurmProfile
    smoke: bool = False


@dataclass(frozen=True)
class Batch:
    """One job array of a launch."""

    number: int
    stage: BatchStage
    runs: tuple[PlannedRun, ...] = ()
    after: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """What it waits for: kinds of dependency, each with numbers of earlier batches."""
    parallelism: int = 1

    @property
    def count(self) -> int:
        """Elements of the array."""
        return len(self.runs) if self.stage != "report" else 1


@dataclass(frozen=True)
class Submitted:
    """What a launch handed to Slurm."""

    id: str
    directory: Path
    started: tuple[PlannedRun, ...]
    submissions: tuple[Submission, ...]
    left_alone: dict[str, str]
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
    data_root: Path,
    target: Target,
    *,
    command: str = "",
    retry: tuple[str, ...] = (),
    runner: Runner | None = None,
) -> Submitted:
    """Submit what is missing of a plan and return.

    Raises UserError if there is no Slurm here or it does not answer, if data or weights are missing, if the store
    cannot be written, or if nothing more may be submitted now.
    """
    _check(plan, store)
    recover(store)
    local.record(plan, store, command)
    missing, left_alone = local.to_start(plan, store, retry)
    local.uncancel(missing, store)  # of runs whose jobs still wait too: they may go on after all
    name = local.new_id()
    directory = store.launches / name
    if not missing:
        return Submitted(name, directory, (), (), left_alone)
    limits = site.limits(target.profile.max_array, target.profile.max_submit)
    with reservations.Launching(store, name) as sign:
        mine = _reserved(plan, store, missing, name, retry)
        if not mine:  # another launch was faster
            return Submitted(name, directory, (), (), left_alone)
        batches, left = divide(mine, store, target, limits)
        if not batches:
            raise UserError(f"nothing more may be submitted now: {limits.reason} leaves room for {limits.submit} jobs")
        rest = _arguments(plan, data_root.resolve(), target) if left else ()
        work = _Work(
            plan, store.root.resolve(), name, data_root.resolve(), code_snapshot.take(store), retry, runner, rest
        )
        started = _without(mine, left)
        _write_launch(work, target, limits, started, command)
        problem = _submit(work, target, batches, limits.cluster, sign)
    submissions = tuple(journal.of_launch(store, name).submissions())
    return Submitted(name, directory, started, submissions, left_alone, len(left), limits.reason, problem)


def scripts(plan: Plan, store: Store, data_root: Path, target: Target, retry: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the batch scripts that a launch would hand to ``sbatch`` now, in order; nothing is written or submitted.

    Ids that only a submission can tell stand there as ``<id of batch 0>``. Where Slurm is not here or does not answer,
    its defaults are the limits, and a comment says so.
    """
    _check_path(store)
    missing, _ = local.to_start(plan, store, retry)
    limits, note = _limits_or_defaults(target.profile)
    batches, _ = divide(missing, store, target, limits)
    yield from (f"# {line}\n" for line in (*(f"missing: {line}" for line in plan.missing), note) if line)
    work = _Work(plan, store.root.resolve(), local.new_id(), data_root.resolve(), code_snapshot.place(store))
    for batch in batches:
        ids = {number: f"<id of batch {number}>" for number in range(batch.number)}
        yield arrays.script(work.array(batch, target, ids))


def _limits_or_defaults(profile: SlurmProfile) -> tuple[Limits, str]:
    """The site's limits, or Slurm's defaults and why."""
    try:
        site.require()
        return site.limits(profile.max_array, profile.max_submit), ""
    except UserError as error:
        assumed = Limits(array=profile.max_array or site.DEFAULT_ARRAY - 1, submit=profile.max_submit)
        return assumed, f"arrays of up to {assumed.array} jobs, Slurm's default: {error}"


def _check(plan: Plan, store: Store) -> None:
    site.require()
    if plan.missing:
        raise UserError("; ".join(plan.missing))
    _check_path(store)


def _check_path(store: Store) -> None:
    problem = arrays.folder_problem(store.root.resolve())
    if problem:
        raise UserError(problem)


# --- which runs -----------------------------------------------------------------------------------------------------


def _reserved(
    plan: Plan, store: Store, missing: Sequence[PlannedRun], name: str, retry: tuple[str, ...]
) -> list[PlannedRun]:
    """The missing runs that are this launch's to submit.

    They are looked at again once reserved: another launch may have had them done since they were found missing.
    """
    held = _Held(plan, store)
    mine = [run for run in missing if reservations.reserve(store.run(run.run_id), name, held.of(run.run_id))]
    return local.to_start(replace(plan, runs=tuple(mine)), store, retry)[0] if mine else []


class _Held:
    """Whether earlier launches still hold runs, by what Slurm says once they have submitted all they will."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self._runs = {run.run_id for run in plan.unique}
        self._store = store
        self._live: dict[str, frozenset[str]] = {}

    def of(self, run_id: str) -> Callable[[str], bool]:
        return lambda launch: self._holds(launch, run_id)

    def _holds(self, launch: str, run_id: str) -> bool:
        if reservations.launching(self._store, launch):
            return True
        if launch not in self._live:  # asked after that launch's last word: an earlier answer would not know its jobs
            recover(self._store, [launch])
            found, _ = scheduler.placements(self._store, self._runs)
            self._live[launch] = frozenset(name for name, place in found.items() if place.live)
        return run_id in self._live[launch]


def recover(store: Store, launches: Sequence[str] | None = None) -> None:
    """Complete the journals of launchers that died between ``sbatch`` and its record.

    Batches that Slurm knows by their name get their id; those that it does not know never reached it. Waits until no
    orphaned ``sbatch`` can be under way; leaves a batch open that Slurm cannot be asked about.
    """
    while True:
        found = [one for one in journal.submissions(store, launches) if one.unrecorded]
        lost = [one for one in found if not reservations.launching(store, one.launch)]
        if not lost or not _recovered(store, lost):
            return
        time.sleep(1)


def _recovered(store: Store, lost: Sequence[Submission]) -> bool:
    """Write down what is known of lost batches; whether it is worth asking again."""
    answer = scheduler.ask(lost)
    ids = {job.name: job.id.partition("_")[0] for job in answer.jobs}
    again = False
    for one in lost:
        book = journal.of_launch(store, one.launch)
        if one.name in ids:
            book.submitted(one.batch, ids[one.name])
        elif answer.controller and one.cluster in ("", answer.cluster):
            again = again or time.time() - one.created < DOUBT_SECONDS
            if time.time() - one.created >= DOUBT_SECONDS:
                book.failed(one.batch, "the launcher ended before the batch reached Slurm")
    return again


# --- which arrays ---------------------------------------------------------------------------------------------------


def divide(
    missing: Sequence[PlannedRun], store: Store, target: Target, limits: Limits
) -> tuple[tuple[Batch, ...], tuple[PlannedRun, ...]]:
    """Return the arrays of a launch in the order of their submission, and the runs that the limits leave over."""
    profile = target.profile
    trained = [run for run in missing if profile.evaluate is not None and store.run(run.run_id).trained() is not None]
    fresh = list(_without(missing, trained))
    short = smoke.runs(missing) if target.smoke else ()
    extra = len(short) + (profile.report is not False)
    fresh, trained, left = _fitting(fresh, trained, 1 if profile.evaluate is None else 2, extra, limits.submit)
    if not fresh and not trained:
        return (), left
    made = _Numbered()
    first = tuple(made.add("smoke", chunk, ()) for chunk in _chunks(short, limits.array))
    before: tuple[tuple[str, tuple[int, ...]], ...] = (("afterok", first),) if first else ()
    _add_runs(made, fresh, trained, profile, limits, before)
    if profile.report is not False:
        made.add("report", (), (("afterany", tuple(range(len(made.batches)))),))
    return tuple(made.batches), left


def _without(runs: Sequence[PlannedRun], others: Sequence[PlannedRun]) -> tuple[PlannedRun, ...]:
    names = {run.run_id for run in others}
    return tuple(run for run in runs if run.run_id not in names)


class _Numbered:
    """Batches in the making."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def add(
        self,
        stage: BatchStage,
        runs: Sequence[PlannedRun],
        after: tuple[tuple[str, tuple[int, ...]], ...],
        parallelism: int | None = None,
    ) -> int:
        number = len(self.batches)
        self.batches.append(Batch(number, stage, tuple(runs), after, parallelism or max(1, len(runs))))
        return number


def _add_runs(
    made: _Numbered,
    fresh: Sequence[PlannedRun],
    trained: Sequence[PlannedRun],
    profile: SlurmProfile,
    limits: Limits,
    before: tuple[tuple[str, tuple[int, ...]], ...],
) -> None:
    """Arrays that do everything; or arrays that train, each with one that evaluates, and one for what is trained."""
    chunks, done = _chunks(fresh, limits.array), _chunks(trained, limits.array)
    split = profile.evaluate is not None
    shares = _shares(profile.parallelism, len(chunks))
    evaluating = _shares(profile.part("evaluate").parallelism, len(chunks) + len(done)) if split else []
    numbers: list[int] = []
    for index, chunk in enumerate(chunks):
        # more arrays than may run at a time: each of the further ones begins when an earlier one has ended
        queue = (("afterany", (numbers[index - profile.parallelism],)),) if index >= profile.parallelism else ()
        numbers.append(made.add("train" if split else "all", chunk, (*before, *queue), shares[index]))
        if split:
            made.add("evaluate", chunk, (("aftercorr", (numbers[-1],)),), evaluating[index])
    for index, chunk in enumerate(done):
        made.add("evaluate", chunk, before, evaluating[len(chunks) + index])


def _fitting(
    fresh: list[PlannedRun], trained: list[PlannedRun], each: int, extra: int, room: int | None
) -> tuple[list[PlannedRun], list[PlannedRun], tuple[PlannedRun, ...]]:
    """What may be submitted now: trained runs first, since they need least; ``each``: jobs of a fresh run."""
    if room is None:
        return fresh, trained, ()
    room = max(0, room - extra)
    evaluated = trained[:room]
    begun = fresh[: (room - len(evaluated)) // each]
    return begun, evaluated, (*trained[len(evaluated) :], *fresh[len(begun) :])


def _chunks(runs: Sequence[PlannedRun], most: int) -> list[Sequence[PlannedRun]]:
    """As few arrays as hold the runs, of nearly equal size."""
    count = -(-len(runs) // most)
    size = -(-len(runs) // count) if count else 1
    return [runs[start : start + size] for start in range(0, len(runs), size)]


def _shares(parallelism: int, arrays_: int) -> list[int]:
    """The cap on jobs at a time, which Slurm knows for each array alone, shared out among arrays; at least one each."""
    if not arrays_:
        return []
    least, more = divmod(parallelism, arrays_)
    return [max(1, least + (index < more)) for index in range(arrays_)]


# --- submitting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What the batches of a launch are made from."""

    plan: Plan
    root: Path
    launch: str
    data_root: Path
    code: Path
    retry: tuple[str, ...] = ()
    runner: Runner | None = None
    left_over: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        return self.root / "launches" / self.launch

    def name(self, batch: Batch) -> str:
        """A job name that no other batch has; the suite first, since squeue shows the beginning."""
        suite = re.sub(r"[^A-Za-z0-9_.-]", "_", self.plan.suite.name)
        return f"{suite}.{self.launch}.{batch.number}"

    def profile(self, batch: Batch, target: Target) -> SlurmProfile:
        part = next((part for part in PARTS if part == batch.stage), None)
        profile = target.profile if part is None else target.profile.part(part)
        return profile.model_copy(update={"parallelism": batch.parallelism})

    def array(self, batch: Batch, target: Target, ids: dict[int, str]) -> Array:
        """The array of a batch; ``ids`` are those of the batches before it. Batches that failed are not waited for."""
        after = [(kind, [ids[number] for number in numbers if number in ids]) for kind, numbers in batch.after]
        dependency = ",".join(f"{kind}:{':'.join(found)}" for kind, found in after if found)
        folder = self.directory / "jobs" / str(batch.number)
        name, profile = self.name(batch), self.profile(batch, target)
        return Array(profile, name, batch.count, folder, self.code, dependency, batch.stage != "report")

    def functions(self, batch: Batch, target: Target) -> list[Callable[[], Any]]:
        """What the elements call."""
        if batch.stage == "report":
            plan = self.plan
            return [ReportJob(self.root, plan.suite.name, plan.scale, plan.dataset, self.code, self.left_over)]
        profile = self.profile(batch, target)
        root = self.directory / smoke.FOLDER if batch.stage == "smoke" else self.root
        options = Options(self.data_root, self.launch, profile.cpus, self.directory / "stop.json")
        runner = Staged(profile.stage_to, self.runner) if profile.stage_to is not None else self.runner
        stage: Stage = "all" if batch.stage == "smoke" else batch.stage
        tasks = [Task(run.run_id, run.eval_id, run.config) for run in batch.runs]
        return [SlurmJob(root, self.launch, task, options, stage, self.retry, runner, self.code) for task in tasks]


def _arguments(plan: Plan, data_root: Path, target: Target) -> tuple[str, ...]:
    """The command line, after suite and place, of a launch of this plan's runs that were never begun.

    Runs that failed are not in it: each would otherwise be submitted again after every round.
    """
    request, profile = plan.request, target.profile
    on = str(Path(target.name).resolve()) if target.name.endswith((".yaml", ".yml")) else target.name
    words = ["--new", "--data-root", str(data_root), "--on", on, "--parallelism", str(profile.parallelism)]
    for name, value in (("--max-array", profile.max_array), ("--max-submit", profile.max_submit)):
        words += [name, str(value)] if value is not None else []
    words += [word for row in request.rows for word in ("--row", row)]
    words += ["--seeds", ",".join(map(str, request.seeds))] if request.seeds else []
    words += [word for key, value in request.overrides for word in ("--set", f"{key}={json.dumps(value)}")]
    return tuple(words)


def _write_launch(work: _Work, target: Target, limits: Limits, started: Sequence[PlannedRun], command: str) -> None:
    plan = work.plan
    about: dict[str, Any] = {"schema": 1, "suite": plan.suite.name, "scale": plan.scale, "dataset": plan.dataset}
    about |= {"command": command, "runs": [run.run_id for run in started], "created": time.time()}
    about |= {"executor": "slurm", "profile": target.name, "cluster": limits.cluster, "code": str(work.code)}
    about |= {"notify": target.profile.notify}
    about |= {"notify": target.profile.notify}
    write_json(work.directory / "launch.json", about)


def _submit(work: _Work, target: Target, batches: Sequence[Batch], cluster: str, sign: reservations.Launching) -> str:
    """Submit the batches one after the other; returns why not all of them were, empty if they were.

    After a refusal only the report follows, on what is in the queue.
    """
    book = Journal(work.directory / journal.FILE)
    ids: dict[int, str] = {}
    problem = ""
    for batch in batches:
        if problem and (batch.stage != "report" or not ids):
            continue
        sign.beat()
        try:
            ids[batch.number] = _submit_one(work, target, batch, ids, cluster, book)
        except (arrays.SubmissionError, OSError) as error:
            problem = problem or f"sbatch: {error}"
    return problem


def _submit_one(work: _Work, target: Target, batch: Batch, ids: dict[int, str], cluster: str, book: Journal) -> str:
    array = work.array(batch, target, ids)
    runs = tuple(BatchRun(run.run_id, run.eval_id) for run in batch.runs)
    if batch.stage == "smoke":
        smoke.create(work.directory, batch.runs)
    functions = work.functions(batch, target)
    about = Submission(work.launch, batch.number, batch.stage, array.name, runs, target.name, cluster, time.time())
    book.submitting(about)
    try:
        job_id = arrays.submit(array, functions)
    except arrays.SubmissionError as error:
        job_id = _accepted_all_the_same(about, book, str(error))
        if not job_id:
            raise
    book.submitted(batch.number, job_id)
    return job_id


def _accepted_all_the_same(about: Submission, book: Journal, error: str) -> str:
    """The id of a batch that the controller took although ``sbatch`` gave up waiting for its answer; else empty.

    If Slurm cannot be asked either, the journal leaves open what became of the batch, and the next launch asks.
    """
    answer = scheduler.ask([about])
    if answer.jobs:
        return answer.jobs[0].id.partition("_")[0]
    if answer.controller:
        book.failed(about.batch, error)
    return ""
