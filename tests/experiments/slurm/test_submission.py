"""What a launch would submit, without Slurm: arrays under the limits, scripts, and nothing a shell could misread."""

import itertools
import multiprocessing
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from experiments.cli.main import cli
from experiments.execution import staging
from experiments.execution.attempt import Options
from experiments.execution.worker import Task
from experiments.launch import local, profiles, smoke
from experiments.slurm import arrays, code_snapshot, reservations, submission
from experiments.slurm import limits as site
from experiments.slurm.arrays import Array
from experiments.slurm.job import SlurmJob
from experiments.slurm.limits import Limits
from experiments.slurm.submission import Target, divide
from experiments.store import journal
from experiments.store.files import read_json, write_json
from experiments.store.run_dir import Store
from experiments.suites import datasets, planning
from experiments.suites.planning import Plan, Request
from mpformer.runtime.errors import RunFailure, UserError
from tests.support import counting_jobs
from tests.support.counting_jobs import plan, profile

NASTY = "a 'b' \"c\"; touch gone $(touch gone) `touch gone` é ☃ &|<>*?~ #"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return counting_jobs.data_root(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH with git alone on it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(str(shutil.which("git")))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def shape(made: Plan, store: Store, limits: Limits, **keys: Any) -> list[tuple[Any, ...]]:
    """Stage, runs, dependencies and cap of each array."""
    smoke_too = keys.pop("smoke_too", False)
    batches, _ = divide(made.unique, store, Target("test", profile(**keys), smoke_too), limits)
    return [(one.stage, len(one.runs), one.after, one.parallelism) for one in batches]


def train(store: Store, made: Plan, count: int) -> None:
    for run in made.unique[:count]:
        write_json(store.run(run.run_id).path / "trained.json", {"weights_sha256": "x", "weights": "w"})


def test_one_array_by_default_and_a_report_after_everything(data: Path, store: Store) -> None:
    made = plan(data, seeds=(0, 1, 2))
    assert shape(made, store, Limits(array=1000), parallelism=3) == [("all", 6, (), 3)]
    (_, report) = shape(made, store, Limits(array=1000), report=True)
    assert report == ("report", 0, (("afterany", (0,)),), 1)


def test_arrays_stay_under_the_sites_size_and_the_cap_is_shared(data: Path, store: Store) -> None:
    made = plan(data, seeds=tuple(range(5)))
    assert shape(made, store, Limits(array=4), parallelism=8) == [
        ("all", 4, (), 3), ("all", 4, (), 3), ("all", 2, (), 2),
    ]  # fmt: skip
    few = shape(made, store, Limits(array=3), parallelism=2)
    assert [one[2] for one in few] == [(), (), (("afterany", (0,)),), (("afterany", (1,)),)], "two at a time in all"
    assert sum(one[1] for one in few) == 10


def test_split_stages_pair_arrays_over_identical_indices(data: Path, store: Store) -> None:
    made = plan(data, seeds=(0, 1, 2))
    train(store, made, 2)
    target = Target("test", profile(evaluate={"gpus": 1, "parallelism": 6}))
    batches, left = divide(made.unique, store, target, Limits(array=2))
    assert left == ()
    assert [(one.stage, one.after, len(one.runs)) for one in batches] == [
        ("train", (), 2), ("evaluate", (("aftercorr", (0,)),), 2),
        ("train", (), 2), ("evaluate", (("aftercorr", (2,)),), 2),
        ("evaluate", (), 2),
    ]  # fmt: skip
    assert batches[0].runs == batches[1].runs
    assert batches[2].runs == batches[3].runs
    assert batches[4].runs == made.unique[:2], "what is trained waits for nothing"


def test_everything_waits_for_the_smoke_runs(data: Path, store: Store) -> None:
    made = plan(data, seeds=(0, 1, 2))
    train(store, made, 1)
    found = shape(made, store, Limits(array=1000), smoke_too=True, evaluate={}, report=True)
    assert [one[:3] for one in found] == [
        ("smoke", 2, ()),
        ("train", 5, (("afterok", (0,)),)),
        ("evaluate", 5, (("aftercorr", (1,)),)),
        ("evaluate", 1, (("afterok", (0,)),)),
        ("report", 0, (("afterany", (0, 1, 2, 3)),)),
    ]


@pytest.mark.parametrize(("room", "started"), [(0, 0), (1, 0), (2, 1), (3, 2), (6, 5), (7, 6), (100, 6)])
def test_what_does_not_fit_under_the_submit_limit_is_left_over(
    data: Path, store: Store, room: int, started: int
) -> None:
    made = plan(data, seeds=(0, 1, 2))
    batches, left = divide(made.unique, store, Target("t", profile(report=True)), Limits(submit=room))
    assert sum(one.count for one in batches) <= room
    assert sum(len(one.runs) for one in batches) == started
    assert len(left) == 6 - started


def test_trained_runs_go_first_where_room_is_short_and_a_fresh_one_needs_two_jobs(data: Path, store: Store) -> None:
    made = plan(data, seeds=(0, 1, 2))
    train(store, made, 2)
    batches, left = divide(made.unique, store, Target("t", profile(evaluate={})), Limits(submit=5))
    assert [(one.stage, len(one.runs)) for one in batches] == [("train", 1), ("evaluate", 1), ("evaluate", 2)]
    assert len(left) == 3


def test_a_smoke_run_is_short_and_one_a_row(data: Path) -> None:
    made = plan(data, seeds=(0, 1, 2), schedule__max_iter=300)
    short = smoke.runs(made.unique)
    assert [run.row.name for run in short] == [row.name for row in made.rows]
    for run in short:
        assert (run.config.schedule.max_iter, run.config.evaluation.val_images) == (30, 8)
        assert run.run_id not in {other.run_id for other in made.unique}
    (tiny, *_) = smoke.runs(plan(data, schedule__max_iter=7).unique)
    assert tiny.config.schedule.max_iter == 7


def dry(made: Plan, store: Store, data: Path, **keys: Any) -> list[str]:
    return list(submission.scripts(made, store, data, Target("test", profile(**keys))))


def test_a_dry_run_prints_the_scripts_and_writes_nothing(data: Path, store: Store, no_slurm: None) -> None:
    note, text, evaluate, report = dry(plan(data), store, data, evaluate={"partition": "small"}, report=True)
    assert not store.root.exists()
    assert note.startswith("# arrays of up to 1000 jobs, Slurm's default: no Slurm here")
    lines = text.splitlines()
    for line in ("array=0-3%4", "partition=main", "time=10", "mem=1GB", "requeue", "signal=USR2@120"):
        assert f"#SBATCH --{line}" in lines
    assert "#SBATCH --dependency='aftercorr:<id of batch 0>'" in evaluate
    assert "#SBATCH --kill-on-invalid-dep=yes" in evaluate
    assert "#SBATCH --partition=small" in evaluate
    assert "#SBATCH --dependency='afterany:<id of batch 0>:<id of batch 1>'" in report
    assert "#SBATCH --time=10" in report
    assert not any("wckey" in line or "submitit" in line for line in lines if line.startswith("#SBATCH"))


def test_dry_run_of_the_command(data: Path, tmp_path: Path, no_slurm: None) -> None:
    where = ["--root", str(tmp_path / "s"), "--data-root", str(data), "--set", "schedule.max_iter=12"]
    done = CliRunner().invoke(cli, ["launch", "headline", "--on", "devcluster", "--dry-run", *where])
    assert done.exit_code == 0, done.output
    assert done.output.count("#!/bin/bash") == 2
    assert not (tmp_path / "s").exists()
    for arguments, line in (
        (["--dry-run"], "profile 'local' has none"),
        (["--on", "devcluster"], "no Slurm here: sbatch is not on the PATH; launch from a login node"),
        (
            ["--on", "devcluster", "--workers", "2"],
            "--workers does not apply to profile 'devcluster'; use --parallelism",
        ),
        (["--parallelism", "2"], "--parallelism does not apply to profile 'local'; use --workers"),
        (["--smoke"], "--smoke is for jobs in a queue"),
        (["--on", "nowhere"], "unknown profile 'nowhere'; valid: a100, devcluster, local"),
    ):
        done = CliRunner().invoke(cli, ["launch", "headline", *arguments, *where])
        assert isinstance(done.exception, UserError)
        assert line in str(done.exception)
        assert "\n" not in str(done.exception)


def test_without_the_dataset_the_line_says_so(
    tmp_path: Path, store: Store, no_slurm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "require", lambda: None)
    made = plan(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"shapes .* is not under"):
        submission.launch(made, store, tmp_path / "nothing", Target("test", profile()))
    missing, _, script = dry(made, store, tmp_path / "nothing")
    assert missing.startswith("# missing: shapes ")
    assert script.startswith("#!/bin/bash")
    assert not store.root.exists()


def array(folder: Path, name: str = "suite.x.0", **keys: Any) -> Array:
    return Array(profile(**keys), name, 2, folder, folder / "code")


def test_no_name_or_override_reaches_the_shell_unquoted(tmp_path: Path, data: Path) -> None:
    """Nasty folders, environments and comments: the real bash of the script makes nothing of them."""
    folder = tmp_path / NASTY.replace("/", "")
    folder.mkdir()
    text = arrays.script(array(folder, environment={"VALUE": NASTY}, comment=NASTY, python=f"/opt/{NASTY}/python"))
    body = "\n".join(line for line in text.splitlines() if not line.startswith("srun "))
    (command,) = [line for line in text.splitlines() if line.startswith("srun ")]
    assert f"/opt/{NASTY}/python" in shlex.split(command)
    assert str(folder) in shlex.split(command)
    show = body.replace("# teardown", 'printf "%s\\n" "$VALUE" "$PYTHONPATH" "$jobs"\n# teardown')
    environment = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", show], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == [NASTY, str(folder / "code"), str(folder)], done.stderr
    assert (folder / "7_1_submitted.pkl").is_symlink()
    assert not list(tmp_path.rglob("gone"))


def test_row_names_and_overrides_travel_in_pickles_alone(data: Path, store: Store, no_slurm: None) -> None:
    made = plan(data)
    nasty = replace(made, suite=replace(made.suite, name=NASTY + "\n$(id)"))
    _, text = dry(nasty, store, data)
    name = next(line for line in text.splitlines() if "--job-name" in line)
    assert set(name.removeprefix("#SBATCH --job-name=")) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"
    )
    assert "touch" not in text.replace(name, "")


