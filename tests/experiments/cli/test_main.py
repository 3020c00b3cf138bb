import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import main
from experiments.execution import attempt
from experiments.launch import begin
from experiments.store import claims, files
from experiments.store.files import read_json, write_json
from experiments.store.run_dir import RunDir, Store
from experiments.suites.planning import Plan

HEAVY = ("torch", "detectron2", "pandas", "mlflow", "matplotlib", "submitit", "cv2")
Make = Callable[..., Any]


class Result:
    """What a command printed and returned."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, data_root: Path
) -> Callable[..., Result]:
    """Execute the command in this process."""
    monkeypatch.setenv("MPFORMER_ROOT", str(tmp_path / "store"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data_root))
    monkeypatch.setenv("COLUMNS", "200")

    def execute(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["mpformer", *arguments])
        with pytest.raises(SystemExit) as end:
            main.main()
        printed = capsys.readouterr()
        return Result(int(end.value.code or 0), printed.out, printed.err)

    return execute


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch, counter: Make) -> None:
    """Put the counter in the trainer's place, for commands that execute runs in this process."""
    monkeypatch.setattr(attempt, "Model", counter)


SHORT = ("--set", "schedule.max_iter=12")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "headlin"], "unknown suite 'headlin'; valid: headline, components"),
        (["launch", "headlin"], "unknown suite 'headlin'; valid: headline, components"),
        (["report", "headlin"], "unknown suite 'headlin'; valid: headline, components"),
        (["plan", "headline", "--row", "mp"], "unknown row of suite 'headline' 'mp'; valid: mask2former, mp-former"),
        (["plan", "headline", "--set", "toggles.noise=1"], "unknown configuration key 'toggles.noise'; nearest"),
        (["plan", "headline", "--set", "toggles.mask_noise=dots"], "invalid value for toggles.mask_noise"),
        (["plan", "headline", "--set", "seed=1"], "use --seed or --seeds"),
        (["plan", "headline", "--set", "extra_cfg.SOLVER.NESTEROV=true"], "nothing here reads SOLVER.NESTEROV: leave"),
        (["plan", "headline", "--seeds", "x"], "write 0,1,2 or 0-4"),
        (["plan", "headline", "--seed", "1", "--seeds", "1"], "not both"),
        (["plan", "headline", "--scale", "big"], "unknown scale 'big'; valid: mini"),
        (["suites", "--dataset", "imagenet"], "unknown dataset at scale 'mini' 'imagenet'; valid: shapes, nuclei"),
        (["launch", "headline", "--dataset", "nuclei"], "mpformer data prepare nuclei SRC"),
        (["launch", "headline", "--inline"], "--inline executes one run, this is 2"),
        (["status", "headline"], "unknown launched suite 'headline@mini on shapes'; valid: none yet"),
        (["logs", "nothing"], "unknown run 'nothing'; runs: none yet"),
        (["void", "nothing", "--reason", "x"], "unknown run 'nothing'"),
        (["retry", "headline"], "no failed run to retry; failed: none"),
        (["data", "prepare", "imagenet"], "unknown dataset 'imagenet'; valid: shapes, nuclei"),
        (["data", "prepare", "nuclei"], "mpformer data prepare nuclei SRC"),
    ],
)
def test_a_user_mistake_is_one_line_and_exit_code_2(run: Make, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert message in result.err
    assert result.err.startswith("mpformer: ")
    assert result.err.count("\n") == 1, "one line, no traceback"


@pytest.mark.parametrize("arguments", [["nothing"], ["plan"], ["plan", "headline", "--nothing"]])
def test_a_mistyped_command_is_exit_code_2(run: Make, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err


def test_suites_lists_rows_and_why_some_do_not_apply(run: Make) -> None:
    assert "mp-flip" in run("suites").out
    listed = {suite["suite"]: suite for suite in run("suites", "--dataset", "nuclei", "--json").json}
    rows = {row["name"]: row["not_applicable"] for row in listed["components"]["rows"]}
    assert "one class" in rows["mp-flip"]
    assert rows["mp-point"] == ""


def test_plan_shows_runs_states_ids_and_labelled_estimates(run: Make) -> None:
    plan = run("plan", "components", "--json", *SHORT).json
    assert len(plan["runs"]) == 15
    assert {run["state"] for run in plan["runs"]} == {"PLANNED"}
    assert {run["seconds_source"] for run in plan["runs"]} == {"declared"}
    text = run("plan", "components", *SHORT).out
    assert plan["runs"][0]["run_id"] in text
    assert "15 runs to do" in text
    assert "(declared)" in text


def test_plan_and_status_write_nothing(run: Make, tmp_path: Path) -> None:
    run("plan", "headline")
    assert "start with: mpformer launch headline" in run("status").out
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("counting")
def test_inline_status_logs_void_and_diff(run: Make, tmp_path: Path) -> None:
    for row in ("mask2former", "mp-former"):
        result = run("launch", "headline", "--row", row, "--seed", "0", "--inline", *SHORT)
        assert result.code == 0
    (view,) = run("status", "headline", "--json").json
    assert view["counts"] == {"DONE": 2}
    assert view["runs"][1]["delta"] == 0.0
    one, other = (r["run_id"] for r in view["runs"])
    table = run("status").out
    assert one[-12:] in table
    assert "DONE" in table
    assert run("logs", one[-12:]).code == 0
    found = run("diff", one, other, "--json").json
    assert found["toggles.mp_queries"] == [False, True]
    assert run("void", one, "--reason", "wrong data").code == 0
    assert "VOID" in run("status").out
    assert run("plan", "headline", "--seed", "0", "--json", *SHORT).json["runs"][0]["state"] == "VOID"


@pytest.mark.usefixtures("monkeypatch")
def test_a_failed_inline_run_is_exit_code_1(run: Make, counter: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "Model", lambda: counter(fail={"m2f": "nan"}))
    result = run("launch", "headline", "--row", "mask2former", "--seed", "0", "--inline", *SHORT)
    assert result.code == 1
    assert "failed nan" in result.out


def test_status_of_a_setting_is_about_its_runs(run: Make, plan: Plan, store: Store) -> None:
    """As `plan` resolves them, whatever the suite's record says."""
    begin.record(plan, store, "a test")
    (view,) = run("status", "headline", "--set", "schedule.max_iter=7", "--seeds", "3", "--json").json
    planned = run("plan", "headline", "--set", "schedule.max_iter=7", "--seeds", "3", "--json").json
    assert [one["run_id"] for one in view["runs"]] == [one["run_id"] for one in planned["runs"]]
    (launched,) = run("status", "headline", "--json").json
    assert {one["run_id"] for one in launched["runs"]} == {one.run_id for one in plan.unique}
    refused = run("status", "--set", "schedule.max_iter=7")
    assert refused.code == 2
    assert "mpformer status SUITE --set KEY=VALUE" in refused.err


def test_cancel_says_when_there_is_nothing_to_cancel(run: Make) -> None:
    assert "nothing of it is running" in run("cancel", "headline", "--yes").out


def test_logs_refuses_an_attempt_that_is_not_there(run: Make, store: Store, one: RunDir) -> None:
    result = run("logs", one.run_id, "--attempt", "4")
    assert (result.code, "unknown attempt" in result.err) == (2, True)


def test_a_read_only_store_is_one_line(run: Make, tmp_path: Path) -> None:
    place = tmp_path / "read-only"
    place.mkdir()
    if os.geteuid() == 0:  # permissions do not stop root; a read-only file system does
        mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "none", str(place)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("root without the right to mount cannot make anything read-only")
    else:
        place.chmod(0o500)
    try:
        result = run("launch", "headline", "--root", str(place), *SHORT)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(place)], check=True)
    assert result.code == 2
    assert "cannot write" in result.err
    assert result.err.endswith("choose a folder that can be written with --root\n")
    assert result.err.count("\n") == 1


