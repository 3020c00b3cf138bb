"""Weights that are scored without training, and what a pass costs."""

from pathlib import Path

import pytest
import torch

from mpformer.config.paper_settings import setting
from mpformer.config.schema import Config
from mpformer.data.validation import validation_items
from mpformer.evaluation.compute_cost import costs
from mpformer.modeling.meta_arch import build_model
from mpformer.runtime.errors import UserError
from mpformer.training.trainer import train
from tests.support.miniature import write_miniature

_NARROW = {
    "model.backbone": {"kind": "resnet", "depth": 18, "stem_channels": 8, "res2_channels": 8, "norm": "GN"},
    "model.hidden_dim": 16, "model.conv_dim": 16, "model.mask_dim": 16, "model.heads": 2, "model.encoder_layers": 1,
    "model.encoder_ffn": 16, "model.decoder_layers": 3, "model.decoder_ffn": 16, "model.queries": 6,
    "model.train_points": 32, "model.init_weights": "", "evaluation.min_size_test": 0, "evaluation.max_size_test": 0,
    "schedule.amp": "off", "runtime.workers": 0, "runtime.eval_period": 0,
}  # fmt: skip


def narrow(**changes: object) -> Config:
    return setting("coco/instance/r50-12ep-step").replace({**_NARROW, **changes})


def test_released_weights_become_the_final_ones_untouched(tmp_path: Path) -> None:
    config = narrow()
    released = build_model(config.replace({"seed": 5})).state_dict()
    torch.save({"model": released}, tmp_path / "released.pth")
    only = {"schedule.evaluation_only": True, "model.init_weights": str(tmp_path / "released.pth")}
    trained = train(config.replace(only), tmp_path / "run", tmp_path / "no data is needed")
    final = torch.load(tmp_path / "run" / trained["weights"], weights_only=True)["model"]
    assert trained["iterations"] == 0
    assert all(torch.equal(released[name], value) for name, value in final.items())


def test_evaluation_only_without_a_whole_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the file of a whole model"):
        train(narrow(**{"schedule.evaluation_only": True}), tmp_path, tmp_path)
    backbone = {
        n.removeprefix("backbone."): v for n, v in build_model(narrow()).state_dict().items() if "backbone" in n
    }
    torch.save(backbone, tmp_path / "backbone.pth")
    only = {"schedule.evaluation_only": True, "model.init_weights": str(tmp_path / "backbone.pth")}
    with pytest.raises(UserError, match="holds a backbone only"):
        train(narrow(**only), tmp_path, tmp_path)


def test_piloting_costs_operations_in_training_and_none_at_inference(tmp_path: Path) -> None:
    write_miniature("coco", tmp_path, images=2, side=64)
    found = {}
    for piloted in (False, True):
        config = narrow(**{"toggles.mp_queries": piloted})
        model = build_model(config)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found[piloted] = costs(model, config, validation_items(config, tmp_path))
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert found[True]["train_gflops"] > 1.001 * found[False]["train_gflops"] > 0
    assert found[True]["inference_gflops"] == found[False]["inference_gflops"] > 0
    assert 0 < found[True]["inference"] < 10
