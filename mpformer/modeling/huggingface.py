"""Our weights in transformers' Mask2Former (Hugging Face): the same network under other names, with the same outputs.

transformers is optional; it is imported where it is used. What its model cannot be is refused in one line.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpformer.config.schema import Config, ModelConfig, ResNetConfig, SwinConfig
from mpformer.modeling.resnet import BLOCKS
from mpformer.runtime.errors import UserError

_ENCODER = r"model\.pixel_level_module\.encoder\."
_DECODER = r"model\.pixel_level_module\.decoder\."
_PIXELS = "sem_seg_head.pixel_decoder."
_PREDICTOR = "sem_seg_head.predictor."

_NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    # a ResNet
    (rf"{_ENCODER}embedder\.embedder\.convolution\.", "backbone.stem.conv1."),
    (rf"{_ENCODER}embedder\.embedder\.normalization\.", "backbone.stem.conv1.norm."),
    (
        rf"{_ENCODER}encoder\.stages\.(\d+)\.layers\.(\d+)\.",
        lambda found: f"backbone.res{int(found[1]) + 2}.{found[2]}.",
    ),
    (r"layer\.(\d)\.convolution\.", lambda found: f"conv{int(found[1]) + 1}."),
    (r"layer\.(\d)\.normalization\.", lambda found: f"conv{int(found[1]) + 1}.norm."),
    (r"shortcut\.convolution\.", "shortcut."),
    (r"shortcut\.normalization\.", "shortcut.norm."),
    # a Swin
    (rf"{_ENCODER}hidden_states_norms\.stage(\d)\.", lambda found: f"backbone.norm{int(found[1]) - 1}."),
    (rf"{_ENCODER}swin\.embeddings\.patch_embeddings\.projection\.", "backbone.patch_embed.proj."),
    (rf"{_ENCODER}swin\.embeddings\.norm\.", "backbone.patch_embed.norm."),
    (rf"{_ENCODER}swin\.encoder\.layers\.", "backbone.layers."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"(backbone.*)\.attention\.o_proj\.", r"\1.attn.proj."),
    (r"(backbone.*)\.attention\.([qkv])_proj\.", r"\1.attn.\2_proj."),
    (r"\.attention\.relative_position_bias\.", ".attn."),
    # the pixel decoder
    (rf"{_DECODER}level_embed", f"{_PIXELS}transformer.level_embed"),
    (rf"{_DECODER}input_projections\.", f"{_PIXELS}input_proj."),
    (rf"{_DECODER}mask_projection\.", f"{_PIXELS}mask_features."),
    (rf"{_DECODER}(adapter_1|layer_1)\.0\.", rf"{_PIXELS}\1."),
    (rf"{_DECODER}(adapter_1|layer_1)\.1\.", rf"{_PIXELS}\1.norm."),
    (rf"{_DECODER}encoder\.", f"{_PIXELS}transformer.encoder."),
    (r"(transformer\.encoder\.layers\.\d+\.)self_attn_layer_norm\.", r"\1norm1."),
    (r"(transformer\.encoder\.layers\.\d+\.)final_layer_norm\.", r"\1norm2."),
    (r"(transformer\.encoder\.layers\.\d+\.)fc(\d)\.", r"\1linear\2."),
    # the decoder
    (r"model\.transformer_module\.queries_embedder\.", f"{_PREDICTOR}query_embed."),
    (r"model\.transformer_module\.queries_features\.", f"{_PREDICTOR}query_feat."),
    (r"model\.transformer_module\.level_embed\.", f"{_PREDICTOR}level_embed."),
    (r"model\.transformer_module\.input_projections\.", f"{_PREDICTOR}input_proj."),
    (r"model\.transformer_module\.decoder\.layernorm\.", f"{_PREDICTOR}decoder_norm."),
    (
        r"model\.transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.",
        rf"{_PREDICTOR}mask_embed.layers.\1.",
    ),
    (r"model\.transformer_module\.decoder\.layers\.(\d+)\.", r"predictor.layers.\1."),
    (r"predictor\.layers\.(\d+)\.self_attn\.", rf"{_PREDICTOR}transformer_self_attention_layers.\1.self_attn."),
    (r"predictor\.layers\.(\d+)\.self_attn_layer_norm\.", rf"{_PREDICTOR}transformer_self_attention_layers.\1.norm."),
    (r"predictor\.layers\.(\d+)\.cross_attn\.", rf"{_PREDICTOR}transformer_cross_attention_layers.\1.multihead_attn."),
    (r"predictor\.layers\.(\d+)\.cross_attn_layer_norm\.", rf"{_PREDICTOR}transformer_cross_attention_layers.\1.norm."),
    (r"predictor\.layers\.(\d+)\.fc(\d)\.", rf"{_PREDICTOR}transformer_ffn_layers.\1.linear\2."),
    (r"predictor\.layers\.(\d+)\.final_layer_norm\.", rf"{_PREDICTOR}transformer_ffn_layers.\1.norm."),
    (r"^class_predictor\.", f"{_PREDICTOR}class_embed."),
]
"""Theirs -> ours, in this order. Query, key and value of an attention are separate there and one matrix here."""

_UNUSED = re.compile(r".*\.num_batches_tracked|model\.pixel_level_module\.encoder\.swin\.layernorm\..*|criterion\..*")
"""Theirs alone: counters, and the norm before a classifier that is not there."""


def our_name(name: str) -> str:
    """One name of theirs as ours; query, key and value are not yet joined."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def build_huggingface(model: ModelConfig, classes: int | Sequence[str]) -> Any:
    """Return transformers' ``Mask2FormerForUniversalSegmentation`` of the same network, with random weights.

    ``classes`` is their number, or their names. Raises UserError if transformers is not there or has no such network.
    """
    _check(model)
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UserError(f"Hugging Face's form needs transformers ({error.name}): pip install transformers") from None
    labels = [str(i) for i in range(classes)] if isinstance(classes, int) else list(classes)
    config = transformers.Mask2FormerConfig(
        backbone_config=_backbone(model, transformers),
        feature_strides=[stride for stride in (4, 8, 16, 32) if stride <= model.attention_strides[0]],
        feature_size=model.conv_dim,
        mask_feature_size=model.mask_dim,
        hidden_dim=model.hidden_dim,
        encoder_feedforward_dim=model.encoder_ffn,
        encoder_layers=model.encoder_layers,
        decoder_layers=model.decoder_layers + 1,  # they count the prediction of the bare queries
        num_attention_heads=model.heads,
        dim_feedforward=model.decoder_ffn,
        num_queries=model.queries,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        train_num_points=model.train_points,
        oversample_ratio=model.oversample_ratio,
        importance_sample_ratio=model.importance_sample_ratio,
        no_object_weight=model.no_object_weight,
        class_weight=model.class_weight,
        mask_weight=model.mask_weight,
        dice_weight=model.dice_weight,
        output_auxiliary_logits=True,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


def _check(model: ModelConfig) -> None:
    """Raise UserError for a network that transformers does not have."""
    if len(model.attention_strides) != 3 or model.attention_strides[-1] * 4 != model.attention_strides[0]:
        raise UserError(
            "transformers' Mask2Former attends at three strides that follow each other, such as 32, 16, 8; "
            f"model.attention_strides is {model.attention_strides}"
        )
    if model.conv_dim % 32:
        raise UserError(f"Mask2Former's pixel decoder has groups of 32; model.conv_dim is {model.conv_dim}")


def _backbone(model: ModelConfig, transformers: Any) -> Any:
    config, count = model.backbone, model.attention_strides[0].bit_length() - 2
    stages = [f"stage{i + 1}" for i in range(count)]
    if isinstance(config, SwinConfig):
        return transformers.SwinConfig(
            image_size=config.pretrain_size,
            embed_dim=config.embed_dim,
            depths=list(config.depths[:count]),
            num_heads=list(config.heads[:count]),
            window_size=config.window,
            drop_path_rate=config.drop_path,
            out_features=stages,
        )
    if not isinstance(config, ResNetConfig):
        raise UserError(f"Hugging Face's form has no backbone {config.title}; valid: ResNets and Swin transformers")
    bottleneck = config.depth >= 50
    if config.norm == "GN" or (bottleneck and config.res2_channels != 4 * config.width_per_group):
        what = "group normalisation" if config.norm == "GN" else "a bottleneck of another width than a quarter"
        raise UserError(f"Hugging Face's ResNets have no {what}: this backbone cannot be written in that form")
    return transformers.ResNetConfig(
        embedding_size=config.stem_channels,
        hidden_sizes=[config.res2_channels * 2**i for i in range(count)],
        depths=list(BLOCKS[config.depth][:count]),
        layer_type="bottleneck" if bottleneck else "basic",
        out_features=stages,
    )


def load_ours(theirs: Any, state: Mapping[str, Tensor]) -> None:
    """Give transformers' model the weights of ours, without a piloted part; a missing position embedding is zero.

    Raises UserError if one of its tensors has no counterpart.
    """
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            if not _UNUSED.fullmatch(name):
                value.copy_(_counterpart(name, value, state).view_as(value))


def _counterpart(name: str, value: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    target = our_name(name)
    if target not in state and target.endswith("query_embed.weight"):
        return torch.zeros_like(value)
    joined = re.sub(r"attn\.([qkv])_proj\.", "attn.qkv.", target) if target.startswith("backbone.") else ""
    if joined not in ("", target):
        return state[joined].chunk(3)["qkv".index(target.rsplit("_proj.", 1)[0][-1])]
    found = re.search(r"\.([qkv])_proj\.", target)
    if found and target not in state:
        return state[target.replace(found[0], ".in_proj_")].chunk(3)["qkv".index(found[1])]
    if target not in state:
        raise UserError(f"{name} of transformers' Mask2Former has no counterpart here")
    return state[target]


def image_processor(config: Config) -> Any:
    """Return transformers' image processor with this configuration's normalisation and evaluation size."""
    import transformers

    model, scored = config.model, config.evaluation
    options: dict[str, Any] = {"do_resize": scored.min_size_test > 0}
    if scored.min_size_test:
        options["size"] = {"shortest_edge": scored.min_size_test, "longest_edge": scored.max_size_test or 10**6}
    return transformers.Mask2FormerImageProcessor(
        **options,
        size_divisor=model.size_divisibility,
        image_mean=[value / 255 for value in model.pixel_mean],
        image_std=[value / 255 for value in model.pixel_std],
        ignore_index=255,
    )
