"""What Slurm says of the jobs of a store: squeue, then sacct where there is accounting.

Slurm comes second everywhere: files say what a run has done, Slurm what is to be expected of it. A job is believed to
be ours by its *name*, which no other batch has (:mod:`experiments.store.journal`), never by its number alone: numbers
start again when a cluster loses its state. Nothing here raises because Slurm does not answer; what is then not known is
said.
"""

import contextlib
import getpass
import os
import re
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from experiments.status import slurm_client
from experiments.status.slurm_client import SlurmError
from experiments.store import claims, journal, scheduler_record
from experiments.store.attempt_dir import Ending, FailureClass, Outcome
from experiments.store.journal import Element, Submission
from experiments.store.run_dir import Store
from experiments.store.scheduler_record import JobRecord, KeptJob, SchedulerRecord

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")

ENDED: Mapping[str, Ending] = {
    "COMPLETED": Ending(Outcome.LOST, FailureClass.NONE, "Slurm says COMPLETED, but there is no result"),
    "FAILED": Ending(Outcome.FAILED, FailureClass.KILLED, "the job failed"),
    "TIMEOUT": Ending(Outcome.TIMEOUT, FailureClass.TIMEOUT, "the time limit of its job"),
    "DEADLINE": Ending(Outcome.TIMEOUT, FailureClass.TIMEOUT, "the deadline of its job"),
    "OUT_OF_MEMORY": Ending(Outcome.FAILED, FailureClass.OOM, "more memory than its job has"),
    "NODE_FAIL": Ending(Outcome.FAILED, FailureClass.NODE, "its node failed"),
    "BOOT_FAIL": Ending(Outcome.FAILED, FailureClass.NODE, "its node did not boot"),
    "CANCELLED": Ending(Outcome.CANCELLED, FailureClass.NONE, "cancelled in Slurm"),
    "PREEMPTED": Ending(Outcome.LOST, FailureClass.PREEMPTED, "preempted, and not queued again"),
    "REVOKED": Ending(Outcome.CANCELLED, FailureClass.NONE, "revoked by Slurm"),
}
"""Slurm's words for a job that is over, by what they mean for its run where files do not know more; no other word is
guessed at."""

ASK_PERIOD = 15.0
"""Seconds between two questions to Slurm while somebody watches, however many they are."""

CLUSTER_PERIOD = 3600.0
"""Seconds for which the cluster's name is remembered."""

NEVER = "DependencyNeverSatisfied"

_HOPELESS: Mapping[str, str] = {
    "PartitionTimeLimit": "time or partition", "PartitionNodeLimit": "nodes or partition",
    "PartitionConfig": "partition", "BadConstraints": "constraint, gpus, memory, cpus or nodes",
    "InvalidAccount": "account", "AccountNotAllowed": "account or partition", "InvalidQOS": "qos",
    "QOSNotAllowed": "qos or partition", "MaxMemPerLimit": "memory",
}  # fmt: skip
"""Slurm's reasons for a job to wait for ever, with the keys of the profile that they speak of."""

_PER_JOB = re.compile(r"(?:QOS|Assoc)M(?:ax|in)(\w+?)(?:MinutesPerJob|RunMinsPerJob|PerJob|NotSatisfied)(?:Limit)?")
"""The same of the limits on a single job, of a QOS or an association."""

_RESOURCES: Mapping[str, str] = {
    "walldurationperjob": "time", "wallduration": "time", "cpu": "cpus, tasks_per_node or nodes", "node": "nodes",
    "memory": "memory", "mem": "memory", "gres": "gpus", "billing": "gpus, cpus or memory",
}  # fmt: skip


@dataclass(frozen=True)
class Job(JobRecord):
    """One array element as Slurm describes it, and what its state means."""

    @property
    def waiting(self) -> bool:
        """Whether it is to be started (again)."""
        return self.state in WAITING

    @property
    def running(self) -> bool:
        """Whether it has processes, or is about to lose them."""
        return self.state in RUNNING

    @property
    def over(self) -> bool:
        """Whether it will do nothing more."""
        return self.state in ENDED

    @property
    def held(self) -> bool:
        """Whether it waits until somebody releases it."""
        return self.state in ("REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD") or "held" in self.reason.lower()

    @property
    def hopeless(self) -> str:
        """The keys of the profile to change, if it can never start as it was asked for; else empty."""
        found = _PER_JOB.fullmatch(self.reason)
        return _RESOURCES.get(found[1].lower(), "sbatch") if found else _HOPELESS.get(self.reason, "")


