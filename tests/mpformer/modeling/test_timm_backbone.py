"""Backbones of timm, a small one of each family: features, files, frozen stages, learning rates, refusals."""

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpformer.config.schema import ScheduleConfig, TimmConfig
from mpformer.modeling.backbones import build_backbone
from mpformer.modeling.weights import load_weights
from mpformer.runtime.errors import UserError
from mpformer.training.optimisation import optimizer

FAMILIES = {
    "ConvNeXt": TimmConfig(name="timm/test_convnext"),
    "Swin-V2": TimmConfig(
        name="timm/swinv2_tiny_window8_256",
        arguments={"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
    ),
    "EfficientNet": TimmConfig(name="timm/test_efficientnet"),
    "DINOv2": TimmConfig(
        name="timm/vit_small_patch14_dinov2",
        arguments={"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 112},
    ),
}
CHANNELS = {
    "ConvNeXt": [24, 32, 48, 64],
    "Swin-V2": [16, 32, 64, 128],
    "EfficientNet": [24, 32, 48, 64],
    "DINOv2": [256] * 4,
}
every_family = pytest.mark.parametrize("family", FAMILIES)


class Whole(nn.Module):
    """A model that is its backbone alone."""

    def __init__(self, config: TimmConfig, coarsest: int = 16) -> None:
        super().__init__()
        self.backbone = build_backbone(config, coarsest)

    def frozen(self) -> set[str]:
        return {name for name, value in self.backbone.named_parameters() if not value.requires_grad}


def published(config: TimmConfig, path: Path, **more: Any) -> dict[str, Tensor]:
    """A file as timm publishes it, with a classifier; returns its content."""
    arguments: dict[str, Any] = {**config.arguments, **more}
    model = timm.create_model(config.name.removeprefix("timm/"), **arguments)
    state = {name: torch.rand_like(value) if value.is_floating_point() else value
             for name, value in model.state_dict().items()}  # fmt: skip
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return state


@every_family
def test_a_random_model_gives_every_stride_at_sizes_of_its_own_and_learns_as_a_whole(family: str) -> None:
    backbone = build_backbone(FAMILIES[family], 32)
    found = backbone(torch.rand(2, 3, 96, 160))
    assert [tuple(maps.shape) for maps in found.values()] == [
        (2, channels, 96 // stride, 160 // stride)
        for channels, stride in zip(CHANNELS[family], (4, 8, 16, 32), strict=True)
    ]
    assert {name: spec.channels for name, spec in backbone.output_shape().items()} == {
        name: maps.shape[1] for name, maps in found.items()
    }
    sum(maps.square().sum() for maps in found.values()).backward()
    idle = [
        name for name, value in backbone.named_parameters() if value.grad is None or not value.grad.isfinite().all()
    ]
    assert not idle, "several processes need a gradient of every parameter"


@every_family
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_published_file_is_loaded_whole(family: str, suffix: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    state = published(config, tmp_path / f"w.{suffix}", num_classes=7)
    model = Whole(config)
    found = load_weights(model, tmp_path / f"w.{suffix}", allow_backbone=True)
    names = {name.split(".model.")[1]: value for name, value in model.state_dict().items() if ".model." in name}
    kept = {name for name, value in names.items() if not torch.equal(state[name], value)}
    assert kept == ({"pos_embed", "patch_embed.proj.weight"} if family == "DINOv2" else set()), "resampled, not kept"
    assert all(".simfp_" in name for name in found["kept"])
    assert bool(found["kept"]) is (family == "DINOv2")


def test_patches_of_another_size_are_resampled_by_timm(tmp_path: Path) -> None:
    """A plain picture is the same sum in patches of 14 and of 16 pixels."""
    config = FAMILIES["DINOv2"]
    state = published(config, tmp_path / "w.safetensors")
    state["patch_embed.proj.weight"] = torch.ones_like(state["patch_embed.proj.weight"])
    save_file(state, tmp_path / "w.safetensors")
    model = Whole(config)
    load_weights(model, tmp_path / "w.safetensors", allow_backbone=True)
    weight = model.state_dict()["backbone.net.body.model.patch_embed.proj.weight"]
    assert weight.shape[-2:] == (16, 16)
    assert weight.sum((1, 2, 3)) == pytest.approx(torch.full((32,), 3.0 * 14 * 14), rel=1e-3)


@every_family
def test_a_file_that_lacks_a_tensor_or_has_one_too_many_is_refused(family: str, tmp_path: Path) -> None:
    config, path = FAMILIES[family], tmp_path / "w.pth"
    state = published(config, path)
    name = next(
        name for name in state if name.endswith("norm2.weight") or name.endswith("bn2.weight") or "norm" in name
    )
    torch.save({other: value for other, value in state.items() if other != name}, path)
    with pytest.raises(UserError, match=rf"w\.pth does not fit the model: not the weights of {config.name}: .*{name}"):
        load_weights(Whole(config), path, allow_backbone=True)
    torch.save(state | {"blocks.0.extra.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=f"not the weights of {config.name}"):
        load_weights(Whole(config), path, allow_backbone=True)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    published(TimmConfig(name="timm/test_vit"), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth does not fit the model: not the weights of timm/test_convnext"):
        load_weights(Whole(FAMILIES["ConvNeXt"]), tmp_path / "w.pth", allow_backbone=True)


FROZEN = {  # a part of a parameter's name: from which `freeze_at` on it is frozen
    "ConvNeXt": {"stem.": 1, "stages.0.": 2, "stages.1.": 3, "stages.2.": 4, "stages.3.": 5},
    "Swin-V2": {"patch_embed.": 1, "layers.0.": 2, "layers.1.": 3, "layers.2.": 4, "layers.3.": 5},
    "EfficientNet": {"conv_stem": 1, "bn1": 1, "blocks.0.": 1, "blocks.1.": 2, "blocks.2.": 3, "blocks.3.": 4,
                     "blocks.4.": 5},
    "DINOv2": {"cls_token": 1, "pos_embed": 1, "patch_embed.": 1, "blocks.0.": 2, "blocks.1.": 3, "blocks.2.": 4,
               "blocks.3.": 5, "simfp_": 6},
}  # fmt: skip


@every_family
@pytest.mark.parametrize("freeze_at", range(6))
def test_frozen_stages_are_the_stem_and_the_first_stages(family: str, freeze_at: int) -> None:
    model = Whole(FAMILIES[family].model_copy(update={"freeze_at": freeze_at, "drop_path": 0.5}), 32)
    frozen, parameters = model.frozen(), dict(model.backbone.named_parameters())
    for name in parameters:
        short = name.split("model.")[-1]
        (since,) = (at for part, at in FROZEN[family].items() if short.startswith(part))
        assert (name in frozen) is (freeze_at >= since), name
    model.train()
    for name, module in model.backbone.named_modules():
        own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)}
        if own and own <= frozen and not name.endswith("body.model"):  # the whole model owns positions and tokens
            assert not module.training, "no stochastic depth, no new statistics"


@every_family
def test_the_multiplier_is_for_what_comes_from_files_and_norms_and_positions_do_not_decay(family: str) -> None:
    model = Whole(FAMILIES[family])
    schedule = ScheduleConfig(base_lr=1.0, backbone_multiplier=0.1, weight_decay=0.05)
    groups = optimizer(model, schedule).param_groups
    found = {id(value): (group["lr"], group["weight_decay"]) for group in groups for value in group["params"]}
    for name, value in model.named_parameters():
        rate, decay = found[id(value)]
        assert rate == (1.0 if ".simfp_" in name else pytest.approx(0.1)), name
        if any(part in name for part in ("pos_embed", "cls_token", "logit_scale", "cpb_mlp", "norm")):
            assert decay == 0, name
        elif name.endswith("weight") and value.ndim > 1:
            assert decay == 0.05, name


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("timm/mixer_s32_224", {}, "timm/mixer_s32_224 has no features that a .*: models .*timm/convnext_tiny"),
        ("timm/levit_128", {}, "its features have strides 16, 32, 64.*valid: models with features at strides 4, 8, 16"),
        ("timm/convnext_tinny", {}, "unknown timm model 'timm/convnext_tinny'; nearest: timm/convnext_tiny"),
        ("timm/test_vit", {"bananas": 2}, 'model.backbone.arguments {"bananas": 2}: .*unexpected keyword'),
    ],
)  # fmt: skip
def test_a_model_without_usable_features_is_refused_by_name(name: str, arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_backbone(TimmConfig(name=name, arguments=arguments), 32)
    assert "\n" not in str(caught.value)


def test_without_timm_a_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm/test_resnet needs timm, which is not installed: pip install timm"):
        build_backbone(TimmConfig(name="timm/test_resnet"), 32)
