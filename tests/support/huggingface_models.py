"""Small models of Hugging Face transformers with random weights, without dropout, in evaluation mode."""

from typing import Any

import torch
import transformers as _transformers

transformers: Any = _transformers  # the configurations take more than their signatures say


def _swin() -> Any:
    return transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


def mask2former(**config: Any) -> Any:
    """Four decoder layers' heads, the bare queries' among them."""
    torch.manual_seed(0)
    sizes = {
        "backbone_config": _swin(), "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32,
        "encoder_feedforward_dim": 32, "encoder_layers": 1, "decoder_layers": 4, "num_attention_heads": 2,
        "dim_feedforward": 32, "num_queries": 6, "num_labels": 3, "train_num_points": 64,
    }  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(**(sizes | config))).eval()


def oneformer() -> Any:
    """Three decoder layers' heads and those of its first queries; call it with ``task_inputs`` (B, 77) too."""
    torch.manual_seed(0)
    config = transformers.OneFormerConfig(
        backbone_config=_swin(), conv_dim=32, mask_dim=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1,
        decoder_layers=4, query_dec_layers=1, num_attention_heads=2, dim_feedforward=32, num_queries=6, num_labels=3,
        dropout=0.0,
    )  # fmt: skip
    return transformers.OneFormerForUniversalSegmentation(config).eval()


def maskformer() -> Any:
    """Three decoder layers; its queries are zeros before the first."""
    torch.manual_seed(0)
    decoder = transformers.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=6, dropout=0.0,
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        backbone_config=_swin(), decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=3,
        use_auxiliary_loss=True,
    )  # fmt: skip
    return transformers.MaskFormerForInstanceSegmentation(config).eval()
