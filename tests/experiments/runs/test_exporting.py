"""What was trained here gives the same outputs where others load it: the public Mask2Former's names, transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.runs.exporting import export
from experiments.store.records import save
from experiments.store.run_dir import RunDir, Store, Trained
from experiments.suites.scales import base
from mpformer.config.schema import Config, ResNetConfig, SwinConfig, TimmConfig
from mpformer.modeling.huggingface import image_processor
from mpformer.modeling.meta_arch import MPFormer, build_model
from mpformer.modeling.weights import load_weights, read_weights
from mpformer.runtime.errors import UserError

SMALL = {
    "model.hidden_dim": 16,
    "model.conv_dim": 32,
    "model.mask_dim": 16,
    "model.heads": 2,
    "model.encoder_ffn": 16,
    "model.decoder_ffn": 16,
    "model.queries": 8,
    "model.decoder_layers": 3,
    "toggles.mp_queries": True,
}
R18 = ResNetConfig(depth=18, stem_channels=8, res2_channels=8, norm="BN")
R50 = ResNetConfig(depth=50, stem_channels=8, res2_channels=16, width_per_group=4, norm="FrozenBN")
SWIN = SwinConfig(embed_dim=16, depths=(1, 2, 1, 1), heads=(1, 2, 2, 2), window=4, drop_path=0.0)
COARSE = {"model.attention_strides": (32, 16, 8), "model.size_divisibility": 32}


def small(backbone: Any, **more: Any) -> Config:
    changes = {"model.backbone": backbone.model_dump()} | {k.replace("__", "."): v for k, v in more.items()}
    return base("mini").replace(SMALL | changes)


CONFIGS = {
    "mini, ResNet-18": small(R18),
    "ResNet-50, no query position": small(R50, toggles__query_position=False).replace(COARSE),
    "Swin": small(SWIN).replace(COARSE),
}


@pytest.fixture
def finished(tmp_path: Path) -> Callable[[Config], tuple[RunDir, MPFormer]]:
    """A run whose final weights are no longer those that it was initialised with, and its model."""

    def make(config: Config) -> tuple[RunDir, MPFormer]:
        run = Store(tmp_path / "store").run("trained")
        run.create(config, "row")
        model = build_model(config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        (run.path / "checkpoints").mkdir()
        torch.save({"model": model.state_dict()}, run.path / "checkpoints" / "final.pth")
        save(run.path / "trained.json", Trained("0" * 64, "checkpoints/final.pth"))
        return run, model

    return make


@torch.no_grad()
def outputs(model: MPFormer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits (L + 1, B, N, C + 1) and mask logits (L + 1, B, N, h, w) of every head."""
    found = model.sem_seg_head.predictor(model.pixel_features(images))
    return found.logits, torch.stack([found.masks(layer) for layer in range(len(found.logits))])


IMAGES = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("file", ["out.pth", "out.pkl"])
def test_mask2formers_form_is_the_plain_model_with_the_same_outputs(
    name: str, file: str, finished: Callable[..., Any], tmp_path: Path
) -> None:
    """It loads into plain Mask2Former with nothing missing and nothing left over, and no piloted part is in it."""
    run, model = finished(CONFIGS[name])
    export(run, "mask2former", tmp_path / file)
    assert not [key for key in read_weights(tmp_path / file) if "label_enc" in key or "criterion" in key]
    plain = build_model(CONFIGS[name].replace({"toggles.mp_queries": False, "toggles.query_position": True}))
    assert load_weights(plain, tmp_path / file)["kept"] == []
    for ours, theirs in zip(outputs(model, IMAGES), outputs(plain.eval(), IMAGES), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_huggingfaces_form_gives_the_same_outputs_in_transformers(
    name: str, finished: Callable[..., Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    run, model = finished(CONFIGS[name])
    export(run, "huggingface", tmp_path / "out")
    theirs = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.id2label[0] == "disc"
    with torch.no_grad():
        found = theirs(pixel_values=IMAGES)
    logits, masks = outputs(model, IMAGES)
    heads = [*found.auxiliary_logits, found]
    assert len(heads) == len(logits)
    for layer, head in enumerate(heads):
        torch.testing.assert_close(logits[layer], head["class_queries_logits"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(masks[layer], head["masks_queries_logits"], atol=1e-3, rtol=1e-4)


def test_huggingfaces_image_processor_normalises_as_the_model_does(
    finished: Callable[..., Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    run, model = finished(CONFIGS["mini, ResNet-18"])
    export(run, "huggingface", tmp_path / "out")
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    processor = transformers.Mask2FormerImageProcessor.from_pretrained(tmp_path / "out")
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(model.preprocess([{"image": image}]).tensor, theirs, atol=1e-4, rtol=1e-4)
    size = image_processor(base("paper")).size
    assert (size["shortest_edge"], size["longest_edge"]) == (800, 1333)


@pytest.mark.parametrize(
    ("config", "form", "file", "message"),
    [
        (small(R18), "mask2former", "out.bin", r"valid: \.pth \(torch\), \.pkl"),
        (small(TimmConfig(name="timm/test_convnext")), "mask2former", "out.pth", "has no backbone timm/test_convnext"),
        (
            small(TimmConfig(name="timm/test_convnext")),
            "huggingface",
            "out",
            "no backbone test_convnext; valid: ResNets",
        ),
        (small(R18.model_copy(update={"norm": "GN"})), "huggingface", "out", "have no group normalisation"),
        (small(R18, model__attention_strides=(16, 8)), "huggingface", "out", "attends at three strides that follow"),
        (small(R18, model__conv_dim=16), "huggingface", "out", "groups of 32; model.conv_dim is 16"),
        (small(R18), "mask2former", "there.pth", r"there\.pth is there already; choose another name"),
    ],
)
def test_what_a_form_cannot_say_is_refused(
    config: Config, form: Any, file: str, message: str, finished: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "there.pth").touch()
    run, _ = finished(config)
    with pytest.raises(UserError, match=message):
        export(run, form, tmp_path / file)
    assert {path.name for path in tmp_path.iterdir()} == {"store", "there.pth"}


def test_a_run_without_final_weights_is_refused(tmp_path: Path) -> None:
    run = Store(tmp_path).run("begun")
    run.create(small(R18), "row")
    with pytest.raises(UserError, match="begun is not trained to its end"):
        export(run, "mask2former", tmp_path / "out.pth")
