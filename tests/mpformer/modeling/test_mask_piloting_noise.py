"""Mask and label noise: identity at zero, shares as their formulas say, the right axes, never inverted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpformer.config.schema import Toggles
from mpformer.modeling.mask_piloting import (
    PilotBatch,
    blocked_cells,
    flip_labels,
    flip_points,
    move_masks,
    pilot_batch,
)
from tests.support.present import present
from tests.support.small_models import boxes_masks, rng, some_targets

GOLDEN = Path(__file__).parents[2] / "golden"
KINDS = ("point", "shift", "scale", "shift-scale")
SIZES = [(4, 4), (8, 8), (16, 16)] * 2


def piloted(toggles: Toggles, seed: int = 0) -> PilotBatch:
    table = torch.randn(12, 32, generator=rng(9))
    made = pilot_batch(toggles, some_targets(), table, 8, SIZES, rng(seed))
    assert made is not None
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_zero_noise_is_the_identity_and_draws_nothing(kind: str) -> None:
    generator = rng()
    before = generator.get_state()
    targets = some_targets()
    toggles = Toggles(mask_noise=kind, point_noise=0.0, flip_noise=0.0)
    made = pilot_batch(toggles, targets, torch.randn(12, 32), 8, SIZES, generator)
    assert torch.equal(generator.get_state(), before)
    for layer, size in enumerate(SIZES):
        mask = made.attention(layer, size)
        for image, masks in enumerate(targets.masks):
            assert torch.equal(mask[image, : len(masks)], blocked_cells(masks, size).flatten(1))
            assert mask[image, len(masks) :].all()
    assert torch.equal(made.labels[made.real], torch.cat(targets.labels))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_never_inverts_a_mask_in_any_layer(kind: str) -> None:
    clean = piloted(Toggles())
    noisy = piloted(Toggles(mask_noise=kind, point_noise=0.4))
    for layer, size in enumerate(SIZES):
        a, b = (present(made.attention(layer, size))[made.real] for made in (clean, noisy))
        assert (a == b).float().mean() > 0.75
        overlap = (~a & ~b).sum() / (~a).sum()
        assert overlap > 0.5


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.4, 3.0])
def test_share_of_flips_is_the_formula(ratio: float) -> None:
    blocked = ~boxes_masks(6)
    share = (~blocked).float().mean((1, 2))
    draws = torch.stack([flip_points(blocked, ratio, rng(i)) ^ blocked for i in range(60)]).float()
    expected = (ratio * share).clamp(max=1)
    error = (expected * (1 - expected) / (60 * blocked[0].numel())).sqrt()
    assert ((draws.mean((0, 2, 3)) - expected).abs() <= 4.5 * error + 1e-7).all()


@pytest.mark.skipif(not (GOLDEN / "case5_noise_stats.npz").exists(), reason="golden noise statistics are absent")
def test_share_of_flips_agrees_with_the_public_implementation() -> None:
    stats = np.load(GOLDEN / "case5_noise_stats.npz")
    for stride in (8, 16):
        side = 256 // stride
        open_share = stats[f"area_ratio_downsampled/stride{stride}"]
        cells = torch.arange(side * side).view(1, side, side)
        blocked = cells >= torch.from_numpy(np.round(open_share * side * side)).view(-1, 1, 1)
        for ratio in (0.1, 0.2, 0.4):
            flips = torch.stack([flip_points(blocked, ratio, rng(i)) ^ blocked for i in range(100)])
            ours = flips.float().mean((0, 2, 3)).numpy()
            error = np.sqrt(open_share * ratio / (side * side) * (1 / 100 + 1 / 400)) + 1e-6
            assert (np.abs(ours - stats[f"flip_fraction/ns{ratio}/stride{stride}"]) < 4.5 * error).all()


def test_layers_draw_afresh_or_share_per_size() -> None:
    afresh = piloted(Toggles(point_noise=0.4))
    shared = piloted(Toggles(point_noise=0.4, redraw="once"))
    for layer in range(3):
        assert not torch.equal(*(present(afresh.layer_masks[i]) for i in (layer, layer + 3)))
        assert torch.equal(*(present(shared.layer_masks[i]) for i in (layer, layer + 3)))


def test_groups_draw_their_own_noise() -> None:
    made = piloted(Toggles(point_noise=0.4, mp_groups=2, pilot_padding="masked"))
    first, second = present(made.attention(2, (16, 16))).chunk(2, dim=1)
    assert not torch.equal(first, second)


def test_same_stream_gives_the_same_noise() -> None:
    toggles = Toggles(point_noise=0.2, flip_noise=0.5, mp_groups=2)
    a, b, c = piloted(toggles, 1), piloted(toggles, 1), piloted(toggles, 2)
    assert torch.equal(a.labels, b.labels)
    assert all(torch.equal(present(x), present(y)) for x, y in zip(a.layer_masks, b.layer_masks, strict=True))
    assert not all(torch.equal(present(x), present(y)) for x, y in zip(a.layer_masks, c.layer_masks, strict=True))


@pytest.mark.parametrize("probability", [0.1, 0.2, 0.5, 1.0])
def test_share_of_changed_labels_is_the_formula(probability: float) -> None:
    labels = torch.arange(5).repeat(8000)
    changed = (flip_labels(labels, probability, 5, rng()) != labels).float().mean()
    assert abs(changed - probability * 4 / 5) < 0.008


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), ratio=st.floats(0.05, 0.9))
def test_shift_moves_each_axis_by_at_most_half_the_box(seed: int, ratio: float) -> None:
    wide = torch.zeros(20, 60, 80, dtype=torch.bool)
    wide[:, 28:32, 20:60] = True
    moved = move_masks(wide, ratio, "shift", rng(seed))
    rows = moved.any(2).int().argmax(1) - 28
    columns = moved.any(1).int().argmax(1) - 20
    assert moved.sum((1, 2)).eq(160).all()
    assert rows.abs().max() <= round(ratio * 2 + 0.5)
    assert columns.abs().max() <= round(ratio * 20 + 0.5)
    assert columns.abs().max() > ratio * 5


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), ratio=st.floats(0.1, 0.9))
def test_scale_resizes_each_axis_about_the_centre(seed: int, ratio: float) -> None:
    wide = torch.zeros(20, 120, 160, dtype=torch.bool)
    wide[:, 55:65, 60:100] = True
    scaled = move_masks(wide, ratio, "scale", rng(seed))
    heights, widths = scaled.any(2).sum(1), scaled.any(1).sum(1)
    assert (heights - 10).abs().max() <= ratio * 10 + 1
    assert (widths - 40).abs().max() <= ratio * 40 + 1
    assert widths.min() < 40 < widths.max()
    centre = (scaled.any(1).int().argmax(1) * 2 + widths - 1) / 2
    assert (centre - 79.5).abs().max() <= 1


def test_moved_masks_keep_an_empty_mask_empty() -> None:
    empty = torch.zeros(2, 16, 16, dtype=torch.bool)
    assert not move_masks(empty, 0.5, "shift-scale", rng()).any()
