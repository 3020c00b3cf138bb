"""The layer analysis works on outputs of a model that this project did not make; the documentation's example runs."""

import re
from pathlib import Path

import pytest
import torch

from analysis.huggingface import from_transformers
from analysis.recorder import LayerRecorder

pytest.importorskip("transformers")

from tests.support.huggingface_models import mask2former, maskformer, oneformer

DOCS = Path(__file__).resolve().parents[2] / "docs" / "analysis.md"


def test_layers_come_in_order() -> None:
    model = mask2former()
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 64, 96), output_auxiliary_logits=True)
    masks, classes, first_layer = from_transformers(outputs)
    assert first_layer == 0
    assert masks.shape == (2, 4, 6, 16, 24)
    assert classes.shape == (2, 4, 6, 4)
    assert torch.equal(masks[:, -1], outputs.masks_queries_logits)
    assert torch.equal(classes[:, 0], outputs.auxiliary_logits[0]["class_queries_logits"])
    # Layer 0 is the bare queries: its classes do not depend on the image.
    assert torch.allclose(classes[0, 0], classes[1, 0], atol=1e-5)
    assert not torch.allclose(classes[0, 1], classes[1, 1], atol=1e-5)


def test_oneformers_layers_come_in_order() -> None:
    with torch.no_grad():
        outputs = oneformer()(torch.randn(2, 3, 64, 96), task_inputs=torch.ones(2, 77), output_auxiliary_logits=True)
    found = from_transformers(outputs)
    assert found.first_layer == 0
    assert found.masks.shape == (2, 4, 6, 16, 24)
    assert found.classes.shape == (2, 4, 6, 4)
    assert torch.equal(found.masks[:, -1], outputs.masks_queries_logits)
    for layer, auxiliary in enumerate(outputs.auxiliary_predictions):
        assert torch.equal(found.masks[:, layer], auxiliary["masks_queries_logits"])
        assert torch.equal(found.classes[:, layer], auxiliary["class_queries_logits"])
    recorder = LayerRecorder()
    recorder.add(0, found.masks[0], found.classes[0], torch.rand(2, 64, 96) > 0.5, torch.tensor([0, 2]))
    assert recorder.summary()["layers"]["Util"][-1] == 100


def test_maskformers_layers_are_numbered_from_one() -> None:
    model = maskformer()
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 64, 96), output_auxiliary_logits=True, output_hidden_states=True)
        states = outputs.transformer_decoder_hidden_states
        wanted = [model.class_predictor(state) for state in states[-3:]]  # what its three decoder layers give
    found = from_transformers(outputs)
    assert found.first_layer == 1
    assert found.masks.shape == (2, 3, 6, 16, 24)
    torch.testing.assert_close(found.classes, torch.stack(wanted, 1))
    # a release that does not put the heads on zeros before the layers
    outputs.auxiliary_logits = outputs.auxiliary_logits[-2:]
    again = from_transformers(outputs)
    assert again.first_layer == 1
    assert torch.equal(again.masks, found.masks)


def test_maskformers_missing_layer_is_said_and_nothing_is_shifted() -> None:
    generator = torch.Generator().manual_seed(3)
    gt_masks, gt_labels = torch.rand(3, 64, 96, generator=generator) > 0.5, torch.tensor([0, 2, 1])
    with torch.no_grad():
        pixels = torch.randn(1, 3, 64, 96, generator=generator)
        layers = from_transformers(maskformer()(pixels, output_auxiliary_logits=True, output_hidden_states=True))
    recorder = LayerRecorder()
    recorder.add(0, layers.masks[0], layers.classes[0], gt_masks, gt_labels, first_layer=layers.first_layer)
    summary = recorder.summary()
    assert [len(values) for values in summary["layers"].values()] == [4] * 6
    for name, values in summary["layers"].items():
        assert values[0] is None, name
    for name in ("mIoU-L", "empty_pair_share"):  # at layer 1 there is nothing before
        assert summary["layers"][name][1] is None
    assert summary["layers"]["Util"][3] == 100
    assert summary["metrics"]["jump-rate"] is None
    assert summary["metrics"]["jump-rate-late"] is not None


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model that is not known, dict; valid: Mask2Former.*, OneFormer.*, MaskF"):
        from_transformers({"auxiliary_logits": []})


def test_layers_that_are_not_there() -> None:
    with torch.no_grad():
        outputs = mask2former()(torch.randn(1, 3, 64, 64), output_auxiliary_logits=False)
    with pytest.raises(ValueError, match="output_auxiliary_logits=True"):
        from_transformers(outputs)


def test_the_documented_example_runs() -> None:
    code = re.search(r"## Models of transformers.*?```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert code is not None
    assert len(code[1].strip().splitlines()) <= 10
    images = [(0, torch.randn(3, 64, 96), torch.rand(2, 64, 96) > 0.5, torch.tensor([0, 2]))]
    names: dict = {"model": mask2former(), "images": images}
    exec(code[1], names)
    assert isinstance(names["recorder"], LayerRecorder)
    assert names["recorder"].summary()["layers"]["Util"][-1] == 100
