"""Adapter: outputs of Hugging Face ``transformers``' Mask2Former as the plain tensors of this package."""

from typing import Any

import torch
from torch import Tensor


def from_transformers(outputs: Any) -> tuple[Tensor, Tensor]:
    """(mask logits (B, A, Q, h, w), class logits (B, A, Q, C + 1)) of all layers, layer 0 (the bare queries) first,
    the last layer last.

    ``outputs`` is what ``Mask2FormerForUniversalSegmentation`` returns when called with
    ``output_auxiliary_logits=True``. Its class logits have "no object" last, as here; its mask logits are at stride
    4 of the pixel values, padding included. Raises ValueError if the layers' outputs are not there.
    """
    layers = getattr(outputs, "auxiliary_logits", None)
    if not layers:
        raise ValueError("no outputs of the layers: call the model with output_auxiliary_logits=True")
    masks = [layer["masks_queries_logits"] for layer in layers] + [outputs.masks_queries_logits]
    classes = [layer["class_queries_logits"] for layer in layers] + [outputs.class_queries_logits]
    return torch.stack(masks, 1), torch.stack(classes, 1)
