"""Masks computed later are those that the evaluation would have kept."""

import json
from pathlib import Path

import pytest
import torch

from analysis.masks import read_layer_masks
from mpformer.config.schema import Config
from mpformer.data.validation import validation_items
from mpformer.evaluation.evaluate import evaluate
from mpformer.evaluation.layer_masks import write_further_masks
from mpformer.modeling.meta_arch import build_model
from mpformer.runtime.errors import UserError
from mpformer.training.checkpoints import write

MODEL = {
    "backbone": {"kind": "resnet", "depth": 18, "stem_channels": 8, "res2_channels": 8, "norm": "GN"},
    "hidden_dim": 16,
    "conv_dim": 16,
    "mask_dim": 16,
    "heads": 2,
    "encoder_layers": 1,
    "encoder_ffn": 16,
    "decoder_layers": 2,
    "decoder_ffn": 16,
    "queries": 10,
    "attention_strides": (16, 8),
    "size_divisibility": 16,
}


@pytest.fixture(scope="module")
def config(shapes_config: Config) -> Config:
    changes = {f"model.{name}": value for name, value in MODEL.items()}
    # one image is kept; one image a forward pass, so that both ways compute the very same numbers
    return shapes_config.replace({**changes, "evaluation.layer_mask_images": 1, "evaluation.layer_scores": False})


def test_further_masks(config: Config, shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpformer.evaluation.layer_pass._BATCH_IMAGES", 1)
    weights = tmp_path / "final.pth"
    torch.manual_seed(0)
    write(weights, {"model": build_model(config).state_dict()})
    evaluate(config, weights, tmp_path / "eval", shapes_root)
    (kept,) = read_layer_masks(tmp_path / "eval" / "layer_masks")
    ids = [int(record["image_id"]) for record in validation_items(config, shapes_root).records]
    others = [i for i in ids if i != kept["image_id"]]

    out = tmp_path / "eval" / "further_masks"
    write_further_masks(config, weights, [kept["image_id"]], out, shapes_root)
    assert read_layer_masks(out) == [kept]
    first = (out / kept["image"]).read_bytes()
    assert first == (tmp_path / "eval" / "layer_masks" / kept["image"]).read_bytes()

    write_further_masks(config, weights, others[:2], out, shapes_root)
    assert {record["image_id"] for record in read_layer_masks(out)} == {kept["image_id"], *others[:2]}
    assert json.loads((out / f"{kept['image_id']}.json").read_text()) == kept
    assert (out / kept["image"]).read_bytes() == first
    with pytest.raises(UserError, match=r"unknown validation image 999; 6 images have ids from"):
        write_further_masks(config, weights, [999], out, shapes_root)
