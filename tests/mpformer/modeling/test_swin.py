"""Our Swin: transformers' numbers under the released names, any image size, stochastic depth."""

import re
from collections.abc import Callable

import pytest
import torch

from mpformer.config.schema import SwinConfig
from mpformer.modeling.swin import Swin
from tests.support.small_models import small_model

SMALL = SwinConfig(embed_dim=16, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=4, drop_path=0.0)

NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^swin\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"^hidden_states_norms\.stage(\d)\.", lambda m: f"norm{int(m[1]) - 1}."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.self\.(relative_position\w+)", r".attn.\1"),
    (r"\.attention\.(relative_position\w+)", r".attn.\1"),
    (r"\.relative_position_bias\.(relative_position\w+)", r".\1"),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.proj\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
]


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        found = re.fullmatch(r"(.*)\.attention\.(?:self\.)?(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)", name)
        if found:
            joined.setdefault(f"{found[1]}.attn.qkv.{found[3]}", {})[found[2][0]] = value
        else:
            result[name] = value
    return result | {name: torch.cat([parts[k] for k in "qkv"]) for name, parts in joined.items()}


@pytest.mark.parametrize("size", [(64, 64), (52, 100)])
def test_equals_transformers(size: tuple[int, int]) -> None:
    from transformers import SwinBackbone
    from transformers import SwinConfig as TheirConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    theirs = SwinBackbone(
        TheirConfig(  # type: ignore[call-arg]  # its base class takes more than its signature says
            image_size=64,
            embed_dim=16,
            depths=[2, 2, 2, 2],
            num_heads=[1, 2, 4, 8],
            window_size=4,
            drop_path_rate=0.0,
            out_features=stages,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = Swin(SMALL).eval()
    missing, unexpected = ours.load_state_dict(renamed(theirs.state_dict()), strict=False)
    assert set(unexpected) == {"layernorm.weight", "layernorm.bias"}, "their classifier's norm"
    assert all("relative_position_index" in name for name in missing)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, features = theirs(images).feature_maps, ours(images)
    for i, maps in enumerate(expected[:1] if size[0] % 32 else expected):
        torch.testing.assert_close(features[f"res{i + 2}"], maps, atol=2e-4, rtol=2e-4)


def test_released_names() -> None:
    names = set(Swin(SMALL).state_dict())
    assert {
        "patch_embed.proj.weight",
        "patch_embed.norm.bias",
        "layers.0.blocks.1.attn.relative_position_bias_table",
        "layers.3.blocks.0.attn.relative_position_index",
        "layers.2.downsample.reduction.weight",
        "layers.2.downsample.norm.weight",
        "layers.0.blocks.0.mlp.fc2.bias",
        "norm3.weight",
    } <= names
    assert not any(name.startswith("layers.3.downsample") for name in names)


def test_any_size_and_checkpointing() -> None:
    images = torch.randn(1, 3, 72, 40)
    plain, frugal = Swin(SMALL), Swin(SMALL.model_copy(update={"checkpoint": True}))
    frugal.load_state_dict(plain.state_dict())
    outputs = [model(images) for model in (plain, frugal)]
    assert [f.shape[-2:] for f in outputs[0].values()] == [(18, 10), (9, 5), (5, 3), (3, 2)]
    for output in outputs:
        sum(f.square().mean() for f in output.values()).backward()
    for a, b in zip(plain.parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_stochastic_depth_only_in_training() -> None:
    model = Swin(SMALL.model_copy(update={"drop_path": 0.5}))
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(0)
    assert not torch.equal(model(images)["res5"], model(images)["res5"])
    model.eval()
    assert torch.equal(model(images)["res5"], model(images)["res5"])


def test_whole_model_on_swin() -> None:
    model = small_model(model__backbone=SMALL.model_dump()).eval()
    assert "res5" not in model.backbone.output_shape()
    assert len(model([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}])[0]["instances"]) > 0
