"""Named values that the parts of the model hand to each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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
    """Ground truth of a batch, padded to the batch's image size; the objects of its images follow each other."""

    all_labels: Tensor
    """(objects of all images,) int64 contiguous class ids."""
    all_masks: Tensor
    """(objects of all images, H, W) bool, padded at the bottom and right."""
    counts: tuple[int, ...]
    """Objects per image."""

    @property
    def labels(self) -> tuple[Tensor, ...]:
        """Per image (n,)."""
        return self.all_labels.split(self.counts)

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """Per image (n, H, W)."""
        return self.all_masks.split(self.counts)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the padded images."""
        return self.all_masks.shape[-2], self.all_masks.shape[-1]


def padded_targets(labels: Sequence[Tensor], masks: Sequence[Tensor], size: tuple[int, int]) -> Targets:
    """Pad every image's masks (n, h, w) at the bottom and right to ``size`` = (H, W)."""
    counts = tuple(len(part) for part in labels)
    padded = torch.zeros(sum(counts), *size, dtype=torch.bool, device=masks[0].device)
    for place, part in zip(padded.split(counts), masks, strict=True):
        place[:, : part.shape[-2], : part.shape[-1]] = part
    return Targets(torch.cat(list(labels)).long(), padded, counts)
