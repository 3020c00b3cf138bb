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
from experiments.launch import begin as beginning
from experiments.launch import choosing, profiles, smoke
from experiments.runs import cancelling
from experiments.slurm import arrays, code_snapshot, submission
from experiments.slurm import limits as site
from experiments.slurm.arrays import Array
from experiments.slurm.batches import Batch, Target
from experiments.slurm.job import SlurmJob
from experiments.slurm.limits import Limits
from experiments.slurm.report_job import ReportJob
from experiments.status import scheduler, slurm_client, standing
from experiments.store import journal
from experiments.store.files import read_json, write_json
from experiments.store.launches import bad_nodes, deaths, launch_dir
from experiments.store.run_dir import Store
from experiments.suites import catalogue, datasets, planning
from experiments.suites.planning import Plan, Request
from mpformer.runtime.code import ROOT
from mpformer.runtime.errors import RunFailure, UserError
from tests.support import counting_jobs
from tests.support.counting_jobs import plan, profile
from tests.support.executed_runs import execute

NASTY = "a 'b' \"c\"; touch gone $(touch gone) `touch gone` é ☃ &|<>*?~ #"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return counting_jobs.data_root(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_what_does_not_fit_is_launched_from_the_suites_file_as_it_was(
    data: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 12, 3: the last job finds it in the store, whatever becomes of the file and the record meanwhile."""
    made = planning.make(Request("headline"), data)
    assert submission._suites_file(made, store) == ()
    source = catalogue.Source("mine.py", "import this")
    monkeypatch.setitem(catalogue._SOURCES, made.suite.make.__module__, source)
    option, file = submission._suites_file(made, store)
    assert (option, Path(file).read_text()) == ("--suites", "import this")
    assert Path(file).is_relative_to(store.root.resolve())


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH with git alone on it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(str(shutil.which("git")))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


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
    return list(submission.scripts(made, store, Target("test", profile(**keys))))


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
        submission.launch(made, store, Target("test", profile()))
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
    assert done.stdout.splitlines()[1:] == [NASTY, str(folder / "code"), str(folder)], done.stderr
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
    assert code == code_snapshot.take(store) == code_snapshot.folder(store), "one for each state of the code"
    assert read_json(code / "snapshot.json")["sha"]
    show = "import experiments.execution.provenance as p, mpformer, analysis, reports; print(p.__file__, p.git().sha)"
    environment = {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.split() == [
        str(code / "experiments/execution/provenance.py"),
        read_json(code / "snapshot.json")["sha"],
    ]
    run = plan(data).runs[0]
    job = SlurmJob(store.root, "x", Options(data), task=Task(run.run_id, run.eval_id, run.config), code=code)
    with pytest.raises(RunFailure, match="not from the snapshot"):
        job()


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
    found.put(staging.staged(config, data, target))


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
        staging.staged(config, data, "$NO_SUCH_VARIABLE")


def test_the_staged_copy_is_what_the_runner_reads(tmp_path: Path, data: Path, store: Store) -> None:
    made = plan(data)
    (run,) = execute(made, store, Options(data, stage_to=str(tmp_path / "node")), counting_jobs.Counting())
    assert (run.path / "trainings.txt").read_text().startswith(str(tmp_path / "node"))


def test_the_profile_of_the_documentation_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "slurm.md").read_text()
    (content,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "documented.yaml").write_text(content)
    made = profiles.load(str(tmp_path / "documented.yaml"))
    assert isinstance(made, profiles.SlurmProfile)
    assert (made.part("evaluate").gpus, made.part("evaluate").minutes) == (1, 120)


def test_what_does_not_fit_is_launched_as_it_was_asked_for(data: Path, tmp_path: Path) -> None:
    """The last job's arguments resolve to the same runs, whatever is in the overrides."""
    overrides = (("schedule.max_iter", 12), ("model.init_weights", ""), ("model.init_checksum", NASTY + "\n"))
    request = Request("headline", rows=("mp-former",), seeds=(3, 1), overrides=overrides)
    made = planning.make(request, data)
    words = list(submission._arguments(made, Target("mine.yaml", profile(max_submit=5), smoke=True)))
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given["--on"] == str(Path("mine.yaml").resolve())
    assert (given["--parallelism"], given["--max-submit"]) == ("4", "5")
    again = tuple(planning.parse_override(text) for word, text in itertools.pairwise(words) if word == "--set")
    rows = tuple(text for word, text in itertools.pairwise(words) if word == "--row")
    seeds = planning.parse_seeds(given["--seeds"])
    assert [run.run_id for run in planning.make(Request("headline", "mini", None, rows, seeds, again), data).runs] == [
        run.run_id for run in made.runs
    ]
    assert again == overrides


@pytest.mark.parametrize(("left", "again"), [(True, False), (False, True), (True, True)])
def test_the_last_job_launches_what_was_left_over_and_what_was_preempted(
    data: Path, store: Store, monkeypatch: pytest.MonkeyPatch, left: bool, again: bool
) -> None:
    target = Target("mine.yaml", profile(report=True, resubmit=again))
    work = submission._Work(plan(data), store.root, "x", target, ROOT, left_over=left)
    (job,) = work.functions(Batch(1, "report"))
    assert isinstance(job, ReportJob)
    called: list[list[str]] = []

    def run(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        called.append(command[3:])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    job()
    words = [" ".join(command) for command in called if command[0] in ("launch", "retry")]
    assert len(words) == left + again
    assert all("--scale mini --dataset shapes" in line and "--on " in line for line in words)
    assert [line.split()[0] for line in words] == ["launch"] * left + ["retry"] * again
    assert ("--new" in words[0].split()) == left
    assert ("--class preempted" in words[-1]) == again


@pytest.mark.parametrize("begun", [False, True])
def test_a_report_that_waits_waits_for_the_next_launch_too(data: Path, store: Store, shaky: Path, begun: bool) -> None:
    """One a suite, however often it is launched again; one that has begun is followed by another."""
    (shaky / "failures").write_text("0")
    target = Target("test", profile(report=True))
    (shaky / "sbatch").write_text(SBATCH.replace("echo 77", "echo $((76 + $(wc -l < sbatch.calls)))"))
    submission.launch(plan(data, seeds=(0,)), store, target)
    first, report = journal.submissions(store)
    assert (first.job_id, report.job_id) == ("77", "78")
    lines = [f"77_{index}|{79 + index}|RUNNING|None|1767268800|N/A|n0|{first.name}" for index in range(2)]
    state = "RUNNING|None" if begun else "PENDING|Dependency"
    lines.append(f"78_0|78|{state}|1767268800|N/A||{report.name}")
    (shaky / "squeue.out").write_text("\n".join(lines) + "\n")
    submission.launch(plan(data, seeds=(0, 1)), store, target)
    later = [one for one in journal.submissions(store) if one.launch != first.launch]
    asked = (shaky / "scontrol.calls").read_text().splitlines()
    if begun:
        assert [one.stage for one in later] == ["all", "report"]
    else:
        assert [one.stage for one in later] == ["all"]
        assert "update JobId=78 Dependency=afterany:77:79" in asked


def test_a_retry_grows_what_was_short_for_the_runs_that_it_helps(data: Path, store: Store, shaky: Path) -> None:
    (shaky / "failures").write_text("0")
    made = plan(data)
    beginning.record(made, store, "")
    for run, kind in zip(made.unique, ("oom", "timeout", "nan", "oom"), strict=True):
        stage = {"outcome": "failed", "failure_class": kind, "launch": "x", "started": 1.0, "ended": 2.0}
        write_json(store.run(run.run_id).attempt(1).path / "stage.json", stage)
    (shaky / "site.yaml").write_text("{executor: slurm, time: 10, memory: 2GB, report: false}")
    where = ["--on", str(shaky / "site.yaml"), "--root", str(store.root), "--data-root", str(data)]
    done = CliRunner().invoke(cli, ["retry", "headline", "--grow", "memory=1.5,time=3", *where])
    assert done.exit_code == 0, done.output
    found = {}
    for one in journal.submissions(store):
        text = (store.launches / one.launch / "jobs" / "0" / "submission.sh").read_text()
        asked = [line.partition("--")[2] for line in text.splitlines() if "--mem=" in line or "--time=" in line]
        found[tuple(sorted(run.run_id for run in one.runs))] = sorted(asked)
    ids = [run.run_id for run in made.unique]
    assert found == {
        tuple(sorted((ids[0], ids[3]))): ["mem=3072MB", "time=10"],
        (ids[1],): ["mem=2GB", "time=30"],
    }
    nothing = CliRunner().invoke(cli, ["retry", "headline", "--grow", "time=3", "--row", "mp-former", *where])
    assert isinstance(nothing.exception, UserError)
    assert "no failed run to retry of class timeout" in str(nothing.exception)


def test_nodes_are_forgotten_for_the_suites_waiting_jobs(data: Path, store: Store, shaky: Path) -> None:
    (shaky / "failures").write_text("0")
    target = Target("test", profile())
    first = submission.launch(plan(data), store, target).submissions[0]
    launched = launch_dir(store, first.launch)
    line = (
        f"77_0|78|PENDING|BeginTime|1767268800|N/A||{first.name}\n77_1|79|RUNNING|None|1767268800|N/A|n0|{first.name}\n"
    )
    (shaky / "squeue.out").write_text(line)
    launched.deaths_file.write_text("1 78 0 n1 105 9\n2 78 1 n1 105 9\n3 79 0 n2 137 9\n")
    assert bad_nodes(launched.deaths_file) == {"n1": 2}
    assert submission.forget_nodes(plan(data), store, "n9") == 1
    assert bad_nodes(launched.deaths_file) == {}
    assert len(deaths(launched.deaths_file)) == 3, "what counts for no crash loop stays"
    assert "update JobId=77_0 ExcNodeList=n9" in (shaky / "scontrol.calls").read_text().splitlines()


def test_only_new_runs(data: Path, store: Store) -> None:
    made = plan(data)
    assert choosing.only_new(made, store).runs == made.runs
    store.run(made.runs[0].run_id).attempt(1).path.mkdir(parents=True)
    assert choosing.only_new(made, store).runs == made.runs[1:]
    for run in made.runs:
        store.run(run.run_id).attempt(1).path.mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match="launch without --new"):
        choosing.only_new(made, store)


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
    said = {"scontrol": CONFIG, "squeue -h -r -o %q|%a -u": "normal|lab\nlong|lab\nnormal|lab\n"}

    def ask(*command: str, clusters: str | None = "") -> str:
        line = " ".join(command)
        return next(text for words, text in said.items() if line.startswith(words))

    monkeypatch.setattr(slurm_client, "call", ask)
    return said


def test_limits_are_asked_and_can_be_overridden(answers: dict[str, str]) -> None:
    answers["sacctmgr -nP show assoc"] = "|400|normal|normal,long\n"
    answers["sacctmgr -nP show qos"] = "normal|100||\nlong|5||\n"
    assert site.limits(profile()) == Limits("lab", 300, 98, "MaxSubmitPU of QOS normal")
    assert site.limits(profile(qos="long")) == Limits("lab", 300, 4, "MaxSubmitPU of QOS long"), "that of the profile"
    assert site.limits(profile(max_array=50, max_submit=60)) == Limits("lab", 50, 57, "max_submit")
    answers["sacctmgr -nP show qos"] = "normal|||\nlong|5||\n"
    assert site.limits(profile()) == Limits("lab", 300, 397, "GrpSubmitJobs")
    assert site.limits(profile(account="other")) == Limits("lab", 300, 400, "GrpSubmitJobs"), "its jobs alone count"
    answers["scontrol"] = CONFIG.replace(",limits", "").replace(",max_array_tasks=300", "")
    assert site.limits(profile()) == Limits("lab", 500, 9997, "MaxJobCount")


def test_a_controller_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path, store: Store
) -> None:
    counting_jobs.silence(tmp_path / "bin", monkeypatch)
    with pytest.raises(
        UserError, match=r"^Slurm does not answer: .*Unable to contact slurm controller; try again later$"
    ):
        submission.launch(plan(data), store, Target("test", profile()))
    assert journal.submissions(store) == []
    assert {state.label for state in standing.look_at_plan(plan(data), store).values()} == {"PLANNED"}
    note, _ = dry(plan(data), store, data)
    assert "Unable to contact slurm controller" in note


SBATCH = """#!/bin/sh
cd "$(dirname "$0")"
echo call >> sbatch.calls
for script; do :; done
name=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
if [ -e taken ]; then echo "88_0|89|PENDING|None|1767268800|N/A||$name" >> squeue.out; fi
[ "$(wc -l < sbatch.calls)" -gt "$(cat failures)" ] && echo 77 && exit 0
echo "sbatch: error: Batch job submission failed: $(cat said)" >&2
exit 1
"""
TIMED_OUT = "Socket timed out on send/recv operation"


@pytest.fixture
def shaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm whose ``sbatch`` fails as often as the file ``failures`` says, with the words of the file ``said``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    says = {
        "scontrol": 'echo "$@" >> "$0.calls"; echo ClusterName = lab',
        "sacct": "echo 'accounting storage is disabled' >&2; exit 1",
    }
    for name, body in {**says, "squeue": 'cat "$(dirname "$0")/squeue.out"', "sbatch": SBATCH}.items():
        (folder / name).write_text(body if body.startswith("#!") else f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "squeue.out").touch()
    (folder / "said").write_text(TIMED_OUT)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(submission, "PAUSES", (0.01,) * 5)
    monkeypatch.setattr(scheduler, "_CLUSTERS", {})
    return folder


def submitted(data: Path, store: Store, shaky: Path, failures: int) -> tuple[submission.Submitted, int]:
    """What became of a launch of one array, and how often ``sbatch`` was called."""
    (shaky / "failures").write_text(str(failures))
    done = submission.launch(plan(data), store, Target("test", profile()))
    return done, len((shaky / "sbatch.calls").read_text().splitlines())


def test_sbatch_that_fails_for_the_moment_is_tried_again(data: Path, store: Store, shaky: Path) -> None:
    done, calls = submitted(data, store, shaky, failures=5)
    assert (done.problem, done.submissions[0].job_id, calls) == ("", "77", 6)


def test_after_five_further_attempts_it_is_one_line(data: Path, store: Store, shaky: Path) -> None:
    done, calls = submitted(data, store, shaky, failures=6)
    assert (done.problem, calls) == (f"sbatch: Batch job submission failed: {TIMED_OUT}", 6)
    assert done.submissions[0].error == f"Batch job submission failed: {TIMED_OUT}"


RECORDED = """#!/bin/sh
echo "$(basename "$0") $*" >> "$(dirname "$0")/asked"
exec "$0.real" "$@"
"""


def test_every_client_is_called_for_the_profiles_cluster(data: Path, store: Store, shaky: Path) -> None:
    """sacctmgr alone has no such option: it is asked by the cluster's name."""
    (shaky / "scontrol").write_text("#!/bin/sh\necho ClusterName = lab\necho AccountingStorageEnforce = limits\n")
    for name in ("scancel", "sacctmgr"):
        shutil.copy(str(shutil.which("true")), shaky / name)
    for name in ("sbatch", "squeue", "sacct", "scontrol", "scancel", "sacctmgr"):
        (shaky / name).rename(shaky / f"{name}.real")
        (shaky / name).write_text(RECORDED)
        (shaky / name).chmod(0o755)
    (shaky / "failures").write_text("1")
    target = Target("test", profile(report=True, clusters="gpus"))
    submission.launch(plan(data, seeds=(0,)), store, target)
    first, report = journal.submissions(store)
    lines = (f"77_0|78|PENDING|BeginTime|1767268800|N/A||{first.name}", f"77_0|79|PENDING||1|N/A||{report.name}")
    (shaky / "squeue.out").write_text("\n".join(("CLUSTER: gpus", *lines)) + "\n")
    made = plan(data)
    submission.launch(made, store, target)
    launch_dir(store, first.launch).deaths_file.write_text("1 78 0 n1 105 9\n")
    assert submission.forget_nodes(made, store, None) == 1
    assert arrays.refusals(target.profile) == {"runs": "", "report": ""}
    assert cancelling.cancel(store, list(standing.look_at_plan(made, store).values())).jobs
    asked = [line.split() for line in (shaky / "asked").read_text().splitlines()]
    assert {client for client, *_ in asked} == {"sbatch", "squeue", "sacct", "scontrol", "scancel", "sacctmgr"}
    assert {words[2] for words in asked if words[0] == "sbatch"} == {"--parsable", "--test-only"}
    assert {words[-1].partition("=")[0] for words in asked if words[:1] == ["scontrol"]} == {
        "config", "Dependency", "ExcNodeList",
    }  # fmt: skip
    for client, *words in asked:
        if client != "sacctmgr":
            assert words[0] == "--clusters=gpus", (client, words)
        elif "assoc" in words:
            assert "cluster=lab" in words


def test_what_will_not_change_is_tried_once(data: Path, store: Store, shaky: Path) -> None:
    (shaky / "said").write_text("Invalid partition name specified")
    done, calls = submitted(data, store, shaky, failures=1)
    assert (done.problem, calls) == ("sbatch: Batch job submission failed: Invalid partition name specified", 1)


def test_a_batch_that_was_taken_all_the_same_is_found_by_its_name_in_the_same_launch(
    data: Path, store: Store, shaky: Path
) -> None:
    (shaky / "taken").touch()
    done, calls = submitted(data, store, shaky, failures=9)
    assert (done.problem, done.submissions[0].job_id, calls) == ("", "88", 1)


def test_while_nobody_knows_what_became_of_it_a_batch_is_not_submitted_again(
    data: Path, store: Store, shaky: Path
) -> None:
    """squeue is away too: the journal leaves the batch open, and the next launch looks it up."""
    (shaky / "sbatch").write_text(SBATCH.replace("echo call", "rm squeue.out; echo call"))
    done, calls = submitted(data, store, shaky, failures=9)
    assert calls == 1
    assert TIMED_OUT in done.problem
    assert done.submissions[0].unrecorded


def test_a_launch_whose_launcher_died_before_the_report_gets_it_from_the_next(
    data: Path, store: Store, shaky: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, after the jobs that still live, from the snapshot that these run from."""
    (shaky / "failures").write_text("0")
    target = Target("test", profile(report=True))
    real = arrays.submit
    monkeypatch.setattr(beginning, "DOUBT_SECONDS", 0.0)

    def dying(array: Array, functions: Any) -> str:
        if array.count == 1:
            raise KeyboardInterrupt
        return real(array, functions)

    monkeypatch.setattr(arrays, "submit", dying)
    with pytest.raises(KeyboardInterrupt):
        submission.launch(plan(data), store, target)
    monkeypatch.setattr(arrays, "submit", real)
    first = journal.submissions(store)[0]
    (shaky / "squeue.out").write_text(
        "".join(f"77_{index}|{78 + index}|PENDING|None|1767268800|N/A||{first.name}\n" for index in range(4))
    )
    again = submission.launch(plan(data), store, target)
    assert again.started == ()
    array, died, report = journal.submissions(store)
    assert (array.stage, died.stage, report.stage) == ("all", "report", "report")
    assert (died.error is not None, report.job_id, report.launch) == (True, "77", first.launch)
    text = (store.launches / first.launch / "jobs" / "2" / "submission.sh").read_text()
    assert "#SBATCH --dependency=afterany:77" in text.replace("'", "")
    submission.launch(plan(data), store, target)
    assert len(journal.submissions(store)) == 3, "once"
