"""Hugging Face transformers' Mask2Former as an outside peer: same size, weights renamed to the released names."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

from mpformer.config.schema import ModelConfig
from mpformer.config.schema import ResNetConfig as OurResNet

BLOCKS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}

# Theirs -> ours. Query, key and value of the self-attention are separate there and one matrix here.
NAMES: list[tuple[str, str]] = [
    (r"model\.pixel_level_module\.encoder\.embedder\.embedder\.convolution\.", r"backbone.stem.conv1."),
    (r"model\.pixel_level_module\.encoder\.embedder\.embedder\.normalization\.", r"backbone.stem.conv1.norm."),
    (r"model\.pixel_level_module\.encoder\.encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"backbone.stage\1.\2."),
    (r"layer\.0\.convolution\.", "conv1."),
    (r"layer\.1\.convolution\.", "conv2."),
    (r"layer\.2\.convolution\.", "conv3."),
    (r"layer\.0\.normalization\.", "conv1.norm."),
    (r"layer\.1\.normalization\.", "conv2.norm."),
    (r"layer\.2\.normalization\.", "conv3.norm."),
    (r"shortcut\.convolution\.", "shortcut."),
    (r"shortcut\.normalization\.", "shortcut.norm."),
    (r"model\.pixel_level_module\.decoder\.level_embed", "sem_seg_head.pixel_decoder.transformer.level_embed"),
    (r"model\.pixel_level_module\.decoder\.input_projections\.", "sem_seg_head.pixel_decoder.input_proj."),
    (r"model\.pixel_level_module\.decoder\.mask_projection\.", "sem_seg_head.pixel_decoder.mask_features."),
    (r"model\.pixel_level_module\.decoder\.(adapter_1|layer_1)\.0\.", r"sem_seg_head.pixel_decoder.\1."),
    (r"model\.pixel_level_module\.decoder\.(adapter_1|layer_1)\.1\.", r"sem_seg_head.pixel_decoder.\1.norm."),
    (r"model\.pixel_level_module\.decoder\.encoder\.", "sem_seg_head.pixel_decoder.transformer.encoder."),
    (r"(transformer\.encoder\.layers\.\d+\.)self_attn_layer_norm\.", r"\1norm1."),
    (r"(transformer\.encoder\.layers\.\d+\.)final_layer_norm\.", r"\1norm2."),
    (r"(transformer\.encoder\.layers\.\d+\.)fc(\d)\.", r"\1linear\2."),
    (r"model\.transformer_module\.queries_embedder\.", "sem_seg_head.predictor.query_embed."),
    (r"model\.transformer_module\.queries_features\.", "sem_seg_head.predictor.query_feat."),
    (r"model\.transformer_module\.level_embed\.", "sem_seg_head.predictor.level_embed."),
    (r"model\.transformer_module\.input_projections\.", "sem_seg_head.predictor.input_proj."),
    (r"model\.transformer_module\.decoder\.layernorm\.", "sem_seg_head.predictor.decoder_norm."),
    (
        r"model\.transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.",
        r"sem_seg_head.predictor.mask_embed.layers.\1.",
    ),
    (r"model\.transformer_module\.decoder\.layers\.(\d+)\.", r"predictor.layers.\1."),
    (
        r"predictor\.layers\.(\d+)\.self_attn\.",
        r"sem_seg_head.predictor.transformer_self_attention_layers.\1.self_attn.",
    ),
    (
        r"predictor\.layers\.(\d+)\.self_attn_layer_norm\.",
        r"sem_seg_head.predictor.transformer_self_attention_layers.\1.norm.",
    ),
    (
        r"predictor\.layers\.(\d+)\.cross_attn\.",
        r"sem_seg_head.predictor.transformer_cross_attention_layers.\1.multihead_attn.",
    ),
    (
        r"predictor\.layers\.(\d+)\.cross_attn_layer_norm\.",
        r"sem_seg_head.predictor.transformer_cross_attention_layers.\1.norm.",
    ),
    (r"predictor\.layers\.(\d+)\.fc(\d)\.", r"sem_seg_head.predictor.transformer_ffn_layers.\1.linear\2."),
    (r"predictor\.layers\.(\d+)\.final_layer_norm\.", r"sem_seg_head.predictor.transformer_ffn_layers.\1.norm."),
    (r"^class_predictor\.", "sem_seg_head.predictor.class_embed."),
]


def build_peer(model: ModelConfig, classes: int) -> Mask2FormerForUniversalSegmentation:
    """transformers' Mask2Former with the sizes of ``model``; its batch norms stay in evaluation mode (frozen)."""
    backbone = model.backbone
    assert isinstance(backbone, OurResNet)
    assert backbone.res2_channels == 4 * backbone.width_per_group
    assert tuple(model.attention_strides) == (32, 16, 8)
    resnet = ResNetConfig(  # type: ignore[call-arg]  # its base class takes more than its signature says
        embedding_size=backbone.stem_channels,
        hidden_sizes=[backbone.res2_channels * 2**i for i in range(4)],
        depths=BLOCKS[backbone.depth],
        layer_type="bottleneck",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(  # type: ignore[call-arg]  # likewise
        backbone_config=resnet,
        feature_size=model.conv_dim,
        mask_feature_size=model.mask_dim,
        hidden_dim=model.hidden_dim,
        encoder_feedforward_dim=model.encoder_ffn,
        encoder_layers=model.encoder_layers,
        decoder_layers=model.decoder_layers + 1,
        num_attention_heads=model.heads,
        dim_feedforward=model.decoder_ffn,
        num_queries=model.queries,
        num_labels=classes,
        train_num_points=model.train_points,
        oversample_ratio=model.oversample_ratio,
        importance_sample_ratio=model.importance_sample_ratio,
        no_object_weight=model.no_object_weight,
        class_weight=model.class_weight,
        mask_weight=model.mask_weight,
        dice_weight=model.dice_weight,
        output_auxiliary_logits=True,
    )
    return Mask2FormerForUniversalSegmentation(config).eval()


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' state dict under the released names."""
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            ours[our_name(name)] = value
    for name in [n for n in ours if ".q_proj." in n]:
        kind = name.rsplit(".", 1)[1]
        parts = [ours.pop(name.replace(".q_proj.", f".{p}_proj.")) for p in "qkv"]
        ours[name.replace(f".q_proj.{kind}", f".in_proj_{kind}")] = torch.cat(parts)
    return ours


def our_name(name: str) -> str:
    """One name of theirs as ours (query, key and value not yet joined)."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"backbone\.stage(\d)\.", lambda m: f"backbone.res{int(m[1]) + 2}.", name)


def load_ours(peer: Mask2FormerForUniversalSegmentation, state: Mapping[str, Tensor]) -> None:
    """Give the peer weights under the released names; every one of its tensors must be found."""
    own = peer.state_dict()
    for name, value in own.items():
        if not name.endswith("num_batches_tracked"):
            value.copy_(_part(name, state).view_as(value))


def _part(name: str, state: Mapping[str, Tensor]) -> Tensor:
    target = our_name(name)
    for i, projection in enumerate("qkv"):
        if f".{projection}_proj." in target:
            joined = state[target.replace(f".{projection}_proj.", ".in_proj_")]
            return joined.chunk(3)[i]
    return state[target]
