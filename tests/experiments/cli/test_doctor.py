"""The doctor: honest lines, a way out for each thing that is missing, and the right exit code."""

import http.server
import importlib.util
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.cli import doctor
from experiments.cli.doctor import MISSING, NOTE, OK, Finding


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the whole PATH, for fake Slurm clients."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def client(folder: Path, name: str, output: str = "", code: int = 0) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\nprintf '%s\\n' '{output}'\nexit {code}\n")
    path.chmod(0o755)


def test_everything_is_here_and_two_iterations_are_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code = doctor.run(root=tmp_path / "store", data_root=tmp_path / "data", as_json=True)
    found = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert code == 0, found
    assert found["training"]["detail"].startswith("2 iterations in ")
    assert "sal-detectron2" in found["detectron2"]["detail"] or "upstream" in found["detectron2"]["detail"]
    kernels = ("sparse matrix", "grid_sample", "torch-ms-deform-attn")
    assert found["deformable attention"]["detail"].startswith(kernels)
    assert found["shapes"]["level"] == NOTE
    assert "mpformer data prepare shapes" in found["shapes"]["advice"]
    assert not list(tmp_path.rglob("*")), "the doctor leaves nothing behind"


def test_something_needed_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding("one", OK, "fine"), Finding("two", NOTE, "slow"), Finding("three", MISSING, "gone", "get [it]")]
    monkeypatch.setattr(doctor, "examine", lambda *_: iter(findings))
    assert doctor.run(root=tmp_path, data_root=tmp_path) == 1
    shown = capsys.readouterr().out
    assert "→ get [it]" in shown
    assert "needed and missing: three" in shown
    monkeypatch.setattr(doctor, "examine", lambda *_: iter(findings[:2]))
    assert doctor.run(root=tmp_path, data_root=tmp_path) == 0


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"numpy": "2.2.6", "panopticapi-lite": "0.2.0"}
    monkeypatch.setattr(doctor, "version", lambda name: there.get(name, ""))
    assert doctor.packages().level == MISSING
    assert "not installed: torch, torchvision" in doctor.packages().detail
    monkeypatch.setattr(doctor, "version", lambda name: "2.3.0")
    assert doctor.packages().level == NOTE


def test_detectron2_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    finding = doctor.detectron2()
    assert finding.level == MISSING
    assert "DETECTRON2=git" in finding.advice


def test_slurm_absent_silent_and_present(clients: Path) -> None:
    assert doctor.slurm().level == NOTE
    assert "slurm/devcluster up" in doctor.slurm().advice
    client(clients, "sbatch")
    assert "srun, squeue, scontrol not" in doctor.slurm().detail
    for name in ("srun", "squeue", "sacct"):
        client(clients, name)
    client(clients, "scontrol", code=1)
    client(clients, "sinfo", "slurm 22.05.8")
    assert "no controller answers" in doctor.slurm().detail
    client(clients, "scontrol", "AccountingStorageType   = accounting_storage/slurmdbd")
    assert doctor.slurm().level == OK
    assert doctor.slurm().detail.endswith(", accounting")
    client(clients, "scontrol", "AccountingStorageType   = accounting_storage/none")
    assert "no accounting" in doctor.slurm().detail


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    running = http.server.HTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def test_mlflow_answers_or_not(server: str, tmp_path: Path) -> None:
    assert doctor.mlflow(server).level == OK
    gone = doctor.mlflow("http://me:secret@127.0.0.1:9")
    assert gone.level == NOTE
    assert "secret" not in gone.detail + gone.advice
    assert "made at the first launch" in doctor.mlflow(f"sqlite:///{tmp_path}/mlflow.db").detail


def test_datasets_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "shapes" / "0123456789ab"
    folder.mkdir(parents=True)
    manifest = {"fingerprint": "0123456789abcdef", "splits": {"train": {"images": 20}, "val": {"images": 5}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "coco").mkdir()
    found = {finding.name: finding for finding in doctor.datasets(tmp_path)}
    assert found["shapes"] == Finding("shapes", OK, "0123456789ab: 20 train, 5 val")
    assert found["nuclei"].level == NOTE
    assert found["releases"].detail == "found: coco"
    (folder / "manifest.json").write_text("{")
    found = {finding.name: finding for finding in doctor.datasets(tmp_path)}
    assert "mpformer data check shapes" in found["shapes"].advice


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = doctor.writable("run store", tmp_path / "file" / "store", "--root")
    assert finding.level == MISSING
    assert "--root" in finding.advice
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert doctor.writable("run store", tmp_path / "new", "--root").level == MISSING


def test_a_failing_trial_says_its_last_line() -> None:
    done = subprocess.CompletedProcess([], 1, "", "Traceback ...\nImportError: libcudart.so is missing\n\n")
    torch = {"torch": "2.9", "gpus": [], "kernel": "grid_sample", "threads": 2}
    found = {finding.name: finding for finding in doctor._trial_findings(done, torch, None)}
    assert found["training"].level == MISSING
    assert found["training"].detail == "ImportError: libcudart.so is missing"
    assert found["deformable attention"].level == NOTE
    crashed = list(doctor._trial_findings(subprocess.CompletedProcess([], -11, "", ""), None, None))
    assert [(finding.name, finding.detail) for finding in crashed] == [("training", "exit code -11")]
