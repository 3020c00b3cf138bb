"""Profiles: typed, checked before submission, one clear line for a mistake, and never a word to a shell unquoted."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.launch import profiles
from experiments.launch.profiles import LocalProfile, SlurmProfile, minutes, parse
from mpformer.runtime.errors import UserError

SMALL = {"executor": "slurm", "time": 60}


def test_the_projects_own_profiles() -> None:
    assert profiles.names() == ("a100", "devcluster", "local")
    assert profiles.load("local") == LocalProfile(executor="local", threads=1)
    big = profiles.load("a100")
    assert isinstance(big, SlurmProfile)
    assert (big.minutes, big.gpus, big.tasks_per_node) == (2880, 8, 8)
    assert isinstance(profiles.load("devcluster"), SlurmProfile)
    assert profiles.load(str(profiles.FOLDER / "a100.yaml")) == big


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (90, 90), ("90", 90), ("90:30", 91), ("1:30:00", 90), ("0:00:01", 1), ("2-0", 2880), ("2-12", 3600),
        ("2-12:30", 3630), ("2-12:30:00", 3630), ("soon", 0), ("", 0), ("1:2:3:4", 0), ("-5", 0), (True, 0),
    ],
)  # fmt: skip
def test_limits_are_read_as_sbatch_does(limit: Any, expected: int) -> None:
    assert minutes(limit) == expected


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"executor": "pbs"}, "unknown executor 'pbs'; valid: local, slurm"),
        ({"executor": None}, "unknown executor None; valid: local, slurm"),
        ({"partitoin": "gpu"}, r"unknown key 'partitoin'; valid: notify, executor, partition, account"),
        ({"partition": "gpu; rm -rf ~"}, "partition: must be one word"),
        ({"constraint": "$(id)"}, "constraint: must be one word"),
        ({"time": "tomorrow"}, "time: must be minutes"),
        ({"time": 0}, "time: must be minutes"),
        ({"gpus": -1}, "gpus: must be a number, with a type before it"),
        ({"gpus": "many"}, r"gpus: .* such as 8 or a100:4 \(got 'many'\)"),
        ({"gpus": "a100"}, "gpus: must be a number"),
        ({"gpu_option": "gres:gpu"}, "gpu_option: Input should be 'gpus-per-node', 'gpus-per-task' or 'gres'"),
        ({"gpus": 3, "tasks_per_node": 2, "gpu_option": "gpus-per-task"}, r"gpu_option: gpus \(a node's\) must be a"),
        ({"memory": 32}, "memory: must be a number and a unit"),
        ({"time": 2}, r"signal_delay: must be shorter than the limit \(time\), which is 120 s"),
        ({"time": "5:00", "signal_delay": 600}, r"signal_delay: must be shorter than the limit \(time\), which is 300"),
        ({"sbatch": {"array": "0-3"}}, "sbatch: array is the launcher's own and cannot be set; leave it out"),
        ({"sbatch": {"dependency": "singleton"}}, "sbatch: dependency is the launcher's own"),
        ({"sbatch": {"output": "x.txt"}}, "sbatch: output is the launcher's own"),
        ({"sbatch": {"signal": "USR1@60"}}, "sbatch: signal is the launcher's own"),
        ({"sbatch": {"mem": "3GB"}}, "sbatch: mem has a key of its own: memory"),
        ({"memory": "32"}, "memory: must be a number and a unit, such as 32GB"),
        ({"setup": ["one\ntwo"]}, "setup.0: must be one line"),
        ({"environment": {"A B": "1"}}, "environment: 'A B' is not a variable's name"),
        ({"parallelism": 0}, "parallelism: "),
    ],
)
def test_mistakes_are_one_line(change: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=f"^here: {line}") as caught:
        parse({**SMALL, **change}, "here")
    assert "\n" not in str(caught.value)


def test_a_limit_in_a_file_is_not_a_number_to_the_base_of_sixty(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "executor: slurm\ntime: 1:30:00\ncpus: 4\nsbatch: {priority: 10, hold: true}\nsmoke: {time: 0:10:00}\n"
    )
    profile = profiles.load(str(path))
    assert isinstance(profile, SlurmProfile)
    assert (profile.minutes, profile.part("smoke").minutes, profile.cpus) == (90, 10, 4)
    assert profile.sbatch == {"priority": 10, "hold": True}


def test_missing_keys_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="here: time: Field required"):
        parse({"executor": "slurm"}, "here")
    with pytest.raises(UserError, match="unknown profile 'a1000'; valid: a100, devcluster, local, or the path"):
        profiles.load("a1000")
    broken = tmp_path / "broken.yaml"
    broken.write_text("executor: [")
    with pytest.raises(UserError, match="is not YAML"):
        profiles.load(str(broken))
    broken.write_text("just text")
    with pytest.raises(UserError, match="must hold keys and values"):
        profiles.load(str(broken))


def script(profile: LocalProfile | SlurmProfile, folder: Path) -> str:
    """The batch script that submitit writes for a profile."""
    from submitit.slurm.slurm import _make_sbatch_string

    assert isinstance(profile, SlurmProfile)
    return str(_make_sbatch_string("python -V", folder, **profile.submitit()))


def test_the_script_that_submitit_makes(tmp_path: Path) -> None:
    asked = {
        "partition": "gpu", "account": "lab", "qos": "high", "constraint": "a100&ib", "time": "1-00:00:00", "nodes": 2,
        "gpus": 4, "tasks_per_node": 4, "cpus": 6, "memory": "100GB", "modules": ["cuda/13.0"],
        "setup": ["ulimit -n 4096"], "container": "/images/a.sqsh", "environment": {"WHERE": "here"},
        "sbatch": {"no-requeue": True, "licenses": "x:1"},
    }  # fmt: skip
    lines = script(parse({**SMALL, **asked}, "here"), tmp_path).splitlines()
    for option in (
        "partition=gpu", "account=lab", "qos=high", "constraint='a100&ib'", "time=1440", "nodes=2", "gpus-per-node=4",
        "ntasks-per-node=4", "cpus-per-task=6", "mem=100GB", "signal=USR2@120", "licenses=x:1", "no-requeue",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines
    assert lines.index("export WHERE=here") < lines.index("module load cuda/13.0") < lines.index("ulimit -n 4096")
    assert "export OMP_NUM_THREADS=6" in lines
    assert "--cpus-per-task=6" in lines[lines.index("export SUBMITIT_EXECUTOR=slurm") + 1]
    assert "--container-image=/images/a.sqsh" in lines[lines.index("export SUBMITIT_EXECUTOR=slurm") + 1]
    assert not any(line.startswith("#SBATCH --error") for line in lines)
    assert not any("wckey" in line for line in lines), "submitit's own key is refused where keys are enforced"


def test_apptainer_runs_the_jobs_python_in_its_image() -> None:
    keys = {"container": "/my images/a.sif", "container_runtime": "apptainer", "container_mounts": "/data,/scratch:/s"}
    made = parse({**SMALL, **keys, "python": "/opt/conda/bin/python", "gpus": 1}, "here")
    assert isinstance(made, SlurmProfile)
    command = "apptainer exec --nv --bind /data --bind /scratch:/s '/my images/a.sif' /opt/conda/bin/python"
    assert made.interpreter == command
    assert not any("container" in word for word in made.srun_arguments)


def test_what_is_preempted_is_launched_again_by_the_last_job_alone() -> None:
    with pytest.raises(UserError, match="resubmit is done by the last job"):
        parse({**SMALL, "resubmit": True, "report": False}, "here")


@pytest.mark.parametrize(
    ("memory", "factor", "expected"),
    [("32GB", 1.5, "49152MB"), ("500M", 2, "1024000K"), ("1T", 1.25, "1280G"), ("3GB", 1.1, "3380MB")],
)
def test_memory_grows_by_its_factor(memory: str, factor: float, expected: str) -> None:
    made = parse({**SMALL, "memory": memory, "evaluate": {"memory": memory}}, "here")
    assert isinstance(made, SlurmProfile)
    grown = made.grown("memory", factor)
    assert (grown.memory, grown.part("evaluate").memory) == (expected, expected)
    assert parse({**SMALL, "memory": expected}, "here"), "as a profile may say it"


def test_time_grows_and_what_cannot_grow_says_so() -> None:
    made = parse({**SMALL, "time": "1:30:00", "evaluate": {"time": 7}}, "here")
    assert isinstance(made, SlurmProfile)
    assert (made.grown("time", 1.5).minutes, made.grown("time", 1.5).part("evaluate").minutes) == (135, 11)
    with pytest.raises(UserError, match="memory is not given: there is nothing to grow"):
        made.grown("memory", 2)
    assert profiles.growth("memory=1.5,time=2") == {"memory": 1.5, "time": 2.0}
    for text, line in (("gpus=2", "unknown key to grow 'gpus'"), ("time=1", "above 1"), ("time", "above 1")):
        with pytest.raises(UserError, match=line):
            profiles.growth(text)


def gpu_lines(made: SlurmProfile, folder: Path) -> list[str]:
    return [line for line in script(made, folder).splitlines() if line.startswith("#SBATCH --g")]


@pytest.mark.parametrize(
    ("keys", "option"),
    [
        ({"gpus": 4}, "gpus-per-node=4"),
        ({"gpus": "a100:4"}, "gpus-per-node=a100:4"),
        ({"gpus": "a100:4", "gpu_option": "gres"}, "gres=gpu:a100:4"),
        ({"gpus": 4, "gpu_option": "gres"}, "gres=gpu:4"),
        ({"gpus": "a100:4", "tasks_per_node": 4, "gpu_option": "gpus-per-task"}, "gpus-per-task=a100:1"),
    ],
)
def test_gpus_in_the_form_that_the_site_takes(keys: dict[str, Any], option: str, tmp_path: Path) -> None:
    profile = parse({**SMALL, **keys}, "here")
    assert isinstance(profile, SlurmProfile)
    assert gpu_lines(profile, tmp_path) == [f"#SBATCH --{option}"]
    assert profile.gpu_count == 4
    assert gpu_lines(profile.part("report"), tmp_path) == []


def test_all_memory_of_a_node(tmp_path: Path) -> None:
    profile = parse({**SMALL, "memory": 0}, "here")
    assert "#SBATCH --mem=0" in script(profile, tmp_path).splitlines()
    assert isinstance(profile, SlurmProfile)
    assert profile.part("report").memory == "4GB"


def test_a_report_takes_no_whole_nodes() -> None:
    profile = parse({**SMALL, "sbatch": {"exclusive": True, "gres": "gpu:8", "licenses": "x:1"}}, "here")
    assert isinstance(profile, SlurmProfile)
    assert profile.part("report").sbatch == {"licenses": "x:1"}
    assert profile.part("smoke").sbatch == profile.sbatch


def test_preempted_jobs_come_back_unless_the_profile_says_no(tmp_path: Path) -> None:
    assert "#SBATCH --requeue" in script(parse(SMALL, "here"), tmp_path).splitlines()
    lines = script(parse({**SMALL, "sbatch": {"no-requeue": True}}, "here"), tmp_path).splitlines()
    assert "#SBATCH --requeue" not in lines


def test_other_kinds_of_jobs_have_the_profiles_resources_but_for_their_section() -> None:
    asked = {
        "partition": "gpu",
        "gpus": 8,
        "tasks_per_node": 8,
        "nodes": 2,
        "cpus": 6,
        "memory": "100GB",
        "time": "2-0",
    }
    sections = {"evaluate": {"gpus": 1, "tasks_per_node": 1, "nodes": 1}, "report": {"partition": "cpu", "cpus": 4}}
    profile = parse({**SMALL, **asked, **sections}, "here")
    assert isinstance(profile, SlurmProfile)
    evaluate, report, smoke = (profile.part(name) for name in profiles.PARTS)
    assert (evaluate.gpus, evaluate.cpus, evaluate.minutes, evaluate.memory) == (1, 6, 2880, "100GB")
    assert (report.partition, report.gpus, report.cpus, report.minutes, report.memory) == ("cpu", 0, 4, 30, "4GB")
    assert (smoke.partition, smoke.gpus, smoke.nodes, smoke.minutes) == ("gpu", 8, 2, 30)
    assert smoke.evaluate is None


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"evaluate": {"gpu": 1}}, "here: evaluate: unknown key 'gpu'; valid: "),
        ({"smoke": {"time": 0}}, "here: smoke: time: must be minutes"),
        ({"report": {"smoke": {}}}, "here: report: unknown key 'smoke'; valid: "),
        ({"evaluate": 3}, "here: evaluate: "),
    ],
)
def test_mistakes_in_sections_are_one_line(section: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}") as caught:
        parse({**SMALL, **section}, "here")
    assert "\n" not in str(caught.value)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40))
def test_no_value_of_the_environment_reaches_the_shell(value: str) -> None:
    """Spaces, quotes, newlines, `;`, `$()` and unicode arrive as they are."""
    profile = parse({**SMALL, "environment": {"VALUE": value}}, "here")
    assert isinstance(profile, SlurmProfile)
    line = profile.setup_lines[-1]
    assert shlex.split(line) == ["export", f"VALUE={value}"]


def test_a_nasty_value_in_a_real_shell() -> None:
    value = "a 'b' \"c\"; touch /nonexistent/x $(id) `id` \\ é\nnext"
    profile = parse({**SMALL, "environment": {"VALUE": value}}, "here")
    assert isinstance(profile, SlurmProfile)
    done = subprocess.run(
        ["bash", "-c", profile.setup_lines[-1] + '\nprintf %s "$VALUE"'], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (value, "")


def test_an_unknown_key_is_named_before_a_missing_one() -> None:
    """Issue 12, 5.10: a misspelt key is what is missing."""
    with pytest.raises(UserError, match=r"here: unknown key 'tme'; valid: .*time"):
        parse({"executor": "slurm", "tme": 10}, "here")
    with pytest.raises(UserError, match="here: time: Field required"):
        parse({"executor": "slurm"}, "here")