@pytest.mark.parametrize("name", ["100%j", "back\\slash", "new\nline"])
def test_roots_that_slurm_would_misread_are_refused(name: str, tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match="choose another --root") as caught:
        dry(plan(data), Store(tmp_path / name), data)
    assert "\n" not in str(caught.value)


def test_the_snapshot_is_the_code_and_jobs_that_run_other_code_fail(store: Store, data: Path) -> None:
    code = code_snapshot.take(store)
    assert code == code_snapshot.take(store) == code_snapshot.place(store), "one for each state of the code"
    assert read_json(code / "snapshot.json")["sha"]
    show = (
        "import experiments.execution.provenance as p, mpformer, analysis, reports; print(p.__file__, p.git()['sha'])"
    )
    environment = {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", show], capture_output=True, text=True, env=environment, cwd=code_snapshot.ROOT
    )
    assert done.stdout.split() == [
        str(code / "experiments/execution/provenance.py"),
        read_json(code / "snapshot.json")["sha"],
    ]
    run = plan(data).runs[0]
    job = SlurmJob(store.root, "x", Task(run.run_id, run.eval_id, run.config), Options(data), code=code)
    with pytest.raises(RunFailure, match="not from the snapshot"):
        job()


def _reserve(root: Path, run_ids: list[str], barrier: Any, found: Any, name: str) -> None:
    barrier.wait()
    found.put([run_id for run_id in run_ids if reservations.reserve(Store(root).run(run_id), name, lambda _: True)])


