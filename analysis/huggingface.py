"""Adapter: outputs of Hugging Face ``transformers``' models as the plain tensors of this package.

A test runs each of :data:`MODELS`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

MODELS = {
    "Mask2FormerForUniversalSegmentationOutput": ("auxiliary_logits", 0),
    "OneFormerForUniversalSegmentationOutput": ("auxiliary_predictions", 0),
    "MaskFormerForInstanceSegmentationOutput": ("auxiliary_logits", 1),
}
"""Output class -> where it keeps the layers before the last, and the number of the first of them: MaskFormer has no
layer 0, since its queries are zeros before the first decoder layer, all alike."""


class LayerOutputs(NamedTuple):
    """What a model predicts at its layers, the last layer last."""

    masks: Tensor
    """(B, A, Q, h, w) logits at stride 4 of the pixel values, padding included."""
    classes: Tensor
    """(B, A, Q, C + 1) logits, "no object" last."""
    first_layer: int
    """The number of the first of the A layers: 0, the bare queries, or 1 where the model predicts nothing from them."""


def from_transformers(outputs: Any) -> LayerOutputs:
    """The outputs of all layers of Mask2Former, OneFormer or MaskFormer.

    ``outputs`` is what ``Mask2FormerForUniversalSegmentation``, ``OneFormerForUniversalSegmentation`` or
    ``MaskFormerForInstanceSegmentation`` returns when it is called with ``output_auxiliary_logits=True``; MaskFormer
    needs ``output_hidden_states=True`` and ``use_auxiliary_loss=True`` in its configuration besides. OneFormer's
    queries have seen the image before its first decoder layer: its layer 0 depends on it. Raises ValueError for another
    model, and if the layers' outputs are not there.
    """
    kinds = [MODELS[base.__name__] for base in type(outputs).__mro__ if base.__name__ in MODELS]
    if not kinds:
        raise ValueError(f"outputs of a model that is not known, {type(outputs).__name__}; valid: {', '.join(MODELS)}")
    name, first_layer = kinds[0]
    layers = outputs.get(name)
    if not layers:
        raise ValueError("no outputs of the layers: call the model with output_auxiliary_logits=True")
    everything = [*layers, outputs]
    if first_layer and _queries_are_alike(layers[0]["class_queries_logits"]):
        everything = everything[1:]  # the heads on zeros, which releases of transformers put before the first layer
    masks, classes = (
        torch.stack([layer[kind] for layer in everything], 1)
        for kind in ("masks_queries_logits", "class_queries_logits")
    )
    return LayerOutputs(masks, classes, first_layer)


def _queries_are_alike(classes: Tensor) -> bool:
    """Whether all queries of class logits (B, Q, C + 1) say the same."""
    return bool((classes == classes[:, :1]).all())
