"""Status is never wrong: what files, squeue and sacct say, in every combination that has misled somebody.

squeue, sacct and scontrol are small scripts that print what a real Slurm 22.05 printed, or fail as it fails.
"""

import getpass
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from experiments.launch import begin
from experiments.status import logs, scheduler, slurm_client, standing, states, suite_view, tables
from experiments.status.states import RunState, State, should_start
from experiments.status.suite_view import Delta, RunLine, TimeLeft, WorkLeft
from experiments.store import claims
from experiments.store.files import write_json
from experiments.store.journal import BatchRun, Submission, of_launch
from experiments.store.run_dir import RunDir, Store
from experiments.suites.planning import Plan

LAUNCH, NAME, ARRAY = "20260101-120000-abcdef", "headline.20260101-120000-abcdef.0", "1234"

SCRIPT = """#!/bin/sh
f={folder}/$(basename "$0")
[ -e "$f.sleep" ] && exec sleep "$(cat "$f.sleep")"
echo "$@" >> "$f.calls"
cat "$f.err" >&2
cat "$f.out"
exit "$(cat "$f.rc")"
"""


@dataclass
class FakeSlurm:
    """What the three clients answer."""

    folder: Path
    array: str = ARRAY
    queue: list[str] = field(default_factory=list)
    accounts: list[str] = field(default_factory=list)

    def say(self, client: str, out: str = "", err: str = "", code: int = 0) -> None:
        for suffix, text in (("out", out), ("err", err), ("rc", str(code))):
            (self.folder / f"{client}.{suffix}").write_text(text)

    def queued(self, index: int, state: str, reason: str = "None", name: str = NAME, start: str = "N/A") -> None:
        line = f"{self.array}_{index}|{int(self.array) + 1 + index}|{state}|{reason}|1767268800|{start}|n0|{name}"
        self.queue.append(line)
        self.say("squeue", "\n".join(self.queue) + "\n")

    def accounted(
        self, index: int, state: str, code: str = "0:0", elapsed: int = 60, rss: str = "", name: str = NAME
    ) -> None:
        head = f"{self.array}_{index}|{int(self.array) + 1 + index}"
        times = f"1767268800|1767268810|1767268870|{elapsed}"
        tres = "billing=1,cpu=4,gres/gpu=2,mem=500M,node=1"
        self.accounts.append(f"{head}|{state}|{code}|{times}||{tres}|n0|{name}")
        if rss:
            self.accounts.append(f"{self.array}_{index}.0||{state}|{code}|{times}|{rss}|{tres}|n0|python")
        self.say("sacct", "\n".join(self.accounts) + "\n")

    def no_accounting(self) -> None:
        self.say("sacct", err="Slurm accounting storage is disabled\n", code=1)

    def down(self) -> None:
        message = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
        self.say("squeue", err=f"{message}\n", code=1)
        self.say("scontrol", err=f"{message}\n", code=1)

    def calls(self, client: str) -> int:
        path = self.folder / f"{client}.calls"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("squeue", "sacct", "scontrol"):
        (folder / name).write_text(SCRIPT.format(folder=folder))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    fake = FakeSlurm(folder)
    fake.say("squeue")
    fake.say("scontrol", "Configuration data as of now\nClusterName             = lab\nMinJobAge = 300 sec\n")
    fake.no_accounting()
    monkeypatch.setattr(scheduler, "_CLUSTERS", {})
    return fake


@dataclass
class Submitted:
    """The four runs of a plan as one array."""

    plan: Plan
    store: Store

    def run(self, index: int = 0) -> RunDir:
        return self.store.run(self.plan.unique[index].run_id)

    def state(self, index: int = 0) -> RunState:
        run = self.plan.unique[index]
        return standing.look(self.store, [(run.run_id, run.eval_id)]).states[run.run_id, run.eval_id]

    def said(self, index: int = 0) -> tuple[str, str]:
        state = self.state(index)
        return state.label, state.detail

    def attempt(self, index: int = 0, launch: str = LAUNCH, log: str = "", **stage: Any) -> None:
        """Leave what an attempt leaves; without an outcome, as one that died."""
        run = self.run(index)
        number = max(run.attempts(), default=0) + 1
        about = {"stage": "all", "started": time.time() - 90, "ended": None, "outcome": None, "launch": launch}
        write_json(run.attempt(number).path / "stage.json", {**about, **stage})
        (run.attempt(number).path / "log.txt").write_text(log)