def test_eight_processes_reserve_each_run_once(tmp_path: Path) -> None:
    run_ids = [f"run-{number}" for number in range(50)]
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(8), context.Queue()
    processes = [
        context.Process(target=_reserve, args=(tmp_path, run_ids, barrier, found, f"launch-{number}"))
        for number in range(8)
    ]
    for process in processes:
        process.start()
    taken = [run_id for _ in processes for run_id in found.get(timeout=60)]
    for process in processes:
        process.join()
    assert sorted(taken) == sorted(run_ids)


def test_a_dead_reservation_is_taken_over_once(tmp_path: Path) -> None:
    run = Store(tmp_path).run("run")
    assert reservations.reserve(run, "first", lambda _: False)
    assert not reservations.reserve(run, "second", lambda launch: launch == "first")
    assert reservations.reserve(run, "second", lambda launch: launch != "first")
    assert not reservations.reserve(run, "third", lambda launch: launch == "second")
    (run.path / "reservations" / "3").touch()
    assert not reservations.reserve(run, "third", lambda _: False), "one that is just being written holds"


def _announce(root: Path, ready: Any) -> None:
    with reservations.Launching(Store(root), "theirs"):
        ready.put(True)
        ready.close()
        import time

        time.sleep(600)


def test_a_launcher_holds_its_runs_until_it_is_over_or_dead(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert not reservations.launching(store, "ours")
    with reservations.Launching(store, "ours"):
        assert reservations.launching(store, "ours")
    assert not reservations.launching(store, "ours")
    context = multiprocessing.get_context("fork")
    ready = context.Queue()
    process = context.Process(target=_announce, args=(tmp_path, ready))
    process.start()
    assert ready.get(timeout=60)
    assert reservations.launching(store, "theirs")
    process.kill()
    process.join()
    assert not reservations.launching(store, "theirs")


def test_weights_with_an_address_are_fetched_once_here(tmp_path: Path, data: Path) -> None:
    there = tmp_path / "there" / "R-50.pkl"
    there.parent.mkdir()
    there.write_bytes(b"weights")
    address = there.as_uri()
    config = plan(data).base.replace({"model.init_weights": address})
    assert "`launch` fetches them" in datasets.resolve_weights(config, data)[1]
    assert datasets.fetch_weights([address, address, "", "local.pkl"], data) == [data / "weights" / "R-50.pkl"]
    found, missing = datasets.resolve_weights(config, data)
    assert missing == ""
    assert found.model.init_weights == str(data / "weights" / "R-50.pkl")
    there.unlink()
    assert datasets.fetch_weights([address], data) == []
    with pytest.raises(UserError, match=r"cannot fetch file:.*put the file at") as caught:
        datasets.fetch_weights([(tmp_path / "nowhere.pkl").as_uri()], data)
    assert "\n" not in str(caught.value)
    assert {path.name for path in (data / "weights").iterdir()} == {"R-50.pkl"}


def _stage(config: Any, data: Path, target: str, found: Any) -> None:
    found.put(staging.stage(config, data, target))


def test_a_dataset_is_staged_once_a_node(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "node disk"))
    config = plan(data).base
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    processes = [context.Process(target=_stage, args=(config, data, "$NODE_DISK/x", found)) for _ in range(4)]
    for process in processes:
        process.start()
    (root,) = {found.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert root.is_relative_to(tmp_path / "node disk" / "x")
    assert datasets.folder(config, root).joinpath("manifest.json").is_file()
    assert len(list(datasets.folder(config, root).parent.iterdir())) == 1, "no copies half done are left"
    with pytest.raises(RunFailure, match="names a variable that this node does not have"):
        staging.stage(config, data, "$NO_SUCH_VARIABLE")


def test_the_staged_copy_is_what_the_runner_reads(tmp_path: Path, data: Path, store: Store) -> None:
    made = plan(data)
    run = store.run(made.runs[0].run_id)
    run.create(made.runs[0].config, "row")
    runner = staging.Staged(str(tmp_path / "node"), counting_jobs.Counting())
    runner.train(made.runs[0].config, run.path, data, None)  # type: ignore[arg-type]
    assert (run.path / "trainings.txt").read_text().startswith(str(tmp_path / "node"))


def test_the_profile_of_the_documentation_is_valid(tmp_path: Path) -> None:
    text = (code_snapshot.ROOT / "docs" / "slurm.md").read_text()
    (content,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "documented.yaml").write_text(content)
    made = profiles.load(str(tmp_path / "documented.yaml"))
    assert isinstance(made, profiles.SlurmProfile)
    assert (made.part("evaluate").gpus, made.part("evaluate").minutes) == (1, 120)


def test_what_does_not_fit_is_launched_as_it_was_asked_for(data: Path, tmp_path: Path) -> None:
    """The last job's arguments resolve to the same runs, whatever is in the overrides."""
    overrides = (("schedule.max_iter", 12), ("model.init_weights", ""), ("runtime.device", NASTY + "\n"))
    request = Request("headline", rows=("mp-former",), seeds=(3, 1), overrides=overrides)
    made = planning.make(request, data)
    words = list(submission._arguments(made, data, Target("mine.yaml", profile(max_submit=5), smoke=True)))
    given = dict(zip(words[1::2], words[2::2], strict=True))
    assert words[0] == "--new"
    assert given["--on"] == str(Path("mine.yaml").resolve())
    assert (given["--parallelism"], given["--max-submit"]) == ("4", "5")
    again = tuple(planning.parse_override(text) for word, text in itertools.pairwise(words) if word == "--set")
    rows = tuple(text for word, text in itertools.pairwise(words) if word == "--row")
    seeds = planning.parse_seeds(given["--seeds"])
    assert [run.run_id for run in planning.make(Request("headline", "mini", None, rows, seeds, again), data).runs] == [
        run.run_id for run in made.runs
    ]
    assert again == overrides


def test_only_new_runs(data: Path, store: Store) -> None:
    made = plan(data)
    assert local.only_new(made, store).runs == made.runs
    store.run(made.runs[0].run_id).attempt(1).mkdir(parents=True)
    assert local.only_new(made, store).runs == made.runs[1:]
    for run in made.runs:
        store.run(run.run_id).attempt(1).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match="launch without --new"):
        local.only_new(made, store)


