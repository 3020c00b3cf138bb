"""Why mask piloting helps, measured on a model: where its attention masks miss, and what that does to the gradients.

The decoder runs twice over the same images, once attending through the masks that it predicts, once with every query
that ends on an object attending through that object's ground truth. Matching (that of the last layer under predicted
masks), targets and pixel features are the same in both. The gradient of a query's mask loss (binary cross-entropy and
dice over all cells, with the training's weights; no random points) with respect to its mask embedding is compared,
layer by layer. Layer 0 has not attended yet: there both are equal.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.gradients import Forward, attention_misses, compare_gradients, mask_embedding_gradients
from analysis.matching import ImagePrediction, MatchWeights, ground_truth_cells, match_layers
from mpformer.config.schema import Config
from mpformer.data.validation import ValidationItem
from mpformer.evaluation.layer_pass import batches
from mpformer.modeling.criterion import point_losses
from mpformer.modeling.mask_piloting import Size, blocked_cells
from mpformer.modeling.matcher import match_weights
from mpformer.modeling.meta_arch import MPFormer
from mpformer.modeling.outputs import DecoderOutput, Targets

__all__ = ["Under", "attention_numbers", "under_masks"]

PREDICTED, TRUTH, EVERYWHERE = "predicted masks", "true masks", "no masks"
Guidance = Callable[[Size], tuple[Tensor, Tensor]]


@torch.no_grad()
def attention_numbers(model: MPFormer, config: Config, items: Iterable[ValidationItem]) -> dict[str, list[Any]]:
    """Per-layer numbers over some validation images, as ``layers`` of ``result.json``; None where nothing is known.

    ``gradient_cosine`` and ``gradient_relative_error`` (L + 1 values, see :func:`analysis.gradients.compare_gradients`)
    and ``attention_miss_share`` (L values, percent of the attention masks of queries that end on an object which have
    no cell of it, empty ones included). Leaves the model in the mode that it was in.
    """
    training = model.training
    model.eval()
    found = _Found(match_weights(config.model))
    try:
        for batch in batches(items):
            found.add(model, batch)
    finally:
        model.train(training)
    return found.numbers(config.model.decoder_layers)


@dataclass(frozen=True)
class Under:
    """Of the k queries that end on an object, over all images: under one kind of attention masks, layer by layer."""

    gradients: Tensor
    """(L+1, k, D) of the mask loss with respect to the mask embedding."""
    losses: Tensor
    """(L+1, k) that mask loss."""


@torch.no_grad()
def under_masks(model: MPFormer, config: Config, items: Iterable[ValidationItem]) -> dict[str, Under]:
    """The gradients and losses behind :func:`attention_numbers`, and those of a third pass without attention masks.

    By kind: "predicted masks", "true masks", "no masks" (the queries that end on an object attend everywhere; all
    others keep their predicted masks, as they do under true ones). Empty if no query ends on an object. Expects a
    model in evaluation mode.
    """
    found = _Found(match_weights(config.model), everywhere=True)
    for batch in batches(items):
        found.add(model, batch)
    return {kind: Under(torch.cat(found.gradients[kind], 1), torch.cat(of, 1)) for kind, of in found.losses.items()}


@dataclass
class _Found:
    """What the images so far have given."""

    weights: MatchWeights
    everywhere: bool = False
    """Whether there is a third pass, without attention masks."""
    gradients: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    """By kind of attention masks, per image (L+1, k, D), of the k queries that end on an object."""
    losses: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    """Likewise (L+1, k)."""
    missed: list[Tensor] = field(default_factory=list)
    """Per image (L,) how many of the k attention masks have no cell of their object."""

    def add(self, model: MPFormer, batch: Sequence[ValidationItem]) -> None:
        inputs = [item.inputs for item in batch]
        images = model.preprocess(inputs)
        targets = model.targets(inputs, images)
        pixels = model.pixel_features(images.tensor)
        decoder, watched = model.sem_seg_head.predictor, _Watched()
        output = decoder(pixels, attention=watched)
        sizes = [(int(height), int(width)) for height, width in images.image_sizes]
        pairs = [self._final_pairs(output, b, batch[b], sizes[b]) for b in range(len(batch))]
        outputs = {PREDICTED: output}
        for kind in (TRUTH, EVERYWHERE) if self.everywhere else (TRUTH,):
            guidance = _guidance(targets, [(q, o) for q, o, _ in pairs], output.logits.shape[2], kind == TRUTH)
            outputs[kind] = decoder(pixels, attention=_Watched(guidance))
        for b, (queries, objects, cells) in enumerate(pairs):
            if len(queries):
                for kind, under in outputs.items():
                    gradients, losses = self._gradients(under, b, queries, cells[objects])
                    self.gradients[kind].append(gradients)
                    self.losses[kind].append(losses)
                self.missed.append(_missed(watched.seen, targets.masks[b], b, queries, objects))

    def _final_pairs(
        self, output: DecoderOutput, b: int, item: ValidationItem, size: Size
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(queries (k,), their objects (k,), objects' cells (n, h, w) at mask resolution) matched at the last layer."""
        last = (output.mask_embed[-1:, b], output.mask_features[b], output.logits[-1:, b])
        prediction = ImagePrediction.from_embeddings(*last, size)
        labels = item.inputs["instances"].gt_classes
        cells = ground_truth_cells(item.inputs["instances"].gt_masks.to(output.logits.device).bool(), prediction.grid)
        final = np.full(output.logits.shape[2], -1)
        if len(labels):
            final = match_layers(prediction, cells, labels, self.weights)[-1]
        queries = torch.from_numpy(np.flatnonzero(final >= 0)).to(cells.device)
        return queries, torch.from_numpy(final).to(cells.device)[queries], cells

    def _gradients(self, output: DecoderOutput, b: int, queries: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients (L+1, k, D) of the queries' mask losses (L+1, k) against cells (k, h, w), padding left out."""
        height, width = cells.shape[-2:]
        features = output.mask_features[b, :, :height, :width].flatten(1).float()
        truth = cells.flatten(1).float()
        embeds = output.mask_embed[:, b][:, queries].float()
        losses: list[Tensor] = []
        # layer by layer: all layers' logits of a large image would not fit
        found = [mask_embedding_gradients(self._loss(e, features, truth, losses)) for e in embeds]
        return torch.cat(found).cpu(), torch.stack(losses).cpu()

    def _loss(self, embed: Tensor, features: Tensor, truth: Tensor, losses: list[Tensor]) -> Forward:
        """The mask loss of embeddings (k, D) x features (D, cells) against truth (k, cells); ``losses`` keeps (k,)."""
        embed = embed.clone().requires_grad_()

        def forward() -> tuple[Tensor, Sequence[Tensor]]:
            mask, dice = point_losses(embed @ features, truth)
            loss = self.weights.mask * mask + self.weights.dice * dice
            losses.append(loss.detach())
            return loss.sum(), [embed]

        return forward

    def numbers(self, layers: int) -> dict[str, list[Any]]:
        """Pool over all (image, query) pairs."""
        if not self.missed:
            nothing: list[Any] = [None] * (layers + 1)
            return {"gradient_cosine": nothing, "gradient_relative_error": nothing, "attention_miss_share": nothing[1:]}
        predicted, truth = (torch.cat(self.gradients[kind], 1) for kind in (PREDICTED, TRUTH))
        found = compare_gradients(predicted, truth)
        share = 100 * torch.stack(self.missed).sum(0) / truth.shape[1]
        return {
            "gradient_cosine": _plain(found.cosine),
            "gradient_relative_error": _plain(found.relative_error),
            "attention_miss_share": _plain(share),
        }


class _Watched:
    """An attention hook that keeps the predicted masks and, given some guidance, replaces those of guided queries."""

    def __init__(self, guidance: Guidance | None = None) -> None:
        self.guidance = guidance
        self.seen: list[tuple[Tensor, Size]] = []
        """Per layer the predicted (B, Q, h*w) mask, True = blocked, before blocked rows are opened."""

    def __call__(self, predicted: Tensor, size: Size) -> Tensor:
        self.seen.append((predicted, size))
        if self.guidance is None:
            return predicted
        matched, blocked = self.guidance(size)
        return torch.where(matched[..., None], blocked, predicted)


def _guidance(targets: Targets, pairs: Sequence[tuple[Tensor, Tensor]], queries: int, by_truth: bool) -> Guidance:
    """``pairs`` are each image's guided queries and their objects.

    The result gives, at a size, which queries (B, Q) are guided and their masks (B, Q, h*w): blocked off the object,
    or nowhere.
    """
    matched = torch.zeros(len(pairs), queries, dtype=torch.bool, device=targets.masks[0].device)
    for b, (guided, _) in enumerate(pairs):
        matched[b, guided] = True

    def at(size: Size) -> tuple[Tensor, Tensor]:
        blocked = matched.new_zeros(len(pairs), queries, size[0] * size[1])
        for b, (guided, objects) in enumerate(pairs if by_truth else ()):
            blocked[b, guided] = blocked_cells(targets.masks[b], size).flatten(1)[objects]
        return matched, blocked

    return at


def _missed(seen: Sequence[tuple[Tensor, Size]], masks: Tensor, b: int, queries: Tensor, objects: Tensor) -> Tensor:
    """How many of an image's matched queries look at no cell of their object, per layer (L,)."""
    counts = []
    for blocked, size in seen:
        cells = ~blocked_cells(masks, size)
        _, missed = attention_misses(blocked[b, queries].unflatten(-1, size)[None], cells, objects[None])
        counts.append(missed[0] * len(queries))
    return torch.stack(counts).cpu()


def _plain(values: Tensor) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values.tolist()]