@dataclass(frozen=True)
class Answer:
    """What Slurm said when it was asked."""

    time: float
    jobs: tuple[Job, ...] = ()
    controller: bool = True
    """Whether squeue answered: a job that it does not list is then not in the queue."""
    accounting: bool | None = None
    """Whether sacct answered; False: there is no accounting; None: there may be, but it did not answer."""
    cluster: str = ""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placement(Element):
    """Where Slurm has a run: the element of a batch, and what is known of it."""

    job: Job | None = None
    answered: bool = True
    """Whether Slurm would have listed the job if it had it."""
    time: float = 0.0
    """When Slurm said so."""
    seen: str = ""
    """What Slurm said before, when it does not answer now."""

    @property
    def element(self) -> str:
        """The Slurm id, by Slurm's own word if it has the job."""
        return self.job.id if self.job is not None else self.id

    @property
    def live(self) -> bool:
        """Whether Slurm will still do something with it, or may, for all that is known."""
        if self.job is None:
            return not self.answered
        return not self.job.over and not (self.job.waiting and self.job.reason == NEVER)


def ask(submissions: Sequence[Submission]) -> Answer:
    """Ask Slurm for the jobs of these batches, each cluster for its own. Raises nothing."""
    every = sorted({submission.clusters for submission in submissions})
    answers = [_ask([one for one in submissions if one.clusters == clusters], clusters) for clusters in every]
    first, *others = answers or [_ask([], "")]
    for other in others:
        jobs, problems = (*first.jobs, *other.jobs), (*first.problems, *other.problems)
        first = replace(first, jobs=jobs, controller=first.controller and other.controller, problems=problems)
    return first


def _ask(submissions: Sequence[Submission], clusters: str) -> Answer:
    names = {submission.name for submission in submissions}
    with ThreadPoolExecutor(3) as pool:
        queue = pool.submit(_squeue, {submission.user for submission in submissions}, clusters)
        accounts = pool.submit(_sacct, submissions, clusters)
        cluster = pool.submit(_cluster, clusters)
    (queued, trouble), (accounted, accounting, more) = queue.result(), accounts.result()
    jobs = _joined(queued or [], accounted)
    problems = tuple(line for line in (trouble, more) if line)
    own = tuple(replace(job, clusters=clusters) for job in jobs if job.name in names)
    return Answer(time.time(), own, queued is not None, accounting, cluster.result(), problems)


def accounted(submissions: Sequence[Submission]) -> tuple[tuple[Job, ...], bool | None]:
    """Return the accounted jobs of these batches, and whether there is accounting; None: it did not answer."""
    names = {submission.name for submission in submissions}
    found: list[Job] = []
    known: bool | None = False
    for clusters in sorted({submission.clusters for submission in submissions}):
        jobs, known, _ = _sacct([one for one in submissions if one.clusters == clusters], clusters)
        if known is None:
            return (), None
        found += jobs
    return tuple(job for job in found if job.name in names), known


def _joined(queued: Sequence[Job], accounted: Sequence[Job]) -> list[Job]:
    """squeue's word on the state, accounting's on what was used; accounting alone for what left the queue."""
    by_key = {(job.id, job.name): job for job in accounted}
    for job in queued:
        used = by_key.get((job.id, job.name))
        if used is not None and not (job.over and not used.over):  # accounting lags behind by seconds
            job = replace(job, **{name: getattr(used, name) for name in _USED})
        by_key[job.id, job.name] = job
    return list(by_key.values())


_USED = ("elapsed", "exit_code", "max_rss", "gpus", "cpus")


def _call(*command: str, clusters: str = "") -> tuple[str | None, str]:
    """Return a client's output, or None and one line about why there is none."""
    try:
        return slurm_client.call(*command, clusters=clusters), ""
    except SlurmError as error:
        return None, str(error)


_COLUMNS = "%i|%A|%T|%r|%V|%S|%N|%j"


