"""Status is never wrong: what files, squeue and sacct say, in every combination that has misled somebody."""

import os
import time
from pathlib import Path

import pytest

from experiments.status import failures, slurm_client, states, suite_view, tables
from experiments.status.states import State, should_start
from experiments.store import claims
from experiments.store.files import write_json
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan
from tests.support.fake_slurm import LAUNCH, FakeSlurm, Submitted, submit, suite_record


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
    assert submitted.said() == ("LOST", "Slurm says COMPLETED, but there is no result (job 1234_0 on n0: COMPLETED)")


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
        ("PREEMPTED", "LOST(preempted)"),
    ],
)
def test_how_a_job_ended_that_could_not_say_so(submitted: Submitted, slurm: FakeSlurm, word: str, label: str) -> None:
    submitted.attempt()
    slurm.accounted(0, word, "0:9")
    state = submitted.state()
    assert state.label == label
    assert f"(job 1234_0 on n0: {word.split()[0]}, exit code 0:9)" in state.detail
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
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "FAILED(gpu)"),
        ("[rank0]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)", "FAILED(gpu)"),
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
    slurm.queue[2] = slurm.queue[2].replace("REQUEUE_HOLD", "RESV_DEL_HOLD")
    slurm.say("squeue", "\n".join(slurm.queue) + "\n")
    assert submitted.said(2) == ("REQUEUED", "held (JobHeldAdmin): scontrol release 1234_2")
    assert submitted.said(3) == ("QUEUED", "held (JobHeldUser): scontrol release 1234_3")
    assert not any(should_start(submitted.state(index)) for index in range(4))


@pytest.mark.parametrize(
    ("reason", "key"),
    [
        ("PartitionTimeLimit", "time or partition"),
        ("BadConstraints", "constraint, gpus, memory, cpus or nodes"),
        ("InvalidAccount", "account"),
        ("QOSMaxWallDurationPerJobLimit", "time"),
        ("QOSMaxGRESPerJob", "gpus"),
        ("QOSMaxMemoryPerJob", "memory"),
        ("AssocMaxNodePerJobLimit", "nodes"),
        ("QOSMinCpuNotSatisfied", "cpus, tasks_per_node or nodes"),
        ("AssocMaxCpuMinutesPerJobLimit", "cpus, tasks_per_node or nodes"),
    ],
)
def test_a_job_that_can_never_start_names_the_profiles_key(
    submitted: Submitted, slurm: FakeSlurm, reason: str, key: str
) -> None:
    slurm.queued(0, "PENDING", reason)
    state = submitted.state()
    advice = f"never starts as it is ({reason}): change the profile's {key}, cancel, and launch again"
    assert (state.label, state.detail, state.stuck) == ("QUEUED", advice, True)


@pytest.mark.parametrize("reason", ["Priority", "Resources", "QOSMaxJobsPerUserLimit", "AssocGrpCpuLimit", "BeginTime"])
def test_what_only_waits_is_not_stuck(submitted: Submitted, slurm: FakeSlurm, reason: str) -> None:
    slurm.queued(0, "PENDING", reason)
    assert (submitted.said(), submitted.state().stuck) == (("QUEUED", reason), False)


def test_an_interrupted_attempt_is_not_cancelled_while_slurm_has_its_job(
    submitted: Submitted, slurm: FakeSlurm
) -> None:
    """SIGTERM, a checkpoint, and silence: the job may be ended, or queued again."""
    began, detail = str(int(time.time() - 90)), "interrupted: SIGTERM; launch again to continue"
    submitted.attempt(outcome="interrupted", ended=time.time() - 20, detail=detail)
    for word in ("RUNNING", "COMPLETING"):
        slurm.queue.clear()
        slurm.queued(0, word, start=began)
        said = "the attempt was interrupted: SIGTERM; Slurm has not ended the job yet"
        assert submitted.said() == ("RUNNING", said)
        assert not should_start(submitted.state())
    slurm.queue.clear()
    slurm.queued(0, "CANCELLED")
    assert submitted.said() == ("CANCELLED", detail)


def test_a_preempted_job_that_does_not_come_back_is_lost_and_not_cancelled(
    submitted: Submitted, slurm: FakeSlurm
) -> None:
    submitted.attempt(outcome="interrupted", ended=time.time() - 20, detail="interrupted: SIGTERM; launch again")
    slurm.queued(0, "PREEMPTED")
    assert submitted.said() == ("LOST(preempted)", "preempted, and not queued again (job 1234_0 on n0: PREEMPTED)")