@pytest.fixture
def submitted(plan: Plan, store: Store, slurm: FakeSlurm) -> Submitted:
    submit(plan, store)
    return Submitted(plan, store)


def submit(plan: Plan, store: Store, job_id: str | None = ARRAY, launch: str = LAUNCH, **changes: Any) -> None:
    for run in plan.unique:
        store.run(run.run_id).create(run.config, run.row.name)
    runs = tuple(BatchRun(run.run_id, run.eval_id) for run in plan.unique)
    values = {"stage": "all", "name": NAME, "profile": "a100", "cluster": "lab", "batch": 0, **changes}
    of_launch(store, launch).submitting(Submission(launch, runs=runs, created=0.0, **values))
    if job_id is not None:
        of_launch(store, launch).submitted(values["batch"], job_id)


def test_pending_with_its_reason_and_running(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(0, "PENDING", "JobArrayTaskLimit")
    slurm.queued(1, "PENDING", "Priority")
    slurm.queued(2, "RUNNING", start="1767268801")
    slurm.queued(3, "CONFIGURING")
    assert submitted.said(0) == ("QUEUED", "JobArrayTaskLimit")
    assert submitted.said(1) == ("QUEUED", "Priority")
    assert submitted.said(2) == ("RUNNING", "the job has begun, the attempt not yet")
    assert submitted.said(3) == ("QUEUED", "configuring")
    assert all(submitted.state(index).active for index in range(4))
    assert not any(should_start(submitted.state(index)) for index in range(4)), "Slurm has them"
    assert submitted.state(1).job == "1234_1"


def test_a_cancelled_pending_element_does_not_wait_for_ever(submitted: Submitted, slurm: FakeSlurm) -> None:
    """It is gone from squeue at once and has no row in sacct."""
    slurm.queued(0, "PENDING")
    slurm.accounted(0, "PENDING")
    label, detail = submitted.said(1)
    assert label == "CANCELLED"
    assert "job 1234_1 left the queue before it began" in detail
    assert should_start(submitted.state(1))
    assert submitted.said(0)[0] == "QUEUED"


def test_an_element_that_died_before_python_began_is_not_called_cancelled(submitted: Submitted, store: Store) -> None:
    log = store.launches / LAUNCH / "jobs" / "0" / "1234_0_0_log.out"
    log.parent.mkdir(parents=True)
    log.write_text("bash: line 3: module: command not found\n")
    assert submitted.said() == ("LOST(import)", "bash: line 3: module: command not found")


def test_a_result_is_done_whatever_slurm_says(submitted: Submitted, slurm: FakeSlurm) -> None:
    run, chosen = submitted.run(), submitted.plan.unique[0]
    result = {"schema": 1, "run_id": run.run_id, "eval_id": chosen.eval_id, "complete": True, "metrics": {"AP": 1.0}}
    write_json(run.evaluation(chosen.eval_id) / "result.json", result)
    slurm.queued(0, "COMPLETING", "launch failed requeued held")
    assert submitted.state().state is State.DONE
    assert slurm.calls("squeue") == 0, "nothing is asked about runs that are done"


def test_completed_without_a_result_is_no_success(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.accounted(0, "COMPLETED")
    assert submitted.said() == ("LOST", "Slurm says COMPLETED, but there is no result (job 1234_0 on n0)")


def test_unknown_words_stay_unknown(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(0, "POWERING_SIDEWAYS")
    state = submitted.state()
    assert (state.state, state.detail) == (State.UNKNOWN, "Slurm says POWERING_SIDEWAYS, which is not known here")
    assert not should_start(state), "it may be at work"


@pytest.mark.parametrize(
    ("word", "label"),
    [
        ("TIMEOUT", "TIMEOUT"),
        ("DEADLINE", "TIMEOUT"),
        ("OUT_OF_MEMORY", "FAILED(oom)"),
        ("NODE_FAIL", "FAILED(node)"),
        ("BOOT_FAIL", "FAILED(node)"),
        ("CANCELLED by 1000", "CANCELLED"),
        ("FAILED", "FAILED(killed)"),
        ("PREEMPTED", "LOST(killed)"),
    ],
)
def test_how_a_job_ended_that_could_not_say_so(submitted: Submitted, slurm: FakeSlurm, word: str, label: str) -> None:
    submitted.attempt()
    slurm.accounted(0, word, "0:9")
    state = submitted.state()
    assert state.label == label
    assert "(job 1234_0 on n0, exit code 0:9)" in state.detail
    assert should_start(state)


def test_the_attempts_own_word_comes_before_slurms(submitted: Submitted, slurm: FakeSlurm) -> None:
    submitted.attempt(outcome="failed", failure_class="nan", detail="loss is not finite", ended=time.time() - 1)
    slurm.accounted(0, "FAILED", "1:0")
    assert submitted.said() == ("FAILED(nan)", "loss is not finite")


@pytest.mark.parametrize(
    ("log", "label"),
    [
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=1234.0. Some of the step tasks have been OOM Killed.\n"
         "srun: error: n0: task 0: Out Of Memory", "FAILED(oom)"),
        ("slurmstepd: error: StepId=1234.0 exceeded memory limit (9 > 5), being killed\nsrun: error: Terminated",
         "FAILED(oom)"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "FAILED(oom)"),
        ("slurmstepd: error: *** STEP 1234.0 ON n0 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***", "TIMEOUT"),
        ("slurmstepd: error: *** JOB 1234 ON n0 CANCELLED AT 2026-01-01T00:00:00 DUE TO NODE FAILURE ***",
         "FAILED(node)"),
        ("ModuleNotFoundError: No module named 'detectron2'", "FAILED(import)"),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'a.png'", "FAILED(data)"),
        ("OSError: [Errno 28] No space left on device", "FAILED(disk)"),
        ("FloatingPointError: the loss is nan", "FAILED(nan)"),
        ("mpformer.runtime.errors.UserError: unknown configuration key 'x'", "FAILED(config)"),
        ("slurmstepd: error: *** STEP 1234.0 ON n0 CANCELLED AT 2026-01-01T00:00:00 ***", "FAILED(killed)"),
    ],
)  # fmt: skip
def test_the_log_tells_the_failure_class(submitted: Submitted, slurm: FakeSlurm, log: str, label: str) -> None:
    submitted.attempt(log=f"iteration 3\n{log}\n")
    slurm.accounted(0, "FAILED", "1:0")
    state = submitted.state()
    assert state.label == label
    assert any(line[:40] in state.detail for line in log.splitlines())


def test_memory_ends_a_job_that_slurm_calls_cancelled(submitted: Submitted, slurm: FakeSlurm) -> None:
    submitted.attempt(log="slurmstepd: error: Exceeded job memory limit\n")
    slurm.accounted(0, "CANCELLED", "0:15")
    assert submitted.state().label == "FAILED(oom)"


def test_requeued_jobs_are_waited_for_and_held_ones_shown(submitted: Submitted, slurm: FakeSlurm) -> None:
    for index in range(3):
        submitted.attempt(index, outcome="requeued", detail="time limit", ended=time.time() - 5)
    slurm.queued(0, "PENDING", "BeginTime")
    slurm.queued(1, "PENDING", "launch failed requeued held")
    slurm.queued(2, "REQUEUE_HOLD", "JobHeldAdmin")
    slurm.queued(3, "PENDING", "JobHeldUser")
    assert submitted.said(0) == ("REQUEUED", "BeginTime")
    held = "held (launch failed requeued held): scontrol release 1234_1"
    assert submitted.said(1) == ("REQUEUED", held)
    assert submitted.said(2)[0] == "REQUEUED"
    assert submitted.said(3) == ("QUEUED", "held (JobHeldUser): scontrol release 1234_3")
    assert not any(should_start(submitted.state(index)) for index in range(4))


def test_a_requeued_job_that_slurm_lost_is_lost(submitted: Submitted) -> None:
    submitted.attempt(outcome="requeued", detail="time limit", ended=time.time() - 5)
    state = submitted.state()
    assert (state.state, state.detail) == (State.LOST, "requeued, but Slurm has no job 1234_0 any more")
    assert should_start(state)


def test_a_dependency_that_failed_is_not_waited_for(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(0, "PENDING", "DependencyNeverSatisfied")
    state = submitted.state()
    assert (state.state, state.active) == (State.LOST, False)
    assert "never starts" in state.detail


def test_of_two_stages_the_one_at_work_counts(submitted: Submitted, slurm: FakeSlurm) -> None:
    submit(submitted.plan, submitted.store, "1300", stage="evaluate", name="other", batch=1)
    slurm.queued(0, "PENDING", "Priority")
    slurm.queue.append("1300_0|1301|PENDING|Dependency|1767268800|N/A||other")
    slurm.queued(1, "RUNNING")
    slurm.queue.append("1300_1|1302|PENDING|Dependency|1767268800|N/A||other")
    slurm.queued(2, "PENDING", "Priority")
    assert submitted.said(0) == ("QUEUED", "Priority")
    assert submitted.state(1).state is State.RUNNING
    slurm.queue = ["1300_0|1301|PENDING|Dependency|1767268800|N/A||other"]
    slurm.queued(3, "PENDING")
    assert submitted.said(0) == ("QUEUED", "Dependency")


def test_a_reused_job_id_with_another_name_is_not_believed(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(0, "RUNNING", name="somebody-elses.array")
    slurm.accounted(0, "COMPLETED", name="somebody-elses.array")
    assert submitted.state().label == "CANCELLED", "ours is in neither"


def test_our_name_under_another_id_is_not_believed_either(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.array = "999"
    slurm.queued(0, "RUNNING")
    assert submitted.state().label == "CANCELLED"


def test_a_crash_between_submitting_and_recording_is_told_by_name(
    plan: Plan, store: Store, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(plan, store, job_id=None)
    found = Submitted(plan, store)
    assert found.said() == ("QUEUED", "being submitted")
    monkeypatch.setattr(states, "SUBMISSION_SECONDS", 0.0)
    assert found.state().state is State.PLANNED, "it never reached Slurm"
    slurm.queued(0, "PENDING", "Resources")
    assert (found.said(), found.state().job) == (("QUEUED", "Resources"), "1234_0")


def test_a_controller_that_is_away_is_said_and_nothing_is_guessed(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(0, "PENDING", "Priority")
    slurm.queued(1, "RUNNING")
    assert submitted.said(0) == ("QUEUED", "Priority")
    slurm.down()
    state = submitted.state(0)
    assert state.state is State.UNKNOWN
    assert state.detail.startswith("Slurm does not answer about job 1234_0; Slurm said PENDING at ")
    assert not should_start(state)
    assert submitted.state(3).detail == "Slurm does not answer about job 1234_3"
    view = suite_view.views(submitted.store.root, [_record(submitted.plan)])[0]
    assert view.plain()["scheduler"]["controller"] is False
    (note,) = tables.notes([view])
    assert "squeue does not answer: slurm_load_jobs error: Unable to contact slurm controller" in note
    slurm.say("squeue", "\n".join(slurm.queue) + "\n")
    assert submitted.said(0) == ("QUEUED", "Priority"), "back again"


def test_an_attempt_that_said_how_it_ended_needs_no_controller(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.down()
    submitted.attempt(0, outcome="failed", failure_class="nan", detail="loss is not finite", ended=time.time() - 1)
    submitted.attempt(1, outcome="requeued", ended=time.time() - 1)
    submitted.attempt(2)
    assert submitted.state(0).label == "FAILED(nan)"
    assert submitted.state(1).label == "UNKNOWN"
    assert submitted.state(2).label == "UNKNOWN", "Slurm may start it again"


def test_logs_of_a_run_that_waits_say_so(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(0, "PENDING", "Priority")
    assert list(logs.log(submitted.store, submitted.run(0), None, follow=False)) == ["QUEUED: Priority (job 1234_0)\n"]
    log = submitted.store.launches / LAUNCH / "jobs" / "0" / "1234_1_0_log.out"
    log.parent.mkdir(parents=True)
    log.write_text("module: command not found\n")
    text = "".join(logs.log(submitted.store, submitted.run(1), None, follow=True))
    assert "the log of job 1234_1:\nmodule: command not found" in text
    assert logs.job_log(submitted.store, submitted.run(1)) == "module: command not found\n"


def test_accounting_alone_tells_how_a_job_ended(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.down()
    slurm.accounted(0, "TIMEOUT")
    slurm.accounted(1, "RUNNING")
    assert submitted.state(0).label == "TIMEOUT"
    assert submitted.state(1).label == "UNKNOWN", "accounting may wait for ever for the end of a forgotten job"
    assert "Slurm said RUNNING" in submitted.state(1).detail


def test_accounting_that_is_away_is_said(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(0, "RUNNING")
    slurm.say("sacct", err="sacct: error: slurmdbd: Connection refused\n", code=1)
    view = suite_view.views(submitted.store.root, [_record(submitted.plan)])[0]
    assert view.plain()["scheduler"]["accounting"] is None
    assert "sacct does not answer" in tables.notes([view])[0]
    assert view.runs[0].state.state is State.RUNNING


def test_clients_that_hang_are_not_waited_for(
    submitted: Submitted, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_client, "PATIENCE", 0.3)
    for name in ("squeue", "sacct", "scontrol"):
        (slurm.folder / f"{name}.sleep").write_text("60")
    assert submitted.state().state is State.UNKNOWN


def test_a_machine_without_slurm_says_so(submitted: Submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    view = suite_view.views(submitted.store.root, [_record(submitted.plan)])[0]
    assert view.counts == {"UNKNOWN": 4}
    assert "squeue is not installed here" in tables.notes([view])[0]


def test_another_clusters_slurm_knows_nothing_of_the_job(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.say("scontrol", "ClusterName             = elsewhere\n")
    assert submitted.state().state is State.UNKNOWN


def test_a_claim_that_only_has_not_expired_does_not_outweigh_slurm(submitted: Submitted, slurm: FakeSlurm) -> None:
    """The node is gone; Slurm has queued the job again long before the claim's heartbeat is too old."""
    for index in range(2):
        submitted.attempt(index)
        claim = submitted.run(index).path / "claims" / "1"
        about = {"host": "n7", "machine": "another", "pid": 7, "born": "8", "token": "t", "job_id": str(1235 + index)}
        write_json(claim, about)
        os.utime(claim, (time.time() - 60, time.time() - 60))
    assert submitted.state(0).state is State.RUNNING, "nobody has said otherwise"
    slurm.queued(0, "PENDING", "Resources")
    slurm.queued(1, "RUNNING")
    assert submitted.state(0).label == "REQUEUED"
    assert submitted.state(1).label == "RUNNING"
    os.utime(submitted.run(0).path / "claims" / "1")
    assert submitted.state(0).label == "RUNNING", "a heart beats: squeue is behind"


def test_somebodys_later_attempt_outweighs_a_job_that_ended(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.accounted(0, "CANCELLED")
    submitted.attempt(launch="later", outcome="failed", failure_class="data", detail="no images", started=time.time())
    assert submitted.said() == ("FAILED(data)", "no images")


def test_a_job_that_starts_again_is_not_its_earlier_round(submitted: Submitted, slurm: FakeSlurm) -> None:
    submitted.attempt(outcome="requeued", ended=time.time() - 60)
    slurm.queued(0, "RUNNING", start=str(int(time.time() - 5)))
    assert submitted.said() == ("RUNNING", "the job has begun, the attempt not yet")
    slurm.queue.clear()
    slurm.queued(0, "COMPLETING", start=str(int(time.time() - 90)))
    assert submitted.said() == ("REQUEUED", "the job is being queued again")


def test_a_users_cancel_is_shown_with_the_job_that_is_left(submitted: Submitted, slurm: FakeSlurm) -> None:
    write_json(submitted.run().cancel_file, {"time": time.time()})
    slurm.queued(0, "PENDING")
    assert submitted.said() == ("CANCELLED", "by the user; Slurm still has job 1234_0 (PENDING)")


def test_the_snapshot_serves_whoever_does_not_ask(submitted: Submitted, slurm: FakeSlurm) -> None:
    run = submitted.plan.unique[0]
    slurm.queued(0, "PENDING", "Priority")
    submitted.state()
    calls = slurm.calls("squeue")
    state = standing.remembered(submitted.store, [(run.run_id, run.eval_id)])[run.run_id, run.eval_id]
    assert (state.label, state.detail) == ("QUEUED", "Priority")
    assert slurm.calls("squeue") == calls
    submitted.attempt(outcome="failed", failure_class="nan", detail="later", ended=time.time() + 1)
    state = standing.remembered(submitted.store, [(run.run_id, run.eval_id)])[run.run_id, run.eval_id]
    assert state.label == "FAILED(nan)", "files that are newer than the snapshot come first"


def test_a_live_table_asks_slurm_now_and_then_only(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(0, "PENDING")
    key = [(run.run_id, run.eval_id) for run in submitted.plan.unique]
    for _ in range(4):
        standing.look(submitted.store, key, max_age=60)
    assert slurm.calls("squeue") == 1


def test_of_several_who_watch_one_asks(submitted: Submitted, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process was told lately counts, unless it is not about every run, or something was submitted."""
    slurm.queued(0, "PENDING", "Priority")
    slurm.queued(1, "RUNNING")
    key = [(run.run_id, run.eval_id) for run in submitted.plan.unique]

    def elsewhere(keys: Any, max_age: float = 60) -> dict[Any, RunState]:
        monkeypatch.setattr(scheduler, "_ANSWERS", {})  # as in another process
        return standing.look(submitted.store, keys, max_age).states

    first = elsewhere(key[:3])
    assert (elsewhere(key[:3]), slurm.calls("squeue")) == (first, 1)
    assert elsewhere(key[:2]) == {one: first[one] for one in key[:2]}
    assert slurm.calls("squeue") == 1
    elsewhere(key)
    assert slurm.calls("squeue") == 2, "it is about a further run"
    elsewhere(key, max_age=0)
    assert slurm.calls("squeue") == 3, "a launch asks by itself"
    later = Submission("20260101-000001-later1", 0, "all", "headline.later.0", (BatchRun(*key[0]),), "a100", "lab", 0.0)
    of_launch(submitted.store, later.launch).submitting(later)
    elsewhere(key)
    assert slurm.calls("squeue") == 4, "something was submitted since"


def test_slurm_is_asked_about_the_jobs_of_those_who_launched_and_nobody_elses(
    submitted: Submitted, slurm: FakeSlurm
) -> None:
    """For one user the controller itself leaves out the others' jobs; its configuration is asked for once."""
    for _ in range(3):
        submitted.state()
    calls = (slurm.folder / "squeue.calls").read_text().splitlines()
    assert len(calls) == 3
    assert all(f"-u {getpass.getuser()} " in call and "--name" not in call for call in calls), calls
    assert slurm.calls("scontrol") == 1


def test_rounds_of_a_requeued_job_add_up(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.accounted(0, "PREEMPTED", elapsed=100, rss="2048K")
    slurm.accounted(0, "COMPLETED", elapsed=50, rss="1.5G")
    (job,) = scheduler.ask([_submission()]).jobs
    assert (job.state, job.elapsed, job.max_rss, job.gpus, job.cpus) == ("COMPLETED", 150, int(1.5 * 2**30), 2, 4)
    slurm.queued(0, "COMPLETED")
    (job,) = scheduler.ask([_submission()]).jobs
    assert (job.elapsed, job.source) == (150, "squeue")


def _submission() -> Submission:
    return Submission(LAUNCH, 0, "all", NAME, (), "a100", "lab", 0.0, ARRAY)


def _record(plan: Plan) -> dict[str, Any]:
    runs = [{"seed": run.seed, "run_id": run.run_id, "eval_id": run.eval_id} for run in plan.unique]
    head = {"suite": "headline", "scale": "mini", "dataset": "shapes", "title": "", "primary": "AP"}
    return {**head, "baseline": "mask2former", "rows": [{"name": "mask2former", "runs": runs}]}


def _scored(run: RunDir, *lines: tuple[int, float], final: bool = False) -> None:
    for iteration, score in lines:
        line = {"kind": "evaluation", "iteration": iteration, "metrics": {"AP": score}, "final": final}
        with run.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n" + json.dumps({"kind": "train", "loss": 1.0, "iteration": 1}) + "\n")


def test_the_difference_is_at_the_last_iteration_that_both_have(plan: Plan, store: Store) -> None:
    begin.record(plan, store, "")
    base, row = (store.run(run.run_id) for run in plan.runs if run.seed == 0)
    _scored(base, (2, 10.0), (4, 20.0), (6, 30.0))
    _scored(row, (2, 11.0), (4, 22.0))
    (record,) = store.suite_records()

    def line() -> RunLine:
        return {(run.row, run.seed): run for run in suite_view.view(store.root, record).runs}["mp-former", 0]

    assert (line().score.metrics["AP"], line().score.iteration) == (22.0, 4)
    assert line().delta == Delta(2.0, 4)
    _scored(row, (8, 44.0))
    assert (line().score.metrics["AP"], line().delta) == (44.0, Delta(2.0, 4))
    text = _printed(tables.table(suite_view.view(store.root, record)))
    assert "+2.0 @4" in text


def test_time_left_is_measured_by_the_run_else_by_its_row_else_by_the_suite(
    submitted: Submitted, slurm: FakeSlurm
) -> None:
    plan, store = submitted.plan, submitted.store
    begin.record(plan, store, "")
    (record,) = store.suite_records()
    view = suite_view.view(store.root, record)
    assert (view.left.seconds, view.left.unknown) == (0, 4)
    first = plan.unique[0]
    result = {"schema": 1, "run_id": first.run_id, "eval_id": first.eval_id, "complete": True, "metrics": {"AP": 1.0}}
    write_json(submitted.run(0).evaluation(first.eval_id) / "result.json", result)
    write_json(submitted.run(0).path / "trained.json", {"seconds": 24.0, "iterations": 12, "weights_sha256": "0"})
    for index in (1, 2, 3):
        slurm.queued(index, "PENDING")
    submitted.attempt(3, outcome="requeued", ended=time.time() - 1)
    write_json(submitted.run(3).attempt(1).path / "progress.json", {"iteration": 9, "max_iter": 12})
    view = suite_view.view(store.root, record)
    found = {run.state.run_id: run.left for run in view.runs}
    assert [found[run.run_id] for run in plan.unique] == [
        TimeLeft(), TimeLeft(24.0, "row"), TimeLeft(24.0, "suite"), TimeLeft(6.0, "suite")
    ]  # fmt: skip
    assert view.left == WorkLeft(runs=3, running=0, seconds=54.0, unknown=0)
    text = _printed(tables.table(view))
    assert "54s of runs left, as measured" in text
    assert "~24s" in text


def _printed(table: Any) -> str:
    import io

    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=250).print(table)
    return text.getvalue()


def test_the_table_shows_jobs_reasons_and_telling_lines_as_they_are(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.queued(1, "PENDING", "(ReqNodeNotAvail, UnavailableNodes:n[0-1])")
    log = "Traceback\nValueError: a [bold] surprise\n"
    submitted.attempt(0, log=log, outcome="failed", failure_class="error", detail="ValueError", ended=time.time())
    text = _printed(tables.table(suite_view.view(submitted.store.root, _record(submitted.plan))))
    assert "UnavailableNodes:n[0-1]" in text
    assert "1234_1" in text
    assert "ValueError: a [bold] surprise" in text


def test_a_long_suite_is_plain_text_with_every_run(submitted: Submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    first = submitted.plan.unique[0]
    result = {"schema": 1, "run_id": first.run_id, "eval_id": first.eval_id, "complete": True, "metrics": {"AP": 1.0}}
    write_json(submitted.run(0).evaluation(first.eval_id) / "result.json", result)
    submitted.attempt(1, outcome="failed", failure_class="data", detail="no [images]", ended=time.time())
    view = suite_view.view(submitted.store.root, _record(submitted.plan))
    lines = tables.text(view).splitlines()
    assert lines[0].startswith("headline@mini on shapes: 1 DONE, 1 FAILED(data), 2 CANCELLED")
    assert len(lines) == 2 + 4
    assert lines[1].index("state") == lines[2].index("DONE") == lines[3].index("FAILED(data)")
    assert lines[3].endswith("no [images]")
    assert "DONE" in _printed(tables.table(view)).split("\n", 1)[1]
    monkeypatch.setattr(tables, "LONG", 3)
    assert "DONE" not in _printed(tables.table(view)).split("\n", 1)[1], "a long live table shows what is open"


def test_the_file_systems_clock_is_read_once_for_many_runs(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(4):
        content = {"host": "n7", "machine": "another", "pid": 7, "born": "8", "token": "t", "job_id": "1235"}
        write_json(submitted.run(index).path / "claims" / "1", content)
    monkeypatch.setattr(claims, "_PROBED", {})
    probed = []
    monkeypatch.setattr(claims, "_probed", lambda directory: probed.append(directory) or time.time())
    assert {submitted.state(index).state for index in range(4)} == {State.RUNNING}
    assert len(probed) == 1
    late = time.monotonic() + 2 * claims.HEARTBEAT_TIMEOUT
    monkeypatch.setattr(claims.time, "monotonic", lambda: late)
    monkeypatch.setattr(claims, "_probed", lambda directory: time.time() + 2 * claims.HEARTBEAT_TIMEOUT)
    assert claims.holder(submitted.run().path / "claims") is None, "by the file system's clock, not by ours"


def test_claims_on_other_machines_count_by_their_heartbeat(submitted: Submitted) -> None:
    claim = submitted.run().path / "claims" / "1"
    write_json(claim, {"host": "n7", "machine": "another", "pid": 7, "born": "8", "token": "t", "job_id": "1235"})
    assert claims.holder(claim.parent) == 1
    assert submitted.state().state is State.RUNNING
