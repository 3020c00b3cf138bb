"""What a launch reads is looked at before it starts: backbones that can be built, weights of this model, addresses."""

import io
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from experiments.launch import inputs
from experiments.store.run_dir import Store
from experiments.suites import datasets, planning
from experiments.suites.scales import base
from mpformer.config.schema import Config
from mpformer.runtime.errors import UserError
from tests.support import small_runs, tiny_jobs

NAME = "model.backbone.name"
OWN = {key: value for key, value in small_runs.TINY.items() if not key.startswith("model.backbone.")}


def planned(data_root: Path, **overrides: Any) -> planning.Plan:
    changes = OWN | {key.replace("__", "."): value for key, value in overrides.items()}
    request = planning.Request("headline", seeds=(0,), overrides=tuple(changes.items()))
    return inputs.prepare_data(planning.make(request, data_root))


def test_a_suite_runs_on_a_backbone_that_is_chosen_by_name(data_root: Path, tmp_path: Path) -> None:
    """Both rows of the headline at scale mini have it; one is trained and scored."""
    found = planned(data_root, model__backbone__name="timm/test_convnext", schedule__max_iter=2)
    assert {run.config.model.backbone.title for run in found.unique} == {"test_convnext"}
    assert len(found.unique) == 2
    inputs.check_models(run.config for run in found.unique)
    run = found.unique[-1]
    assert tiny_jobs.undisturbed(run, Store(tmp_path), data_root)


@pytest.fixture
def mini() -> Config:
    return base("mini")


def test_a_backbone_that_cannot_be_is_refused_before_a_launch(mini: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs.check_models([mini])
    with pytest.raises(UserError, match="unknown timm model 'timm/convnext_tinny'"):
        inputs.check_models([mini, mini.replace({NAME: "timm/convnext_tinny"})])
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm/convnext_tiny needs timm, which is not installed: pip install timm"):
        inputs.check_models([mini.replace({NAME: "timm/convnext_tiny"})])


def test_weights_of_another_class_list_are_refused_before_a_launch(mini: Config, tmp_path: Path) -> None:
    torch.save({"sem_seg_head.predictor.class_embed.weight": torch.zeros(81, 64)}, tmp_path / "coco.pth")
    with pytest.raises(UserError, match=r"coco\.pth has 80 classes, shapes \(panoptic\) has"):
        inputs.check_models([mini.replace({"model.init_weights": str(tmp_path / "coco.pth")})])


def test_timms_weights_have_an_address(mini: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched once, under a name of their own: every repository there calls its file the same."""
    asked: list[str] = []

    class Answer(io.BytesIO):
        headers: ClassVar = {"Content-Length": "7"}

    def answer(address: str, timeout: float) -> Answer:
        asked.append(address)
        return Answer(b"weights")

    monkeypatch.setattr("urllib.request.urlopen", answer)
    name = "timm://convnext_tiny.fb_in22k"
    config = mini.replace({NAME: "timm/convnext_tiny", "model.init_weights": name})
    assert "`launch` fetches them" in datasets.resolve_weights(config, tmp_path)[1]
    file = tmp_path / "weights" / "convnext_tiny.fb_in22k.safetensors"
    assert datasets.fetch_weights([name, name], tmp_path) == [file]
    assert asked == ["https://huggingface.co/timm/convnext_tiny.fb_in22k/resolve/main/model.safetensors"]
    resolved, missing = datasets.resolve_weights(config, tmp_path)
    assert (resolved.model.init_weights, missing) == (str(file), "")
    assert len(resolved.model.init_checksum) == 64


def test_a_new_class_head_takes_weights_of_another_class_list(mini: Config, tmp_path: Path) -> None:
    """What classes they have is told from the run that they lie in, else from their number where one list has it."""
    head = "sem_seg_head.predictor.class_embed.weight"
    torch.save({head: torch.zeros(134, 64)}, tmp_path / "coco.pth")
    torch.save({head: torch.zeros(8, 64)}, tmp_path / "other.pth")
    run = Store(tmp_path / "store").run("elsewhere")
    (run.path / "checkpoints").mkdir(parents=True)
    run.create(mini.replace({"dataset.task": "instance"}), "row")
    torch.save({head: torch.zeros(9, 64)}, run.path / "checkpoints" / "final.pth")
    for path, classes in (
        (tmp_path / "coco.pth", "coco/panoptic"),
        (tmp_path / "other.pth", ""),
        (run.path / "checkpoints" / "final.pth", "shapes/instance"),
    ):
        config = mini.replace({"model.init_weights": str(path), "model.reinit_class_head": True})
        resolved, missing = datasets.resolve_weights(config, tmp_path)
        assert (resolved.model.init_classes, missing) == (classes, "")
        inputs.check_models([resolved])
    given = config.replace({"model.init_classes": "ade20k/semantic"})
    assert datasets.resolve_weights(given, tmp_path)[0].model.init_classes == "ade20k/semantic"
    with pytest.raises(UserError, match=r"give model\.init_weights too \(--weights FILE\)"):
        mini.replace({"model.reinit_class_head": True})
