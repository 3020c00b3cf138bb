"""Gradients and attention under predicted and true masks: against computations written out here."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from analysis.gradients import compare_gradients
from analysis.matching import MatchWeights, match_layers
from mpformer.config.schema import Config
from mpformer.data.validation import ValidationItem, validation_items
from mpformer.evaluation.gradient_accuracy import _Found, _Watched, attention_numbers, under_masks
from mpformer.evaluation.layer_pass import image_outputs
from mpformer.modeling.meta_arch import MPFormer, build_model

MODEL = {
    "backbone": {"kind": "resnet", "depth": 18, "stem_channels": 8, "res2_channels": 8, "norm": "GN"},
    "hidden_dim": 16,
    "conv_dim": 16,
    "mask_dim": 16,
    "heads": 2,
    "encoder_layers": 1,
    "encoder_ffn": 16,
    "decoder_layers": 2,
    "decoder_ffn": 16,
    "queries": 10,
    "attention_strides": (16, 8),
    "size_divisibility": 16,
}


@pytest.fixture(scope="module")
def config(shapes_config: Config) -> Config:
    return shapes_config.replace({f"model.{name}": value for name, value in MODEL.items()})


@pytest.fixture(scope="module")
def model(config: Config) -> MPFormer:
    model = build_model(config)
    with torch.no_grad():  # masks that are neither everywhere nor nowhere
        last = model.sem_seg_head.predictor.mask_embed.layers[-1]
        assert isinstance(last, nn.Linear)
        last.weight.mul_(5)
    return model


@pytest.fixture(scope="module")
def items(config: Config, shapes_root: Path) -> list[ValidationItem]:
    return list(validation_items(config, shapes_root))


def test_numbers_have_a_place_for_every_layer(model: MPFormer, config: Config, items: list[ValidationItem]) -> None:
    model.train()
    found = attention_numbers(model, config, items)
    assert model.training
    assert [len(values) for values in found.values()] == [3, 3, 2]
    assert found["gradient_cosine"][0] == pytest.approx(1, abs=1e-6)
    assert found["gradient_relative_error"][0] == pytest.approx(0, abs=1e-6)
    assert all(-1 <= value < 0.99999 for value in found["gradient_cosine"][1:])
    assert all(value > 0 for value in found["gradient_relative_error"][1:])
    assert all(0 <= value <= 100 for value in found["attention_miss_share"])


def test_misses_are_those_of_full_masks_resized(model: MPFormer, config: Config, items: list[ValidationItem]) -> None:
    """The product resizes features; here the mask logits are resized, and objects looked for by hand."""
    missed = np.zeros(2)
    pairs = 0
    for image in image_outputs(model, items):
        last = match_layers(image.prediction, _cells(image), image.labels, MatchWeights())[-1]
        queries = np.flatnonzero(last >= 0)
        pairs += len(queries)
        for layer, stride in ((0, 16), (1, 8)):
            logits = torch.einsum(
                "qd,dhw->qhw", image.output.mask_embed[layer, image.index], image.output.mask_features[image.index]
            )
            small = F.interpolate(logits[None], scale_factor=4 / stride, mode="bilinear", align_corners=False)[0]
            for query in queries:
                mask = image.masks[last[query]].float()[None]
                touched = F.max_pool2d(mask, stride)[0] > 0
                missed[layer] += not bool(((small[query] >= 0) & touched).any())
    found = attention_numbers(model, config, items)["attention_miss_share"]
    assert 0 < missed.sum() < 2 * pairs
    assert found == pytest.approx((100 * missed / pairs).tolist())


def _cells(image) -> torch.Tensor:
    return F.avg_pool2d(image.masks[None].float(), 4)[0] >= 0.5


def test_gradient_is_that_of_the_mask_loss(model: MPFormer, items: list[ValidationItem]) -> None:
    image = next(iter(image_outputs(model, items[:1])))
    cells = _cells(image)
    queries = torch.tensor([3, 1])
    got, losses = _Found(MatchWeights())._gradients(image.output, 0, queries, cells[:2])
    for layer in range(3):
        for k, query in enumerate(queries):
            embed = image.output.mask_embed[layer, 0, query].clone().requires_grad_()
            logits = torch.einsum("d,dhw->hw", embed, image.output.mask_features[0])
            truth, probability = cells[k].float(), logits.sigmoid()
            dice = 1 - (2 * (probability * truth).sum() + 1) / (probability.sum() + truth.sum() + 1)
            loss = 5 * F.binary_cross_entropy_with_logits(logits, truth) + 5 * dice
            (expected,) = torch.autograd.grad(loss, embed)
            assert torch.allclose(got[layer, k], expected, atol=1e-5, rtol=1e-4)
            assert losses[layer, k] == pytest.approx(loss.item(), rel=1e-4)


def test_guiding_by_the_predicted_masks_changes_nothing(model: MPFormer, items: list[ValidationItem]) -> None:
    model.eval()
    inputs = [item.inputs for item in items[:2]]
    with torch.no_grad():
        pixels = model.pixel_features(model.preprocess(inputs).tensor)
        plain = model.sem_seg_head.predictor(pixels)
        decoder, watched = model.sem_seg_head.predictor, _Watched()
        seen = decoder(pixels, attention=watched)
        replay = iter(watched.seen)
        every = torch.ones(2, 10, dtype=torch.bool)
        again = decoder(pixels, attention=_Watched(lambda size: (every, next(replay)[0])))
        opened = decoder(pixels, attention=lambda predicted, size: torch.zeros_like(predicted))
    for other in (seen, again):
        assert torch.equal(plain.mask_embed, other.mask_embed)
        assert torch.equal(plain.logits, other.logits)
    assert not torch.equal(plain.mask_embed[1:], opened.mask_embed[1:])


def test_images_without_objects_give_nothing(model: MPFormer, config: Config, items: list[ValidationItem]) -> None:
    inputs = {**items[0].inputs, "instances": items[0].inputs["instances"][:0]}
    found = attention_numbers(model, config, [ValidationItem(inputs, items[0].truth)])
    assert found["gradient_cosine"] == [None] * 3
    assert found["attention_miss_share"] == [None] * 2


def test_three_kinds_of_masks_are_compared_over_the_same_queries(
    model: MPFormer, config: Config, items: list[ValidationItem]
) -> None:
    model.eval()
    under = under_masks(model, config, items)
    assert list(under) == ["predicted masks", "true masks", "no masks"]
    first = under["predicted masks"]
    for other in under.values():
        assert other.losses.shape == other.gradients.shape[:2] == first.losses.shape
        assert torch.allclose(other.losses[0], first.losses[0]), "layer 0 has not attended yet"
        assert other is first or not torch.allclose(other.losses[1:], first.losses[1:])
    cosine = compare_gradients(first.gradients, under["true masks"].gradients).cosine
    assert cosine.tolist() == pytest.approx(attention_numbers(model, config, items)["gradient_cosine"])