def _squeue(users: Collection[str], clusters: str) -> tuple[list[Job] | None, str]:
    """These users' jobs in the queue, and those that ended within MinJobAge; of one user, no others are sent.

    A name may hold the separator, and comes last.
    """
    whose = ",".join(sorted({*users, getpass.getuser()} - {""}))
    output, trouble = _call("squeue", "-h", "-r", "-t", "all", "-u", whose, "-o", _COLUMNS, clusters=clusters)
    lines = [] if output is None else [line for line in output.splitlines() if "|" in line]
    return (None, trouble) if output is None else ([_queued(line) for line in lines], "")


def _queued(line: str) -> Job:
    identifier, raw, state, reason, submitted, started, nodes, name = _split(line, 8)
    reason = "" if reason == "None" else reason
    return Job(identifier, state, name, raw, reason, _number(submitted), _number(started), nodes=nodes)


_ACCOUNTS = "JobID,JobIDRaw,State,ExitCode,Submit,Start,End,ElapsedRaw,MaxRSS,AllocTRES,NodeList,JobName"


def _sacct(submissions: Sequence[Submission], clusters: str) -> tuple[list[Job], bool | None, str]:
    """The accounted jobs, whether there is accounting, and one line if it did not answer."""
    known = [submission.job_id for submission in submissions if submission.job_id]
    lost = [submission for submission in submissions if submission.unrecorded]
    asked = [["-j", ",".join(known)]] if known else []
    if lost:
        since = int(min(submission.time for submission in lost)) - 60
        names = ",".join(submission.name for submission in lost)
        asked.append(["--name", names, "-S", time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since))])
    jobs: list[Job] = []
    for selection in asked:
        output, trouble = _call("sacct", "-n", "-P", "-D", *selection, "-o", _ACCOUNTS, clusters=clusters)
        if output is None:
            return [], *_no_accounting(trouble)
        jobs += _accounted(output.splitlines())
    return jobs, True, ""


def _no_accounting(trouble: str) -> tuple[bool | None, str]:
    return (False, "") if "storage is disabled" in trouble or "not installed" in trouble else (None, trouble)


def _accounted(lines: Iterable[str]) -> list[Job]:
    """One job an id: the state of its last round, the time of all, the memory of the largest step."""
    found: dict[tuple[str, str], Job] = {}
    memory: dict[str, int] = {}
    for line in lines:
        identifier, raw, state, code, submitted, started, ended, elapsed, rss, tres, nodes, name = _split(line, 12)
        job_id, _, step = identifier.partition(".")
        if step:
            memory[job_id] = max(memory.get(job_id, 0), _bytes(rss))
            continue
        if "[" in identifier:  # the part of an array that has not been started
            continue
        before = found.pop((job_id, name), None)
        total = (_number(elapsed) or 0.0) + ((before.elapsed or 0.0) if before else 0.0)
        times = (_number(submitted), _number(started), _number(ended), total)
        gpus, cpus, word = _tres(tres, "gres/gpu"), _tres(tres, "cpu"), state.split(" ")[0]
        where = "" if "assigned" in nodes else nodes
        found[job_id, name] = Job(job_id, word, name, raw, "", *times, code, None, gpus, cpus, where, source="sacct")
    return [replace(job, max_rss=memory.get(job.id) or None) for job in found.values()]


_CLUSTERS: dict[str, tuple[float, str]] = {}
"""By machine, configuration and cluster: when its name was asked, and the name."""


def _cluster(clusters: str) -> str:
    """The name of the cluster that answers; empty if it is not known."""
    conf = f"{socket.gethostname()}:{os.environ.get('SLURM_CONF', '')}:{clusters}"
    asked, name = _CLUSTERS.get(conf, (0.0, ""))
    if not name or time.time() - asked > CLUSTER_PERIOD:
        name = ""
        with contextlib.suppress(SlurmError):
            name = slurm_client.settings(clusters).get("ClusterName", "")
        _CLUSTERS[conf] = (time.time(), name)
    return name


def _split(line: str, count: int) -> list[str]:
    parts = line.split("|", count - 1)
    return parts + [""] * (count - len(parts))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([\d.]+)([KMGT]?)", text)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def _tres(text: str, name: str) -> int:
    """A count of ``billing=1,cpu=8,gres/gpu=2,mem=32G,node=1``."""
    counts = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    return int(_number(counts.get(name, "0")) or 0)


