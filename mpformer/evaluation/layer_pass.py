"""One pass of a model over validation images: every decoder layer's outputs, image by image, in bounded memory.

Images of one size that follow each other share a forward pass. What evaluation during and after training has in common
is here; what is done with an image's outputs is up to the caller.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from analysis.matching import ALL, Grid, ImagePrediction, Selection
from mpformer.data.validation import GroundTruth, ValidationItem
from mpformer.modeling.inference import crop_and_resize, infer, relevant, resize
from mpformer.modeling.meta_arch import MPFormer
from mpformer.modeling.outputs import DecoderOutput
from mpformer.modeling.pixel_decoder import MASK_STRIDE

_BATCH_PIXELS = 16 * 128 * 128
_BATCH_IMAGES = 16
KEPT_LOGITS = 1 << 26
"""Mask logits of an image's layers (256 MiB) that are computed once; of larger images each use makes them again."""


@dataclass(frozen=True)
class _MaskLogits:
    """Mask logits of an image's layers, from mask embeddings (L + 1, Q, D) and mask features (D, h, w)."""

    embed: Tensor
    features: Tensor

    def __call__(self, start: int, stop: int, queries: Selection) -> Tensor:
        """(stop - start, k, h, w) of some layers and queries."""
        return self._multiplied(start, stop, queries) if self._all is None else self._all[start:stop, queries]

    @cached_property
    def _all(self) -> Tensor | None:
        layers, queries = self.embed.shape[:2]
        few = layers * queries * self.features[0].numel() <= KEPT_LOGITS
        return self._multiplied(0, layers, ALL) if few else None

    def _multiplied(self, start: int, stop: int, queries: Selection) -> Tensor:
        embed = self.embed[start:stop, queries].float()
        return (embed @ self.features.flatten(1).float()).unflatten(-1, self.features.shape[-2:])


@dataclass(frozen=True)
class ImageOutput:
    """One image with what every layer predicts for it."""

    model: MPFormer
    item: ValidationItem
    output: DecoderOutput
    index: int
    """Index of the image in the batch that ``output`` is of."""
    size: tuple[int, int]
    """(height, width) of the model's input without padding."""

    @property
    def truth(self) -> GroundTruth:
        """What the image is scored against."""
        return self.item.truth

    @property
    def image_id(self) -> int:
        """The image's id in the dataset."""
        return int(self.item.truth.image_id)

    @property
    def layers(self) -> int:
        """L + 1, the number of predictions."""
        return self.output.layers + 1

    @property
    def labels(self) -> Tensor:
        """(n,) classes of the objects that the model was to find."""
        return self.item.inputs["instances"].gt_classes

    @property
    def masks(self) -> Tensor:
        """(n, H, W) bool masks of these objects at the size of the model's input."""
        return self.item.inputs["instances"].gt_masks

    @property
    def empty_attention(self) -> Tensor:
        """(L, Q) bool: attention masks that were fully blocked."""
        return self.output.empty_attention[:, self.index]

    @property
    def padded(self) -> tuple[int, int]:
        """(height, width) of the model's input with padding."""
        height, width = self.output.mask_features.shape[-2:]
        return height * MASK_STRIDE, width * MASK_STRIDE

    @property
    def mask_cells(self) -> tuple[int, int]:
        """(h, w) of the mask features."""
        height, width = self.output.mask_features.shape[-2:]
        return height, width

    def mask_logits(self, start: int, stop: int, queries: Selection = ALL) -> Tensor:
        """(stop - start, k, h, w) mask logits of some layers and queries, padding included, on the model's device."""
        return self._mask_logits(start, stop, queries)

    @cached_property
    def _mask_logits(self) -> "_MaskLogits":
        return _MaskLogits(self.output.mask_embed[:, self.index], self.output.mask_features[self.index])

    @cached_property
    def prediction(self) -> ImagePrediction:
        """All layers at mask-feature resolution, for matching and layer metrics; on the model's device."""
        grid = Grid.of(self.mask_cells, self.size, MASK_STRIDE)
        height, width = grid.cells
        make = self._mask_logits  # a function that knew self would be a cycle, and keep an image's masks for long

        def logits(start: int, stop: int, queries: Selection) -> Tensor:
            return make(start, stop, queries)[..., :height, :width]

        return ImagePrediction(logits, self.output.logits[:, self.index], grid)

    def result(self, layer: int = -1) -> dict[str, Any]:
        """One layer's predictions in detectron2's format, at the image's original size."""
        logits, masks, padded = self._raw(layer)
        return infer(self.model.inference, logits, masks, padded, self.size, self._wanted)

    def resized(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's class logits (q, C + 1) and mask logits (q, H, W) at the image's original size.

        The q queries are those that a result can contain.
        """
        logits, masks, padded = self._raw(layer)
        if not self.model.inference.semantic:
            kept = relevant(self.model.inference, logits.float())
            logits, masks = logits[kept], masks[kept]
        return logits.float(), crop_and_resize(resize(masks.float(), padded), self.size, self._wanted)

    @property
    def _wanted(self) -> tuple[int, int]:
        return self.truth.height, self.truth.width

    def _raw(self, layer: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Class logits, mask logits (Q, h, w) and the padded input's (height, width)."""
        features = self.output.mask_features[self.index]
        masks = torch.einsum("qd,dhw->qhw", self.output.mask_embed[layer, self.index], features)
        return self.output.logits[layer, self.index], masks, self.padded


@torch.no_grad()
def image_outputs(model: MPFormer, items: Iterable[ValidationItem]) -> Iterator[ImageOutput]:
    """Run the model in evaluation mode over the items, in their order; leaves it in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        for batch in batches(items):
            output, sizes = model.layer_outputs([item.inputs for item in batch])
            for index, (item, size) in enumerate(zip(batch, sizes, strict=True)):
                yield ImageOutput(model, item, output, index, size)
    finally:
        model.train(training)


def batches(items: Iterable[ValidationItem]) -> Iterator[list[ValidationItem]]:
    """Runs of items of one size, cut so that a batch stays small."""
    for size, run in groupby(items, key=lambda item: tuple(item.inputs["image"].shape[-2:])):
        most = max(1, min(_BATCH_IMAGES, _BATCH_PIXELS // (size[0] * size[1])))
        batch: list[ValidationItem] = []
        for item in run:
            batch.append(item)
            if len(batch) == most:
                yield batch
                batch = []
        if batch:
            yield batch
