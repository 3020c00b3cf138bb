"""Fast forms of plain operations give the plain operation's numbers and gradients, at every size and at the edges."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpformer.modeling import criterion, matcher, pixel_decoder, sparse_sampling
from mpformer.modeling import deformable_attention as deformable
from mpformer.modeling import points as points_module
from mpformer.modeling.pixel_decoder import Conv2d
from mpformer.modeling.points import resize

SIZES = ((3, 4), (6, 8))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, drawn(*out.shape, seed=9).to(out.dtype))
    return [out.detach(), *gradients]


def assert_same(one: Sequence[Tensor], other: Sequence[Tensor], relative: float) -> None:
    """Compare in the values' own size: a sum of many terms is as exact as its largest ones."""
    for ours, plain in zip(one, other, strict=True):
        assert ours.shape == plain.shape
        assert float((ours - plain).norm()) <= relative * float(plain.norm()), (ours, plain)


def sampling_inputs(images: int = 2, queries: int = 9) -> list[Tensor]:
    """Values, places (some outside the image, some on its edge), weights."""
    places = torch.rand(images, queries, 4, 2, 3, 2, generator=torch.Generator().manual_seed(1)) * 1.8 - 0.4
    places[:, 0] = torch.tensor([0.0, 1.0])
    places[:, 1] = torch.tensor([50.0, -50.0])
    return [drawn(images, 60, 4, 8), places, drawn(images, queries, 4, 2, 3, seed=2)]


def test_sparse_sampling_is_grid_sample() -> None:
    made = sampling_inputs()
    plain = outputs_and_gradients(lambda v, x, w: deformable.grid_sample_kernel(v, SIZES, x, w), made)
    ours = outputs_and_gradients(lambda v, x, w: sparse_sampling.sparse_kernel(v, SIZES, x, w), made)
    assert_same(ours, plain, 1e-5)
    assert plain[0][:, 1].abs().max() == 0  # far outside: nothing is read


def test_sparse_sampling_has_the_right_slopes() -> None:
    made = [x.double().requires_grad_() for x in sampling_inputs(1, 3)]
    made[1].data[:, 0] += 0.013  # off the cells' centres, where a bilinear surface has no slope
    assert torch.autograd.gradcheck(lambda v, x, w: sparse_sampling.sparse_kernel(v, SIZES, x, w), made)


def test_sparse_sampling_of_what_is_no_number_reaches_the_loss() -> None:
    value, places, weights = sampling_inputs()
    places[0, 3], weights[0, 3], places[0, 4] = torch.nan, torch.nan, torch.inf
    out, *gradients = outputs_and_gradients(
        lambda v, x, w: sparse_sampling.sparse_kernel(v, SIZES, x, w), [value, places, weights]
    )
    assert out[0, 3].isnan().all()
    assert out[1].isfinite().all()
    assert gradients[2][1].isfinite().all()


def test_sparse_sampling_a_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = sampling_inputs(images=5)
    whole = outputs_and_gradients(lambda v, x, w: sparse_sampling.sparse_kernel(v, SIZES, x, w), made)
    monkeypatch.setattr(sparse_sampling, "_CORNERS", 2 * 4 * made[2][0].numel())
    parts = outputs_and_gradients(lambda v, x, w: sparse_sampling.sparse_kernel(v, SIZES, x, w), made)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_softmax_written_out_is_softmax() -> None:
    logits = drawn(2, 5, 12) * 40
    logits[0, 0] = 1e4
    plain = outputs_and_gradients(lambda x: x.softmax(-1), [logits])
    assert_same(outputs_and_gradients(deformable._softmax, [logits]), plain, 1e-5)


