"""Product path against the direct implementation for every toggle, set of attention strides and width: outputs,
losses, gradients. Weights, points and noise are the same on both sides."""

from functools import partial
from typing import Any

import pytest
import torch

from mpformer.config.schema import Toggles
from tests.support.paired_models import CLASSES, Forward, draw, forward_both, make_batch, margin, pair, tiny_config
from tests.support.parity_adapter import piloted_masks
from tests.support.present import present

SIZES = [(64, 96), (60, 70), (64, 64)]
PILOTED = Toggles(mp_queries=True)

TOGGLES: dict[str, Toggles] = {
    "plain": Toggles(),
    "plain without query position": Toggles(query_position=False),
    "every layer": PILOTED,
    "no query position": Toggles(mp_queries=True, query_position=False),
    "first layer": Toggles(mp_queries=True, guided_layers="first"),
    "first three layers": Toggles(mp_queries=True, guided_layers="first-3"),
    "two groups": Toggles(mp_queries=True, mp_groups=2),
    "budget of 17 slots": Toggles(mp_queries=True, mp_groups="budget-17"),
    "reference padding, two groups": Toggles(mp_queries=True, mp_groups=2, pilot_padding="reference"),
    "point noise": Toggles(mp_queries=True, point_noise=0.4),
    "point noise, once, two groups": Toggles(mp_queries=True, point_noise=0.4, redraw="once", mp_groups=2),
    "shift": Toggles(mp_queries=True, point_noise=0.4, mask_noise="shift"),
    "scale": Toggles(mp_queries=True, point_noise=0.4, mask_noise="scale"),
    "shift-scale, flip": Toggles(mp_queries=True, point_noise=0.4, mask_noise="shift-scale", flip_noise=0.5),
    "learnt vector": Toggles(mp_queries=True, class_embedding="learnt"),
    "embedding in every layer": Toggles(mp_queries=True, class_embedding_layers="every"),
    "layer 0 not supervised": Toggles(mp_queries=True, layer0_supervision=False),
}
MODELS: dict[str, dict[str, Any]] = {
    "strides 16, 8, 4": {"attention_strides": (16, 8, 4)},
    "strides 32, 16, 8, 4": {"attention_strides": (32, 16, 8, 4)},
    "strides 32, 16": {"attention_strides": (32, 16)},
    "strides 8": {"attention_strides": (8,)},
    "strides 32, 8": {"attention_strides": (32, 8)},
    "wider decoder than pixel decoder": {"hidden_dim": 64},
    "no encoder layer": {"encoder_layers": 0},
    "one layer": {"decoder_layers": 1},
    "no importance sampling": {"importance_sample_ratio": 0.0},
    "importance sampling only": {"importance_sample_ratio": 1.0},
}


def run_pair(toggles: Toggles, objects: list[int], **model: Any) -> tuple[Any, Any, Forward]:
    """Both models on a batch whose attention masks do not hang on rounding."""
    for seed in range(20):
        config = tiny_config(toggles, **model).replace({"seed": seed})
        direct, product = pair(config)
        batch = make_batch(SIZES[: len(objects)], objects, CLASSES, seed)
        both = forward_both(direct, product, batch, draw(config.model, len(batch), seed))
        sizes = [(64 // s, 96 // s) for s in config.model.attention_strides]
        if margin(both.direct, sizes) > 1e-5:
            return direct, product, both
    raise AssertionError("every seed has a mask logit within rounding of its threshold")


def assert_same(direct: Any, product: Any, both: Forward) -> None:
    layers = range(len(both.product.logits))
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(both.product.logits, both.direct.matching("logits"))
    masks = torch.stack([both.product.masks(i) for i in layers])
    close(masks, both.direct.matching("masks"))
    assert (both.pilot is None) == (both.direct.pilot is None)
    if both.pilot is not None:
        real = both.pilot.real
        torch.testing.assert_close(real, present(both.direct.pilot).slot_is_object)
        found = torch.stack([piloted_masks(both.product, i) for i in layers])
        close(found[:, real], both.direct.piloted("masks")[:, real])
        wanted = both.direct.piloted("logits")[:, real]
        close(present(both.product.pilot_logits)[:, real], wanted)
    assert both.product_losses.keys() == both.direct_losses.keys()
    for name, value in both.direct_losses.items():
        naming = partial("{}: {}".format, name)
        torch.testing.assert_close(both.product_losses[name], value, rtol=2e-4, atol=1e-5, msg=naming)
    assert_same_gradients(direct, product, both)


def assert_same_gradients(direct: Any, product: Any, both: Forward) -> None:
    direct.loss.total(both.direct_losses).backward()
    torch.stack(list(product.criterion.weighted(both.product_losses).values())).sum().backward()
    wanted = {name: p.grad for name, p in direct.named_parameters() if p.grad is not None}
    largest = max(float(g.norm()) for g in wanted.values())
    for name, p in product.named_parameters():
        if name in wanted:
            error = float((p.grad - wanted[name]).norm())
            assert error <= 1e-3 * float(wanted[name].norm()) + 1e-6 * largest, name
        else:
            assert p.grad is None or not p.grad.any(), name


@pytest.mark.parametrize("name", TOGGLES)
def test_toggle_equals_direct_implementation(name: str) -> None:
    assert_same(*run_pair(TOGGLES[name], [3, 1, 2]))


@pytest.mark.parametrize("name", MODELS)
def test_model_shape_equals_direct_implementation(name: str) -> None:
    assert_same(*run_pair(Toggles(mp_queries=True, point_noise=0.2), [2, 3], **MODELS[name]))


@pytest.mark.parametrize("objects", [[0, 2, 1], [2, 0], [0, 0]], ids=str)
@pytest.mark.parametrize("padding", ["masked", "reference"])
def test_empty_images_equal_direct_implementation(objects: list[int], padding: str) -> None:
    assert_same(*run_pair(Toggles(mp_queries=True, point_noise=0.2, pilot_padding=padding), objects))


def test_mini_scale_equals_direct_implementation() -> None:
    """The model that every suite trains at the mini scale."""
    from experiments.suites.scales import base
    from mpformer.config.presets import PRESETS

    mini = base("mini").replace({"toggles": PRESETS["mp-former/paper"].model_dump()})
    for seed in range(20):
        direct, product = pair(mini.replace({"seed": seed}), 8)
        batch = make_batch([(128, 128)] * 2, [4, 6], 8, seed)
        both = forward_both(direct, product, batch, draw(mini.model, 2, seed))
        if margin(both.direct, [(128 // s, 128 // s) for s in mini.model.attention_strides]) > 1e-6:
            break
    assert_same(direct, product, both)
