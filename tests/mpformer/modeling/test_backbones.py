"""The backbones: every typed configuration has its own builder and name, and gives features by stride."""

import pytest
import torch

from mpformer.config.schema import BACKBONE_CONFIGS, BackboneConfig, ResNetConfig, SwinConfig, TimmConfig
from mpformer.modeling.backbones import build_backbone, strides_of

SMALL: tuple[BackboneConfig, ...] = (
    ResNetConfig(depth=18, stem_channels=8, res2_channels=8, norm="GN"),
    SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), window=4, drop_path=0.0),
    TimmConfig(name="timm/test_efficientnet"),
)


def test_every_configuration_is_tested_and_has_its_own_name_and_builder() -> None:
    assert set(BACKBONE_CONFIGS) == {type(config) for config in SMALL}
    assert len({config.detectron2_name for config in BACKBONE_CONFIGS}) == len(BACKBONE_CONFIGS)
    assert len({config.builder for config in BACKBONE_CONFIGS}) == len(BACKBONE_CONFIGS)
    assert len({config.title for config in SMALL}) == len(SMALL)


@pytest.mark.parametrize("config", SMALL, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("coarsest", [16, 32])
def test_every_entry_gives_features_down_to_the_coarsest_stride(config: BackboneConfig, coarsest: int) -> None:
    backbone = build_backbone(config, coarsest)
    found = backbone(torch.rand(1, 3, 64, 64))
    strides = strides_of(backbone)
    assert sorted(strides) == [stride for stride in (4, 8, 16, 32) if stride <= coarsest]
    assert all(found[name].shape[-2:] == (64 // stride, 64 // stride) for stride, name in strides.items())
