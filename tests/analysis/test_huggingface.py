"""The layer analysis works on outputs of a model that this project did not make; the documentation's example runs."""

import re
from pathlib import Path

import pytest
import torch

from analysis.huggingface import from_transformers
from analysis.recorder import LayerRecorder

pytest.importorskip("transformers")

from tests.support.huggingface_models import mask2former

DOCS = Path(__file__).resolve().parents[2] / "docs" / "analysis.md"


def test_layers_come_in_order() -> None:
    model = mask2former()
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 64, 96), output_auxiliary_logits=True)
    masks, classes = from_transformers(outputs)
    assert masks.shape == (2, 4, 6, 16, 24)
    assert classes.shape == (2, 4, 6, 4)
    assert torch.equal(masks[:, -1], outputs.masks_queries_logits)
    assert torch.equal(classes[:, 0], outputs.auxiliary_logits[0]["class_queries_logits"])
    # Layer 0 is the bare queries: its classes do not depend on the image.
    assert torch.allclose(classes[0, 0], classes[1, 0], atol=1e-5)
    assert not torch.allclose(classes[0, 1], classes[1, 1], atol=1e-5)


def test_layers_that_are_not_there() -> None:
    with torch.no_grad():
        outputs = mask2former()(torch.randn(1, 3, 64, 64), output_auxiliary_logits=False)
    with pytest.raises(ValueError, match="output_auxiliary_logits=True"):
        from_transformers(outputs)


def test_the_documented_example_runs() -> None:
    code = re.search(r"## Any DETR-like model.*?```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert code is not None
    assert len(code[1].strip().splitlines()) <= 10
    images = [(0, torch.randn(3, 64, 96), torch.rand(2, 64, 96) > 0.5, torch.tensor([0, 2]))]
    names: dict = {"model": mask2former(), "images": images}
    exec(code[1], names)
    assert isinstance(names["recorder"], LayerRecorder)
    assert names["recorder"].summary()["layers"]["Util"][-1] == 100
