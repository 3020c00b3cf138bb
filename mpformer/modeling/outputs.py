"""Named values that the parts of the model hand to each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape legend: B images, Q learnable queries, P piloted slots, C classes, L decoder layers, D mask channels,
# H x W the padded image, h x w the mask resolution (stride 4), n objects of an image, R rows (query, object).


@dataclass(frozen=True)
class DecoderOutput:
    """Predictions of all L + 1 heads; index 0 is the head on the bare learnable queries.

    Mask logits are kept factored as embedding x features and are multiplied out only where needed.
    """

    logits: Tensor
    """(L+1, B, Q, C+1) class logits of the matching part; the last class is "no object"."""
    mask_embed: Tensor
    """(L+1, B, Q, D) mask embeddings of the matching part."""
    mask_features: Tensor
    """(B, D, h, w) per-cell embeddings at stride 4."""
    pilot_logits: Tensor | None
    """(L+1, B, P, C+1) class logits of the piloted part."""
    pilot_mask_embed: Tensor | None
    """(L+1, B, P, D) mask embeddings of the piloted part."""
    empty_attention: Tensor
    """(L, B, Q) bool: attention rows that were fully blocked, before they were opened (matching part)."""

    @property
    def layers(self) -> int:
        """L, the number of decoder layers."""
        return self.logits.shape[0] - 1

    def masks(self, layer: int) -> Tensor:
        """Return the mask logits (B, Q, h, w) of one head of the matching part."""
        return torch.einsum("bqd,bdhw->bqhw", self.mask_embed[layer], self.mask_features)


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch, padded to the batch's image size."""

    labels: tuple[Tensor, ...]
    """Per image (n,) int64 contiguous class ids."""
    masks: tuple[Tensor, ...]
    """Per image (n, H, W) bool, padded at the bottom and right."""

    @property
    def counts(self) -> list[int]:
        """Objects per image."""
        return [len(labels) for labels in self.labels]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the padded images."""
        return self.masks[0].shape[-2], self.masks[0].shape[-1]


def padded_targets(labels: Sequence[Tensor], masks: Sequence[Tensor], size: tuple[int, int]) -> Targets:
    """Pad every image's masks (n, h, w) at the bottom and right to ``size`` = (H, W)."""
    height, width = size
    padded = [F.pad(m.bool(), (0, width - m.shape[-1], 0, height - m.shape[-2])) for m in masks]
    return Targets(tuple(label.long() for label in labels), tuple(padded))
