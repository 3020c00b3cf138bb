"""Launches on a real Slurm: what is submitted runs, once, from its snapshot, and a launcher may die at any moment."""

import getpass
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.launch import begin as beginning
from experiments.launch import costs, machine
from experiments.launch import local as launching
from experiments.launch.begin import recover
from experiments.slurm import arrays, limits, submission
from experiments.slurm.batches import Target
from experiments.slurm.submission import Submitted, launch
from experiments.status import standing
from experiments.status.slurm_client import SlurmError
from experiments.store import journal
from experiments.store.files import read_json
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan
from tests.support import counting_jobs, tiny_jobs
from tests.support.counting_jobs import Counting, plan, profile, trainings

pytestmark = pytest.mark.slurm

NASTY = "a 'b' \"c\"; touch gone $(touch gone) é"


@pytest.fixture(scope="module")
def cluster(shared_devcluster: Callable[..., Any]) -> Any:
    return shared_devcluster("--nodes", "2", "--cpus", "4", "--max-array", "7", accounting=True)


@pytest.fixture(scope="module")
def bare(cluster: Any, shared_devcluster: Callable[..., Any]) -> Any:
    """A second cluster, without accounting."""
    return shared_devcluster("--nodes", "1", "--cpus", "4")


@pytest.fixture(autouse=True)
def _on_the_cluster(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test needs it."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return counting_jobs.data_root(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def go(made: Plan, store: Store, data: Path, runner: Counting | None = None, **keys: Any) -> Submitted:
    smoke = keys.pop("smoke_too", False)
    retry = keys.pop("retry", ())
    target = Target("test", profile(**keys), smoke)
    return launch(made, store, target, command="test", runner=runner or Counting(), retry=retry)


def client(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def until(condition: Callable[[], Any], seconds: float = 600, what: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not happen in time\n{what()}"
        time.sleep(0.3)


def ended(done: Submitted) -> None:
    """Wait until nothing of the launch is in the queue."""
    names = ",".join(one.name for one in done.submissions)
    until(lambda: not client("squeue", "-h", "-n", names), what=lambda: client("squeue") + logs(done))


def logs(done: Submitted) -> str:
    files = sorted(done.directory.glob("jobs/*/*_log.out"))
    return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-1500:]}" for path in files)


def labels(made: Plan, store: Store) -> set[str]:
    return {state.label for state in standing.look_at_plan(made, store).values()}


def test_a_suite_is_queued_and_done_from_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a nasty path, in arrays of at most MaxArraySize, whatever SBATCH_ variables there are."""
    base = tmp_path / NASTY
    data, store = counting_jobs.data_root(base), Store(base / "store")
    made = plan(data, seeds=tuple(range(5)))
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "TERM")
    done = go(made, store, data)
    assert os.environ["SBATCH_PARTITION"] == "nowhere"
    assert [(one.stage, len(one.runs)) for one in done.submissions] == [("all", 5), ("all", 5)]
    assert not any(one.unrecorded for one in done.submissions)
    assert go(made, store, data).started == (), "queued runs are left alone"
    ended(done)
    assert labels(made, store) == {"DONE"}, logs(done)
    assert set(trainings(store).values()) == {1}
    code = read_json(done.directory / "launch.json")["code"]
    assert Path(code).is_relative_to(store.root)
    origin = read_json(store.run(made.runs[0].run_id).attempt(1).path / "provenance.json")
    assert origin["git"]["sha"] == read_json(Path(code) / "snapshot.json")["sha"]
    assert origin["environment"]["OMP_NUM_THREADS"] == "1"
    assert not list(tmp_path.rglob("gone"))
    assert go(made, store, data).started == ()


def test_a_launch_on_this_machine_stays_on_it(data: Path, store: Store) -> None:
    """Although srun is on the PATH."""
    made = plan(data)
    before = client("squeue", "-h", "-t", "all", "-o", "%i")
    started = launching.launch(made, store, width=machine.Width(2, 1), runner=Counting())
    until(lambda: not started.working())
    assert labels(made, store) == {"DONE"}
    assert client("squeue", "-h", "-t", "all", "-o", "%i") == before


def test_the_script_of_a_dry_run_is_the_one_submitted(
    data: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.slurm.submission.new_id", lambda: "20260101-000000-abcdef")
    monkeypatch.setattr("experiments.launch.begin.new_id", lambda: "20260101-000000-abcdef")
    made = plan(data)
    target = Target("test", profile(evaluate={"cpus": 2}, report=True))
    printed = list(submission.scripts(made, store, target))
    assert len(printed) == 3
    done = launch(made, store, target, runner=Counting())
    for number, text in enumerate(printed):
        (path,) = (done.directory / "jobs" / str(number)).glob("submission.sh")
        for one in done.submissions:
            text = text.replace(f"<id of batch {one.batch}>", str(one.job_id))
        assert sorted(path.read_text().replace("'", "").splitlines()) == sorted(text.replace("'", "").splitlines())
    client("scancel", *(str(one.job_id) for one in done.submissions))
    ended(done)


def test_stages_on_other_resources(data: Path, store: Store, tmp_path: Path) -> None:
    """Evaluations follow their own training; a failed training takes its own evaluation along and no other."""
    made = plan(data)
    failing = made.unique[1].run_id
    disk: dict[str, Any] = {"environment": {"NODE_DISK": str(tmp_path / "node's disk")}, "stage_to": "$NODE_DISK/x"}
    done = go(made, store, data, Counting(fail=failing), evaluate={"cpus": 2}, **disk)
    assert [one.stage for one in done.submissions] == ["train", "evaluate"]
    assert done.submissions[0].runs == done.submissions[1].runs
    ended(done)
    states = {run_id: state.label for run_id, state in standing.look_at_plan(made, store).items()}
    assert states.pop(failing) == "FAILED(nan)"
    assert set(states.values()) == {"DONE"}, logs(done)
    attempts = [store.run(run_id).attempts() for run_id in states]
    assert attempts == [[1, 2]] * 3, "one trained, another evaluated"
    roots = {(store.run(run_id).path / "trainings.txt").read_text().strip() for run_id in states}
    assert len(roots) == 1
    assert roots.pop().startswith(str(tmp_path / "node's disk" / "x")), "the dataset was copied to the node's disk"

    for run in made.unique[2:]:
        shutil.rmtree(store.run(run.run_id).evaluation(run.eval_id))
    again = go(made, store, data, evaluate={"cpus": 2}, retry=("nan",))
    assert [(one.stage, len(one.runs)) for one in again.submissions] == [("train", 1), ("evaluate", 1), ("evaluate", 2)]
    ended(again)
    assert labels(made, store) == {"DONE"}, logs(again)
    assert sorted(trainings(store).values()) == [1, 1, 1, 2]


@pytest.mark.parametrize("accounting", [True, False])
def test_a_pending_training_that_is_cancelled_takes_its_evaluation_along(
    data: Path, store: Store, accounting: bool, bare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm forgets a cancelled pending element; what depended on it does not wait for ever, nor is it taken to."""
    if not accounting:
        monkeypatch.setenv("SLURM_CONF", str(bare.conf))
    made = plan(data)
    done = go(made, store, data, Counting(seconds=1), evaluate={}, parallelism=1)
    last = made.unique[-1].run_id
    client("scancel", next(journal.elements(store, [last])).id)
    ended(done)
    assert store.run(last).attempts() == []
    assert {store.run(run.run_id).result(run.eval_id) is not None for run in made.unique[:-1]} == {True}, logs(done)
    again = go(made, store, data)
    assert [run.run_id for run in again.started] == [last], "it is started again, not taken for waiting"
    ended(again)
    assert labels(made, store) == {"DONE"}


def test_a_failed_smoke_run_blocks_the_arrays_and_not_the_report(data: Path, store: Store) -> None:
    made = plan(data)
    done = go(made, store, data, Counting(fail="mp-", only="/smoke/"), smoke_too=True, report=True)
    assert [(one.stage, len(one.runs)) for one in done.submissions] == [("smoke", 2), ("all", 4), ("report", 0)]
    ended(done)
    assert trainings(store) == {}
    assert labels(made, store).isdisjoint({"DONE", "RUNNING", "QUEUED"})
    assert sorted(trainings(Store(done.directory / "smoke")).values()) == [1, 1]
    assert list(done.directory.glob("jobs/2/*_log.out")), "the report came all the same"
    again = go(made, store, data, smoke_too=True)
    ended(again)
    assert labels(made, store) == {"DONE"}, logs(again)


def _race(made: Plan, root: Path, data: Path, barrier: Any, found: Any) -> None:
    barrier.wait()
    done = go(made, Store(root), data, Counting(seconds=1))
    found.put([run.run_id for run in done.started])


def test_eight_launches_at_the_same_moment_submit_each_run_once(data: Path, store: Store) -> None:
    made = plan(data, seeds=tuple(range(4)))
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(8), context.Queue()
    processes = [context.Process(target=_race, args=(made, store.root, data, barrier, found)) for _ in range(8)]
    for process in processes:
        process.start()
    started = [run_id for _ in processes for run_id in found.get(timeout=200)]
    for process in processes:
        process.join()
    assert sorted(started) == sorted(run.run_id for run in made.unique)
    given = [run.run_id for one in journal.submissions(store) for run in one.runs]
    assert sorted(given) == sorted(started), "the journals say the same"
    names = [one.name for one in journal.submissions(store)]
    until(lambda: not client("squeue", "-h", "-n", ",".join(names)))
    assert labels(made, store) == {"DONE"}
    assert set(trainings(store).values()) == {1}


def _killed(made: Plan, root: Path, data: Path, where: str) -> None:
    """A launcher that dies by SIGKILL just before ``sbatch``, or just after it."""
    real = arrays.submit

    def submit(*given: Any) -> str:
        if where == "after":
            real(*given)
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    arrays.submit = submit  # type: ignore[assignment]  # in a process of its own
    go(made, Store(root), data, Counting(seconds=3))


@pytest.mark.parametrize(
    ("where", "accounting"), [("before", True), ("after", True), ("before", False), ("after", False)]
)
def test_a_launcher_killed_around_sbatch_neither_loses_nor_doubles_runs(
    data: Path, store: Store, where: str, accounting: bool, bare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not accounting:
        monkeypatch.setenv("SLURM_CONF", str(bare.conf))
    monkeypatch.setattr(beginning, "DOUBT_SECONDS", 3.0)
    made = plan(data)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(made, store.root, data, where))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (lost,) = journal.submissions(store)
    assert lost.unrecorded
    again = go(made, store, data)
    (first, *_) = journal.submissions(store)
    if where == "after":
        assert first.job_id is not None
        assert again.started == (), "they are in the queue"
        until(lambda: not client("squeue", "-h", "-n", first.name))
    else:
        assert first.error == "the launcher ended before the batch reached Slurm"
        assert len(again.started) == 4
        ended(again)
    assert labels(made, store) == {"DONE"}, "the jobs needed nothing more of the launcher that died"
    assert set(trainings(store).values()) == {1}


def _launcher(made: Plan, root: Path, data: Path) -> None:
    go(made, Store(root), data, Counting(seconds=1))


def test_launchers_killed_at_random_moments(data: Path, store: Store) -> None:
    """However far each of them came, the last one submits what is missing and nothing twice."""
    made = plan(data, seeds=(0, 1, 2))
    chance = random.Random(0)
    for _ in range(6):
        process = multiprocessing.get_context("fork").Process(target=_launcher, args=(made, store.root, data))
        process.start()
        process.join(chance.uniform(0.0, 1.5))
        process.kill()
        process.join()
    go(made, store, data, Counting())
    given = [run.run_id for one in journal.submissions(store) if one.job_id is not None for run in one.runs]
    assert sorted(given) == sorted(run.run_id for run in made.unique)
    names = ",".join(one.name for one in journal.submissions(store))
    until(lambda: not client("squeue", "-h", "-n", names))
    assert labels(made, store) == {"DONE"}
    assert set(trainings(store).values()) == {1}


def test_an_id_that_another_job_has_is_not_taken_for_ours(data: Path, store: Store) -> None:
    """Job numbers start again when a cluster loses its state: batches are known by their name alone."""
    made = plan(data)
    client("sbatch", "-o", "/dev/null", "-J", "stranger", "--hold", "--wrap", "true")
    (stranger,) = client("squeue", "-h", "-n", "stranger", "-o", "%A").split()
    book = journal.of_launch(store, "20260101-000000-aaaaaa")
    runs = tuple(journal.BatchRun(run.run_id, run.eval_id) for run in made.unique)
    name = "headline.20260101-000000-aaaaaa.0"
    book.submitting(journal.Submission(0, "all", name, runs, time.time(), "test", "dev"))
    book.submitted(0, stranger)
    done = go(made, store, data)
    client("scancel", stranger)
    assert len(done.started) == 4
    ended(done)


def test_a_batch_that_slurm_took_although_sbatch_gave_up_is_recorded(
    data: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = arrays.submit

    def submit(*given: Any) -> str:
        real(*given)
        raise SlurmError("sbatch", "Batch job submission failed: Socket timed out on send/recv operation")

    monkeypatch.setattr(arrays, "submit", submit)
    done = go(plan(data), store, data)
    assert done.problem == ""
    assert done.submissions[0].job_id is not None
    ended(done)
    assert labels(plan(data), store) == {"DONE"}


def test_what_slurm_refuses_is_one_line_and_starts_with_the_next_launch(data: Path, store: Store) -> None:
    made = plan(data)
    done = go(made, store, data, partition="nowhere")
    assert (
        done.problem
        == "sbatch: invalid partition specified: nowhere; Batch job submission failed: Invalid partition name specified"
    )
    assert done.submissions[0].error is not None
    assert labels(made, store) == {"PLANNED"}
    again = go(made, store, data)
    assert len(again.started) == 4
    ended(again)
    assert labels(made, store) == {"DONE"}


def test_what_fits_under_a_submit_limit_is_queued_and_the_rest_said(data: Path, store: Store) -> None:
    made = plan(data)
    done = go(made, store, data, Counting(seconds=2), max_submit=3)
    assert (len(done.started), done.left_over, done.limit) == (3, 1, "max_submit")
    ended(done)
    again = go(made, store, data, max_submit=3)
    assert (len(again.started), again.left_over) == (1, 0)
    ended(again)
    assert labels(made, store) == {"DONE"}


def test_the_command_returns_at_once_and_says_what_is_queued(tmp_path: Path, data: Path, store: Store) -> None:
    """The real command, under a profile of its own; a held job stands for a full cluster."""
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({**profile(report=True).model_dump(exclude_unset=True), "sbatch": {"hold": True}}))
    where = ["--root", str(store.root), "--data-root", str(data), "--set", "schedule.max_iter=12", "--seeds", "0"]
    command = [sys.executable, "-m", "experiments.cli.main", "launch", "headline", *where, "--on", str(path)]
    done = subprocess.run([*command, "--parallelism", "1"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "queued 2 runs" in done.stdout
    (first, report) = journal.submissions(store)
    assert f"{first.job_id}  all" in done.stdout
    assert f"{report.job_id}  report" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "nothing to start" in again.stdout
    here = [*command[: command.index("--on")], "--detach", "--no-mlflow"]
    local = subprocess.run(here, capture_output=True, text=True, timeout=100)
    assert "nothing to start" in local.stdout, "this machine leaves alone what is queued there"
    client("scancel", str(first.job_id), str(report.job_id))


def test_limits_of_accounting_are_those_of_this_user(cluster: Any) -> None:
    """Of the real sacctmgr: the cluster does not enforce them, so that the test alone says that it does."""
    user = getpass.getuser()
    client("sacctmgr", "-iQ", "add", "account", "lab", "GrpSubmitJobs=40")
    client("sacctmgr", "-iQ", "add", "user", user, "account=lab", "MaxSubmitJobs=30")
    client("sacctmgr", "-iQ", "modify", "qos", "normal", "set", "MaxSubmitJobsPerUser=20")
    enforced = {"AccountingStorageEnforce": "associations,limits"}
    places = ["normal|lab"] * 5
    found = {name: room for room, name in limits._association_limits(enforced, "dev", places, profile())}
    assert found["MaxSubmitJobs"] == 25
    assert found["MaxSubmitPU of QOS normal"] == 15
    assert limits._association_limits({"AccountingStorageEnforce": "associations"}, "dev", places, profile()) == []
    assert limits.limits(profile()).cluster == "dev"
    assert limits.limits(profile()).array == 6


def test_the_real_thing_from_smoke_runs_to_the_report(tmp_path: Path, store: Store) -> None:
    """Real models, tiny; the last job launches what did not fit, and what the smoke runs took is then expected."""
    made = tiny_jobs.tiny_plan(tmp_path / "data", rows=("mp-former",), seeds=(0, 1))
    path = tmp_path / "my site.yaml"
    keys = {"report": True, "memory": "4GB", "notify": f"tee '{tmp_path}/told of it'"}
    path.write_text(json.dumps(profile(**keys, max_submit=3).model_dump(exclude_unset=True)))
    target = Target(str(path), profile(**keys, max_submit=3), smoke=True)
    done = launch(made, store, target)
    assert (len(done.started), done.left_over) == (1, 1)
    assert [one.stage for one in done.submissions] == ["smoke", "all", "report"]
    ended(done)
    until(lambda: labels(made, store) == {"DONE"}, what=lambda: logs(done))
    assert [one.stage for one in journal.submissions(store)][3:] == ["all", "report"]
    assert list((store.root / "reports").rglob("index.html")), logs(done)
    told = read_json(tmp_path / "told of it")
    assert told["event"] == "ended", "the last job tells that the suite has ended"
    for run in made.unique:
        trained = store.run(run.run_id).trained()
        assert trained is not None
        assert trained.iterations == 24
        shutil.rmtree(store.run(run.run_id).path)
    expected = costs.estimates(made, store, costs.capacity("local", 1))
    sources = {one.source for one in expected.values()}
    assert sources == {f"measured on {path}"}, "by the smoke runs, the others being gone"
    cost = costs.of_plan(expected, expected, costs.capacity("local", 1))
    assert cost.memory is not None
    assert cost.memory > 2**28
    assert any(line.startswith("memory: ") and line.endswith(f"(measured on {path})") for line in cost.lines())


def test_recovery_leaves_open_what_slurm_cannot_be_asked_about(
    data: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(data)
    book = journal.of_launch(store, "20260101-000000-aaaaaa")
    runs = tuple(journal.BatchRun(run.run_id, run.eval_id) for run in made.unique)
    elsewhere = journal.Submission(0, "all", "headline.elsewhere", runs, 0.0, "test", "another")
    book.submitting(elsewhere)
    recover(store)
    assert book.submissions()[0].unrecorded, "the batch is another cluster's"
    counting_jobs.silence(tmp_path / "bin", monkeypatch)
    book.submitting(replace(elsewhere, batch=1, cluster="dev"))
    recover(store)
    assert book.submissions()[1].unrecorded, "nobody answers"