def test_a_damaged_run_does_not_take_status_down(run: Make, plan: Plan, store: Store) -> None:

    begin.record(plan, store, "")
    (store.run(plan.runs[0].run_id).path / "run.json").write_text('{"sch')
    (view,) = run("status", "--json").json
    assert view["counts"] == {"UNKNOWN": 1, "PLANNED": 3}


def test_data_check_finds_missing_and_damaged_files(run: Make, tmp_path: Path) -> None:
    small = ("--set", "dataset.shapes.side=32", "--set", "dataset.shapes.train_images=2")
    where = ("--data-root", str(tmp_path / "drawn"))
    assert run("data", "prepare", "shapes", *small, "--set", "dataset.shapes.val_images=1", *where).code == 0
    assert "complete" in run("data", "check", "shapes", "--full", *where).out
    image = next((tmp_path / "drawn" / "shapes").glob("*/train/*.png"))
    image.write_bytes(b"bad")
    assert "first not: train/" in run("data", "check", "shapes", "--full", *where).out
    image.unlink()
    result = run("data", "check", "shapes", "--json", *where)
    assert result.code == 2
    assert not result.json[0]["ok"]
    assert any("1 of 2 files" in item["detail"] for item in result.json[0]["items"])


@pytest.mark.parametrize("name", ["coco", "ade20k", "cityscapes"])
def test_a_release_is_converted_and_looked_at(run: Make, name: str, tmp_path: Path) -> None:
    from tests.support.miniature import write_miniature

    where = ("--data-root", str(tmp_path / "releases"))
    absent = run("data", "check", name, *where)
    assert absent.code == 2
    assert "https://" in absent.out or "http://" in absent.out
    assert run("data", "prepare", name, *where).code == 2
    write_miniature(name, tmp_path / "releases", images=2, side=64)
    assert run("data", "prepare", name, *where).code == 0
    assert (Path(run("data", "prepare", name, *where).out.splitlines()[-1]) / "mpformer_manifest.json").exists()
    found = run("data", "check", name, *where)
    assert found.code == 2, "a miniature is not the whole release"
    assert "opens" in found.out