def placements(
    store: Store, run_ids: Collection[str], max_age: float = 0.0
) -> tuple[dict[str, Placement], Answer | None]:
    """Ask Slurm where these runs are, and keep the answer in the store; None if they were never given to Slurm.

    An answer to the same question that is less than ``max_age`` seconds old is used again, another process's too: live
    tables look more often than a controller likes to be asked. The journal is read before Slurm is asked: a job that is
    submitted meanwhile is in the answer, or in neither.
    """
    concerned = _concerned(store, run_ids)
    if not concerned:
        return {}, None
    if max_age and (shared := _shared(scheduler_record.read(store), concerned, max_age)):
        return shared
    with _asking(store, watching=max_age > 0) as others:
        # somebody may have asked meanwhile, or be asking: then an older answer will do
        before = scheduler_record.read(store)
        if max_age and (shared := _shared(before, concerned, max_age * (4 if others else 1))):
            return shared
        _recall_clusters(before)
        answer, known = _recent(journal.batches(chain(*concerned.values())), max_age), before.jobs
        jobs = {(job.name, job.id.partition("_")[2] or "0"): job for job in answer.jobs}
        found = {run_id: _placed(elements, jobs, answer, known.get(run_id)) for run_id, elements in concerned.items()}
        _keep(store, found, answer, known)
    return found, answer


@contextlib.contextmanager
def _asking(store: Store, watching: bool) -> Iterator[bool]:
    """Say to others that watch that this process asks; yields whether one of them does, who then writes the answer."""
    mark = store.root / ".asking"
    ours = False
    with contextlib.suppress(OSError):
        if watching and mark.exists() and time.time() - mark.stat().st_mtime > 2 * slurm_client.PATIENCE:
            mark.unlink(missing_ok=True)  # of a process that was killed
        ours = watching and claims.create(mark, "")
    try:
        yield watching and not ours
    finally:
        if ours:
            mark.unlink(missing_ok=True)


def _recall_clusters(before: SchedulerRecord) -> None:
    """Take over what another process of this machine learnt within the hour of what its cluster is called."""
    for key, (asked, name) in before.clusters.items():
        _CLUSTERS.setdefault(key, (float(asked), str(name)))


def _shared(
    before: SchedulerRecord, concerned: Mapping[str, Sequence[Element]], max_age: float
) -> tuple[dict[str, Placement], Answer] | None:
    """The answer to whoever asked last, if it is recent, covers all these runs, and nothing was submitted since."""
    if not before.jobs or time.time() - before.time >= max_age:
        return None
    asked = before.time
    answer = Answer(asked, (), True, before.accounting, before.cluster, before.problems)
    found: dict[str, Placement] = {}
    for run_id, elements in concerned.items():
        kept = before.jobs.get(run_id)
        batches = journal.batches(elements)
        if kept is None or kept.time != asked or max(one.time for one in batches) >= asked:
            return None
        submission = next((one for one in batches if (one.launch, one.batch) == (kept.launch, kept.batch)), None)
        if submission is None:
            return None
        found[run_id] = Placement(submission, kept.index, _job(kept.job), time=asked)
    return found, answer


_ANSWERS: dict[frozenset[Submission], Answer] = {}


def _recent(submissions: Sequence[Submission], max_age: float) -> Answer:
    question = frozenset(submissions)
    last = _ANSWERS.get(question)
    if last is None or time.time() - last.time > max_age:
        _ANSWERS.clear()
        last = _ANSWERS[question] = ask(submissions)
    return last


def _concerned(store: Store, run_ids: Collection[str]) -> dict[str, list[Element]]:
    """The elements that each of the runs was given to, oldest first."""
    found: dict[str, list[Element]] = {}
    for one in journal.elements(store, run_ids):
        found.setdefault(one.run_id, []).append(one)
    return found


def _placed(
    elements: Sequence[Element], jobs: Mapping[tuple[str, str], Job], answer: Answer, before: KeptJob | None
) -> Placement:
    """The element that says most about the run: one that runs, else one that waits, else the last that ended."""
    found = [_placement(one, jobs, answer, before) for one in elements]
    return max(enumerate(found), key=lambda pair: (_weight(pair[1]), pair[0]))[1]


