"""Mask piloting in the whole model: it changes nothing of the matching part and nothing at evaluation."""

import copy
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mpformer.modeling.meta_arch import MPFormer
from mpformer.modeling.outputs import DecoderOutput
from tests.support.present import present
from tests.support.small_models import SIDE, batch, boxes_masks, rng, small_model

PILOTED = {"toggles__mp_queries": True, "toggles__point_noise": 0.2, "toggles__flip_noise": 0.2}


def decode(model: MPFormer, items: list[dict[str, Any]], seed: int = 0) -> DecoderOutput:
    images = model.preprocess(items)
    pixels = model.pixel_features(images.tensor)
    pilot = model.pilot(model.targets(items, images), pixels, rng(seed))
    return model.sem_seg_head.predictor(pixels, pilot)


def other_objects(items: list[dict[str, Any]], counts: tuple[int, ...]) -> list[dict[str, Any]]:
    changed = copy.deepcopy(items)
    for item, other in zip(changed, batch(counts, seed=5), strict=True):
        item["instances"] = other["instances"]
    return changed


@pytest.mark.parametrize("padding", ["masked", "reference"])
@pytest.mark.parametrize("groups", [1, 3])
def test_matching_part_cannot_tell_the_ground_truth(padding: str, groups: int) -> None:
    model = small_model(**PILOTED, toggles__pilot_padding=padding, toggles__mp_groups=groups)
    items = batch((3, 1))
    first, second = decode(model, items), decode(model, other_objects(items, (3, 2)), seed=1)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.mask_embed, second.mask_embed)
    assert not torch.equal(present(first.pilot_logits), present(second.pilot_logits))
    more = decode(model, other_objects(items, (5, 5)))
    torch.testing.assert_close(first.logits, more.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(first.mask_embed, more.mask_embed, atol=1e-5, rtol=0)


def test_no_piloted_query_sees_another_group() -> None:
    model = small_model(toggles__mp_queries=True, toggles__mp_groups=2)
    items = batch((3, 3))
    images = model.preprocess(items)
    pixels = model.pixel_features(images.tensor)
    pilot = model.pilot(model.targets(items, images), pixels, None)
    assert pilot is not None
    output = model.sem_seg_head.predictor(pixels, pilot)
    pilot.content.data[:, 3:] += torch.randn(2, 3, 32)
    changed = model.sem_seg_head.predictor(pixels, pilot)
    before, after = present(output.pilot_logits), present(changed.pilot_logits)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3:], after[:, :, 3:])


def test_piloted_queries_do_not_depend_on_batch_mates() -> None:
    model = small_model(toggles__mp_queries=True)
    items = batch((1, 1))
    both = items, [items[0], other_objects(items, (4, 4))[1]]
    alone, beside = (present(decode(model, batch_).pilot_logits) for batch_ in both)
    torch.testing.assert_close(alone[:, 0, :1], beside[:, 0, :1], atol=1e-5, rtol=0)


def test_off_is_exactly_mask2former() -> None:
    plain, piloted = small_model(), small_model(**PILOTED)
    shared = dict(piloted.named_parameters())
    label_enc = shared.pop("sem_seg_head.predictor.label_enc.weight")
    assert label_enc.shape == (12, 32)
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in shared.items()}
    assert all(torch.equal(p, shared[n]) for n, p in plain.named_parameters()), "same seed, same start"
    items = batch()
    plain_losses = plain(items, noise=rng(), points=rng(1))
    piloted_losses = piloted(items, noise=rng(), points=rng(1))
    assert set(piloted_losses) - set(plain_losses) == {n for n in piloted_losses if "_pilot" in n}
    for name, loss in plain_losses.items():
        torch.testing.assert_close(loss, piloted_losses[name], atol=1e-5, rtol=1e-5)


def test_evaluation_is_identical_with_and_without_piloting_parameters() -> None:
    plain, piloted = small_model().eval(), small_model(**PILOTED).eval()
    items = [{"image": item["image"]} for item in batch()]
    outputs, counts = [], []
    for model in (plain, piloted):
        model.requires_grad_(False)
        with FlopCounterMode(display=False) as flops:
            outputs.append(model(items))
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1] > 0
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a["instances"].scores, b["instances"].scores)
        assert torch.equal(a["instances"].pred_masks, b["instances"].pred_masks)


@pytest.mark.parametrize("supervised", [True, False])
def test_layer0_supervision_is_a_switch(supervised: bool) -> None:
    model = small_model(**PILOTED, toggles__layer0_supervision=supervised)
    names = set(model(batch(), noise=rng(), points=rng()))
    assert ("loss_mask_pilot_0" in names) == supervised
    assert {"loss_ce_pilot", "loss_mask_pilot_1", "loss_dice_pilot_2"} <= names
    assert set(model(batch((0, 0)), noise=rng(), points=rng())) == names


def test_no_object_in_the_batch_is_the_plain_path_with_a_zero_gradient() -> None:
    model = small_model(**PILOTED)
    losses = model(batch((0, 0)), noise=rng(), points=rng())
    sum(losses.values()).backward()
    assert all(loss == 0 for name, loss in losses.items() if "_pilot" in name or "ce" not in name)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert present(present(model.sem_seg_head.predictor.label_enc).weight.grad).eq(0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"toggles__guided_layers": "first"},
        {"toggles__guided_layers": "first-2", "toggles__mp_groups": 5},
        {"toggles__mask_noise": "shift-scale"},
        {"toggles__mp_groups": "budget-9"},
        {"toggles__class_embedding": "learnt"},
        {"toggles__class_embedding_layers": "every"},
        {"toggles__query_position": False},
        {"toggles__pilot_padding": "reference"},
        {"toggles__redraw": "once"},
    ],
)
def test_every_toggle_trains(changes: dict[str, Any]) -> None:
    model = small_model(**PILOTED, **changes)
    items = batch((3, 0, 1))
    losses = model(items, noise=rng(), points=rng())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = model(items, noise=rng(), points=rng())
    assert all(torch.equal(losses[name], again[name]) for name in losses), "same streams, same losses"


def test_unguided_layers_follow_their_own_predictions() -> None:
    guided, free = small_model(**PILOTED), small_model(**PILOTED, toggles__guided_layers="first")
    items = batch()
    a, b = (present(decode(model, items).pilot_logits) for model in (guided, free))
    assert torch.equal(a[:2], b[:2])
    assert not torch.equal(a[2], b[2])


def test_a_piloted_query_attends_inside_its_object_only() -> None:
    model = small_model(toggles__mp_queries=True).eval()
    items = batch((1,))
    items[0]["instances"].gt_masks = boxes_masks(1, seed=3)
    images = model.preprocess(items)
    pilot = present(model.pilot(model.targets(items, images), model.pixel_features(images.tensor), None))
    open_cells = ~present(pilot.attention(2, (SIDE // 4, SIDE // 4)))
    touched = items[0]["instances"].gt_masks.view(1, 16, 4, 16, 4).any(4).any(2).flatten(1)
    assert torch.equal(open_cells[0], touched)