def _job_log(submitted: Submitted, text: str) -> None:
    folder = submitted.store.launches / LAUNCH / "jobs" / "0"
    folder.mkdir(parents=True)
    (folder / "1234_0_0_log.out").write_text(text)


def test_what_an_earlier_start_left_in_the_log_is_no_reason(submitted: Submitted, slurm: FakeSlurm) -> None:
    requeue = "slurmstepd: error: *** STEP 1235.0 ON n0 CANCELLED AT 2026-01-01T00:00:00 DUE TO JOB REQUEUE ***"
    _job_log(submitted, f"{failures.START}0 of job 1235\nout of memory\n{failures.START}1 of job 1235\n{requeue}\n")
    slurm.accounted(0, "FAILED", "1:0")
    assert submitted.said() == ("FAILED(killed)", "the job failed (job 1234_0 on n0: FAILED, exit code 1:0)")


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("the job could not be requeued: Requested operation is presently disabled; launch again", "TIMEOUT"),
        (
            "the infrastructure ended 10 starts in a row, the last on n0 with exit code 105; launch again",
            "FAILED(node)",
        ),
    ],
)
def test_why_the_batch_shell_gave_up_is_the_reason(
    submitted: Submitted, slurm: FakeSlurm, said: str, label: str
) -> None:
    submitted.attempt(outcome="requeued", ended=time.time() - 60, log="MemoryError")
    _job_log(
        submitted, f"{failures.START}3 of job 1235 on n0\nsrun: error: Task launch failed\n{failures.WORD}{said}\n"
    )
    slurm.accounted(0, "FAILED", "82:0")
    assert submitted.said() == (label, f"{said} (job 1234_0 on n0: FAILED, exit code 82:0)")
    assert should_start(submitted.state())


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


def test_a_crash_between_submitting_and_recording_is_found_by_name(
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
    view = suite_view.views(submitted.store.root, [suite_record(submitted.plan)])[0]
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


def test_accounting_alone_tells_how_a_job_ended(submitted: Submitted, slurm: FakeSlurm) -> None:
    slurm.down()
    slurm.accounted(0, "TIMEOUT")
    slurm.accounted(1, "RUNNING")
    assert submitted.state(0).label == "TIMEOUT"
    assert submitted.state(1).label == "UNKNOWN", "accounting may wait for ever for the end of a forgotten job"
    assert "Slurm said RUNNING" in submitted.state(1).detail


def test_clients_that_hang_are_not_waited_for(
    submitted: Submitted, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_client, "PATIENCE", 0.3)
    for name in ("squeue", "sacct", "scontrol"):
        (slurm.folder / f"{name}.sleep").write_text("60")
    assert submitted.state().state is State.UNKNOWN


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


def test_the_file_systems_clock_is_read_once_for_many_runs(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(4):
        content = {"host": "n7", "machine": "another", "pid": 7, "born": "8", "token": "t", "job_id": "1235"}
        write_json(submitted.run(index).path / "claims" / "1", content)
    monkeypatch.setattr(claims, "_PROBED", {})
    probed = []

    def noted(directory: Path) -> float:
        probed.append(directory)
        return time.time()

    monkeypatch.setattr(claims, "_probed", noted)
    assert {submitted.state(index).state for index in range(4)} == {State.RUNNING}
    assert len(probed) == 1
    late = time.monotonic() + 2 * claims.HEARTBEAT_TIMEOUT
    monkeypatch.setattr(time, "monotonic", lambda: late)
    monkeypatch.setattr(claims, "_probed", lambda directory: time.time() + 2 * claims.HEARTBEAT_TIMEOUT)
    assert claims.holder(submitted.run().path / "claims") is None, "by the file system's clock, not by ours"


def test_claims_on_other_machines_count_by_their_heartbeat(submitted: Submitted) -> None:
    claim = submitted.run().path / "claims" / "1"
    write_json(claim, {"host": "n7", "machine": "another", "pid": 7, "born": "8", "token": "t", "job_id": "1235"})
    assert claims.holder(claim.parent) == 1
    assert submitted.state().state is State.RUNNING
