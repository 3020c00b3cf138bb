"""Hugging Face transformers' Mask2Former as an outside peer: same size, weights under the released names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mpformer.modeling.huggingface import build_huggingface, load_ours, our_name

__all__ = ["build_peer", "load_ours", "renamed"]

build_peer = build_huggingface


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' state dict under the released names."""
    ours = {our_name(name): value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    for name in [n for n in ours if ".q_proj." in n]:
        kind = name.rsplit(".", 1)[1]
        parts = [ours.pop(name.replace(".q_proj.", f".{p}_proj.")) for p in "qkv"]
        ours[name.replace(f".q_proj.{kind}", f".in_proj_{kind}")] = torch.cat(parts)
    return ours