@pytest.mark.parametrize(("kernel", "bias"), itertools.product([1, 3], [True, False]))
@pytest.mark.parametrize("side", [8, 10])
def test_a_convolution_in_every_form(kernel: int, bias: bool, side: int) -> None:
    conv = Conv2d(128, 130, kernel, bias)
    maps = drawn(2, 128, side, side)
    plain = outputs_and_gradients(lambda x: F.conv2d(x, conv.weight, conv.bias, padding=kernel // 2), [maps])
    assert_same(outputs_and_gradients(conv, [maps]), plain, 2e-5)


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_in_half_precision_is_the_librarys(kernel: int) -> None:
    conv, maps = Conv2d(128, 128, kernel, bias=False), drawn(1, 128, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(maps).dtype == torch.bfloat16
        torch.testing.assert_close(conv(maps), F.conv2d(maps, conv.weight, padding=kernel // 2), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(24, 48), (12, 24), (6, 12), (8, 16), (5, 7), (3, 12), (48, 96)])
def test_resized_features_are_bilinear(size: tuple[int, int]) -> None:
    """Even factors (2, 4, 8), an odd one (3), none at all, unequal ones, and no resizing."""
    maps = drawn(2, 5, 24, 48) if size != (48, 96) else drawn(2, 5, 48, 96)
    plain = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize(maps, size), plain, rtol=1e-5, atol=1e-6)


def test_row_sums_of_extreme_logits() -> None:
    logits = torch.cat([drawn(500, 7) * 20, torch.tensor([[-1e4], [-90.0], [90.0], [1e4]]).expand(-1, 7)])
    masks = (drawn(3, 504, seed=1) > 0).float()
    wanted = (F.softplus(logits).sum(0), (masks @ logits.sigmoid()).T, logits.sigmoid().sum(0))
    for ours, plain in zip(matcher._row_sums(logits.clone()[None], masks[None]), wanted, strict=True):
        torch.testing.assert_close(ours[0], plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("length", [30, 2048, 5000])
def test_smallest_values_of_short_and_long_rows(length: int) -> None:
    values = np.abs(np.random.default_rng(0).standard_normal((4, length)).astype(np.float32))
    for count in (1, length // 4, length):
        found = points_module._smallest(values, count)
        assert found.shape == (4, count)
        chosen = np.sort(np.take_along_axis(values, found, axis=1), axis=1)
        np.testing.assert_array_equal(chosen, np.sort(values, axis=1)[:, :count])


def test_feed_forward_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pixel_decoder.EncoderLayer(pixel_decoder.PixelDecoderSettings(channels=16, feedforward=32, heads=4))
    tokens = drawn(2, 50, 16)
    whole = outputs_and_gradients(layer._feed_forward, [tokens])
    monkeypatch.setattr(pixel_decoder, "_TOKENS", 7)
    assert_same(outputs_and_gradients(layer._feed_forward, [tokens]), whole, 1e-6)


def plain_point_losses(embed: Tensor, features: Tensor, masks: list[Tensor], points: Tensor) -> Tensor:
    """Losses (2, rows) of three rows for each of two images, without any form that is fast; 60 candidates, 30 taken."""
    losses = []
    for image in range(2):
        logits = torch.einsum("rd,dhw->rhw", embed[3 * image : 3 * image + 3], features[image])
        truth = points_module.sample(masks[image][[0, 1, 1], None].float(), points[image].expand(3, -1, -1))[:, 0]
        sampled = points_module.sample(logits[:, None], points[image].expand(3, -1, -1))[:, 0]
        chosen = sampled.detach()[:, :60].abs().topk(30, largest=False).indices
        chosen = torch.cat([chosen, torch.arange(60, 70).expand(3, -1)], dim=1)
        losses.append(torch.stack(criterion.point_losses(sampled.gather(1, chosen), truth.gather(1, chosen))))
    return torch.cat(losses, dim=1)


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_losses_at_drawn_points(side: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer cells than points and with more; some rows at a time, across images, and all at once."""
    masks = [drawn(2, 16, 16, seed=seed) > 0 for seed in (1, 2)]
    points = torch.rand(2, 70, 2, generator=torch.Generator().manual_seed(3))
    owners = torch.tensor([0, 1, 1, 2, 3, 3])
    inputs = [drawn(6, 5), drawn(2, 5, side, side, seed=4)]

    def losses(embed: Tensor, features: Tensor) -> Tensor:
        found: Tensor = criterion.DrawnPointLosses.apply(embed, features, masks, owners, points, [3, 3], 60, 30)
        return found

    monkeypatch.setattr(criterion, "_CACHED", rows * 70)
    plain = outputs_and_gradients(lambda e, f: plain_point_losses(e, f, masks, points), inputs)
    assert_same(outputs_and_gradients(losses, inputs), plain, 1e-5)


def test_chunks_cover_all_rows_in_order() -> None:
    assert criterion._chunks([3, 0, 4], 5) == [[(0, slice(0, 3)), (2, slice(3, 5))], [(2, slice(5, 7))]]
    assert criterion._chunks([2, 2], 9) == [[(0, slice(0, 2)), (1, slice(2, 4))]]