CONFIG = """Configuration data as of 2026
ClusterName             = lab
MaxArraySize            = 501
MaxJobCount             = 10000
SchedulerParameters     = bf_interval=5,max_array_tasks=300
AccountingStorageEnforce = associations,limits,qos
"""


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the clients print, by the first words that match."""
    said = {"scontrol": CONFIG, "squeue -h -r -o %i -u": "1\n2\n3\n", "squeue": "1\n2\n3\n4\n"}

    def ask(*command: str) -> str:
        line = " ".join(command)
        return next(text for words, text in said.items() if line.startswith(words))

    monkeypatch.setattr(site, "ask", ask)
    return said


def test_limits_are_asked_and_can_be_overridden(answers: dict[str, str]) -> None:
    answers["sacctmgr -nP show assoc"] = "|400|normal|normal,long\n"
    answers["sacctmgr -nP show qos"] = "normal|100||\nlong|5||\n"
    assert site.limits() == Limits("lab", 300, 97, "MaxSubmitPU of QOS normal")
    assert site.limits(max_array=50, max_submit=60) == Limits("lab", 50, 57, "max_submit")
    answers["sacctmgr -nP show qos"] = "normal|||\nlong|5||\n"
    assert site.limits() == Limits("lab", 300, 397, "GrpSubmitJobs")
    answers["scontrol"] = CONFIG.replace(",limits", "").replace(",max_array_tasks=300", "")
    assert site.limits() == Limits("lab", 500, 9996, "MaxJobCount")


def test_a_controller_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path, store: Store
) -> None:
    counting_jobs.silence(tmp_path / "bin", monkeypatch)
    with pytest.raises(
        UserError, match=r"^Slurm does not answer: .*Unable to contact slurm controller; try again later$"
    ):
        submission.launch(plan(data), store, data, Target("test", profile()))
    assert journal.submissions(store) == []
    assert {state.label for state in planning.states(plan(data), store).values()} == {"PLANNED"}
    note, _ = dry(plan(data), store, data)
    assert "Unable to contact slurm controller" in note