COMMANDS = (["--help"], ["suites"], ["plan", "components"], ["status"], ["report", "--help"])


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_looking_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = "import sys; from experiments.cli.main import cli; cli.main(sys.argv[1:], standalone_mode=False); "
    code += f"print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_status_counts_two_thousand_runs(run: Make, store: Store) -> None:
    result = {"schema": 1, "eval_id": "e", "complete": True, "metrics": {"AP": 1.0}}
    runs = []
    for number in range(2000):
        name = f"run-{number}"
        directory = store.root / "runs" / name
        (directory / "evals" / "e").mkdir(parents=True)
        (directory / "evals" / "e" / "result.json").write_text(json.dumps({**result, "run_id": name}))
        runs.append({"seed": number, "run_id": name, "eval_id": "e"})
    record = {"suite": "s", "scale": "mini", "dataset": "shapes", "title": "", "primary": "AP", "baseline": "r"}
    write_json(store.root / "suites" / "s@mini.json", {**record, "rows": [{"name": "r", "runs": runs}]})
    assert run("status", "--json").json[0]["counts"] == {"DONE": 2000}
    assert read_json(store.root / "suites" / "s@mini.json")["title"] == ""


def test_cancel_asks_first(run: Make, plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    begin.record(plan, store, "a test")
    chosen = store.run(plan.unique[0].run_id)
    claims.acquire(chosen.path / "claims")  # this process works on it
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    refused = run("cancel", "headline")
    assert refused.code != 0
    assert "cancel 1 runs?" in refused.out
    assert not chosen.cancel_file.exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert run("cancel", "headline").code == 0
    assert chosen.cancel_file.exists()


def test_watching_ends_when_nothing_is_left_to_wait_for(
    run: Make, plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reads meanwhile what has changed alone."""
    begin.record(plan, store, "a test")
    for each in plan.unique:
        write_json(store.run(each.run_id).attempt(1).path / "stage.json", {"outcome": "failed", "launch": "x"})
    claim, looks = claims.acquire(store.run(plan.unique[0].run_id).claims), []
    read: list[Path] = []
    real = files._content

    def content(path: Path) -> bytes:
        found = real(path)
        read.append(path)
        return found

    def wait(seconds: float) -> None:
        looks.append(len(read))
        read.clear()
        if len(looks) == 3 and claim is not None:
            claim.release()

    monkeypatch.setattr(files, "_content", content)
    monkeypatch.setattr(time, "sleep", wait)
    watched = run("status", "--watch")
    assert watched.code == 0
    assert len(looks) == 3, "until the run is free"
    assert looks[0] > 0
    assert looks[1:] == [0, 0]


def test_watching_looks_again_until_interrupted(
    run: Make, plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin.record(plan, store, "a test")
    chosen, looks = store.run(plan.unique[0].run_id), []

    def wait(seconds: float) -> None:
        looks.append(seconds)
        claims.acquire(chosen.path / "claims")
        if len(looks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", wait)
    watched = run("status", "--watch")
    assert watched.code == 0
    assert "RUNNING" in watched.out


def test_weights_and_a_new_class_head_are_options_of_a_suite(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are overrides of every row, so that they are in the runs' ids and the suite's record."""
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"sem_seg_head.predictor.class_embed.weight": torch.zeros(134, 64)}, "coco.pth")
    plain, started, anew = (
        {one["run_id"] for one in run("plan", "headline", "--seed", "0", "--json", *options).json["runs"]}
        for options in ((), ("--weights", "coco.pth"), ("--weights", "coco.pth", "--reinit-class-head"))
    )
    assert len(plain | started | anew) == 6
    assert run("plan", "headline", "--seed", "0", "--json", "--set", "model.init_weights=coco.pth").json["runs"]
    refused = run("launch", "headline", "--seed", "0", "--weights", "coco.pth")
    assert refused.code == 2
    assert "coco.pth has 133 classes, shapes (panoptic) has 12" in refused.err
    assert "--reinit-class-head to fine-tune these" in refused.err