def _placement(
    element: Element, jobs: Mapping[tuple[str, str], Job], answer: Answer, before: KeptJob | None
) -> Placement:
    submission, index = element.submission, element.index
    job = jobs.get((submission.name, str(index)))
    if job is not None and submission.job_id and job.id.partition("_")[0] != submission.job_id:
        job = None
    seen, at = (before.state, before.time) if before is not None else ("", 0.0)
    elsewhere = bool(submission.cluster and answer.cluster and submission.cluster != answer.cluster)
    other = elsewhere and not submission.clusters
    if job is not None and job.source == "sacct" and not job.over:
        # accounting lags, and may wait for ever for the end of a job that the controller has forgotten
        seen, at, job = job.state, answer.time, None
    placement = Placement(submission, index, job, answer.controller and not other, answer.time)
    if job is None and not placement.answered and seen:
        return replace(placement, seen=f"{seen} at {time.strftime('%H:%M', time.localtime(at))}")
    return placement


def _weight(placement: Placement) -> int:
    job = placement.job
    if job is not None and job.running:
        return 5
    if job is not None and job.waiting:
        return {"Dependency": 3, NEVER: 0}.get(job.reason, 4)
    if placement.live:
        return 2
    return 1


def _keep(store: Store, found: Mapping[str, Placement], answer: Answer, known: Mapping[str, KeptJob]) -> None:
    """Write the record that reports read; what was known before is kept where there is no answer now.

    A store that cannot be written is looked at all the same.
    """
    answered = {run_id: one for run_id, one in found.items() if one.job is not None or one.answered}
    new = {run_id: _kept(placement, answer) for run_id, placement in answered.items()}
    about = (answer.time, answer.controller, answer.accounting, answer.cluster, answer.problems, dict(_CLUSTERS))
    with contextlib.suppress(OSError, ValueError):
        scheduler_record.write(store, SchedulerRecord(*about, {**known, **new}))


def _kept(placement: Placement, answer: Answer) -> KeptJob:
    submission, state = placement.submission, placement.job.state if placement.job else ""
    return KeptJob(submission.launch, submission.batch, placement.index, answer.time, state, placement.job)


def remembered(store: Store) -> dict[str, Placement]:
    """Return where Slurm had the runs when it was last asked, from the store alone."""
    kept = scheduler_record.read(store).jobs
    batches = {(one.launch, one.batch): one for one in journal.submissions(store)} if kept else {}
    placed = ((run_id, one, batches.get((one.launch, one.batch))) for run_id, one in kept.items())
    return {
        run_id: Placement(submission, one.index, _job(one.job), time=one.time)
        for run_id, one, submission in placed
        if submission is not None
    }


def _job(kept: JobRecord | None) -> Job | None:
    return None if kept is None else Job(**vars(kept))


def live_elements(store: Store, run_ids: Collection[str]) -> tuple[list[Job], Answer | None]:
    """Return every job that Slurm still has for these runs, those of later stages too, and its answer."""
    elements = list(journal.elements(store, run_ids))
    if not elements:
        return [], None
    ours = {(one.submission.name, one.index) for one in elements}
    answer = ask(journal.batches(elements))
    jobs = [job for job in answer.jobs if job.source == "squeue" and not job.over]
    return [job for job in jobs if (job.name, int(job.id.partition("_")[2] or 0)) in ours], answer


def cancel(jobs: Sequence[Job]) -> str:
    """Take jobs out of Slurm, by number and name, so that no other job of a reused number goes; returns what failed."""
    troubles = []
    for name, clusters in dict.fromkeys((job.name, job.clusters) for job in jobs):
        ids = [job.id for job in jobs if job.name == name]
        for start in range(0, len(ids), 200):
            chunk = ids[start : start + 200]
            troubles.append(_call("scancel", f"--name={name}", *chunk, clusters=clusters)[1])
    return next((trouble for trouble in troubles if trouble), "")


def log_of(store_root: Path, placement: Placement) -> Path | None:
    """Return what Slurm and submitit wrote of a job, None if it never began."""
    folder = store_root / "launches" / placement.submission.launch / "jobs" / str(placement.submission.batch)
    path = folder / f"{placement.element}_0_log.out"
    return path if path.exists() else None


NOWHERE: Mapping[str, Placement] = MappingProxyType({})
"""Placements of runs of which none was given to Slurm."""
