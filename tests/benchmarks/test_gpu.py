"""The GPU benchmark: its command runs from a bare Python with a folder of wheels, its parts on a tiny model here."""

import copy
import json
import sys
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import gpu, gpu_steps, settings
from mpformer.config.schema import ResNetConfig
from mpformer.training.trainer import Trainer
from tests.support.paired_models import CLASSES, tiny_config

MODEL = {
    "backbone": ResNetConfig(stem_channels=8, res2_channels=16, width_per_group=4),
    "decoder_layers": 3,
    "heads": 4,
}
CPU = torch.device("cpu")
OPTIONS = Namespace(size=64, objects=2, steps=1)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = settings.Setting("tiny", tiny_config(settings.MASK2FORMER, **MODEL), 64, 2, CLASSES, objects=2)
    monkeypatch.setattr(gpu_steps, "standard", lambda side: setting)
    monkeypatch.setattr(gpu_steps, "_WARM_UP", 0)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("kind", ["MP-Former", "transformers"])
def test_a_case_is_timed(kind: str) -> None:
    found = gpu_steps._measured(gpu_steps.Case(kind, "float32", 2), OPTIONS, CPU)
    assert found["step_ms"] > 0, found
    assert len(found["steps_ms"]) == 1
    assert found["images_per_second"] > 0
    assert found["peak_gib"] is None
    assert "kernels" not in found


@pytest.mark.usefixtures("tiny")
def test_agreement_is_measured_and_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real, models = gpu_steps._settled, list[Any]()

    def copied(config: Any) -> Any:
        models.append(copy.deepcopy(models[0]) if models else real(config))
        return models[-1]

    monkeypatch.setattr(gpu_steps, "_settled", copied)
    found = gpu_steps.agreement(settings.PILOTED, CPU, 64)
    assert found["agrees"]
    assert found["losses"] == found["gradient"] == 0
    assert "for want of a GPU" in found["with"]

    def other_weights(config: Any) -> Any:
        with torch.no_grad():
            copied(config).sem_seg_head.predictor.class_embed.weight.mul_(len(models))
        return models[-1]

    monkeypatch.setattr(gpu_steps, "_settled", other_weights)
    assert not gpu_steps.agreement(settings.PILOTED, CPU, 64)["agrees"]


@pytest.mark.usefixtures("tiny")
def test_a_case_that_fails_is_a_line_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("x")

    monkeypatch.setattr(Trainer, "run_step", no_memory)
    assert gpu_steps._measured(gpu_steps.Case("MP-Former", "float32", 2), OPTIONS, CPU) == {"why": "out of memory"}


def test_what_is_left_out_for_want_of_time_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.jsonl"
    monkeypatch.setattr(
        gpu_steps, "agreement", lambda *_: {"losses": 0.0, "gradient": 0.0, "with": "x", "agrees": True}
    )
    monkeypatch.setattr(gpu_steps, "_measured", lambda *_: {"step_ms": 1.0, "images_per_second": 2.0, "peak_gib": None})
    arguments = ["--device", "cpu", "--size", "64", "--objects", "2", "--batches", "2", "4", "--steps", "1"]
    for part, seconds in (("eager", "60"), ("compiled", "-1")):
        monkeypatch.setattr(sys, "argv", ["gpu_steps", part, *arguments, "--seconds", seconds, "--out", str(out)])
        gpu_steps.main()
    found = gpu.collected(out)
    assert found["machine"]["device"] == "cpu"
    assert [line["method"] for line in found["agreement"]] == ["Mask2Former", "MP-Former"]
    assert [case.get("why") for case in found["cases"]] == [None] * 12 + ["not reached in the time"] * 3
    lines = gpu.table(found).splitlines()
    assert "| ours, MP-Former | float32 | 2 | 1 | 2.00 | – | – | – |" in lines
    assert "| ours, MP-Former, compiled | float32 | 2 | not reached in the time | | | | |" in lines


def test_the_time_in_which_no_kernel_runs() -> None:
    assert gpu_steps.spans([(0, 4), (2, 6), (8, 10), (3, 5)], 2) == {"kernels": 2.0, "idle": pytest.approx(0.2)}


def test_every_precision_and_batch_is_a_case_on_a_gpu() -> None:
    cases = list(gpu_steps.cases("eager", [2, 4, 8], torch.device("cuda")))
    assert len(cases) == 3 * 3 * 3 + 1
    assert {case.precision for case in cases} == {"bf16", "fp16", "float32"}
    assert [case.kind for case in gpu_steps.cases("compiled", [2], torch.device("cuda"))] == [
        "MP-Former", "Mask2Former", "transformers",
    ]  # fmt: skip


def test_wheels_are_unpacked_but_for_what_is_there(tmp_path: Path) -> None:
    names = ("a_package-1.0-py3-none-any", "typing-3.7.4.3-py3-none-any", "torch-2.11.0-cp312-cp312-linux_x86_64")
    for name in names:
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "")
    assert [p.name for p in gpu.unpack(tmp_path, tmp_path / "out").iterdir()] == ["a_package"]
    with pytest.raises(SystemExit, match="--pack"):
        gpu.unpack(tmp_path / "out", tmp_path / "other")


def test_the_wheels_are_those_of_the_locks_without_torch() -> None:
    blocks = list(gpu._requirements())
    names = {block.split("==")[0] for block in blocks}
    assert {"deformops", "transformers", "panopticapi-lite", "scipy"} <= names
    assert not names & {"torch", "torchvision", "triton", "nvidia-cublas", "cuda-toolkit"}
    assert all("--hash=sha256:" in block for block in blocks)


def test_a_measurement_without_a_sound_case_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its file says why; the parts are given their share of the time."""
    asked: list[float] = []

    def run(command: list[str], environment: Any, seconds: float) -> tuple[int, str]:
        asked.append(seconds)
        return 1, "nothing works"

    monkeypatch.setattr(gpu, "_run", run)
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--seconds", "100", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    found = json.loads(out.read_text())
    assert found["tests"]["rc"] == 1
    assert not found["sound"]
    assert asked == pytest.approx([25, 90, 115], abs=2)
