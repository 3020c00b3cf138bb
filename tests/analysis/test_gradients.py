"""Gradient comparison: exact on hand-made gradients, and right about a small attention model."""

import math

import pytest
import torch

from analysis.gradients import attention_accuracy, attention_misses, compare_gradients, mask_embedding_gradients


def test_hand_made_gradients() -> None:
    truth = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    other = torch.tensor([[[1.0, 1.0], [0.0, -2.0], [5.0, 5.0]]])
    got = compare_gradients(other, truth)
    assert got.cosine.item() == pytest.approx((1 / math.sqrt(2) - 1) / 2)
    assert got.relative_error.item() == pytest.approx((1 + 2) / 2)
    assert got.compared.item() == 2
    only = compare_gradients(other, truth, torch.tensor([True, False, True]))
    assert only.cosine.item() == pytest.approx(1 / math.sqrt(2))
    assert torch.isnan(compare_gradients(other, truth, torch.zeros(3, dtype=torch.bool)).cosine).all()
    assert compare_gradients(torch.zeros_like(truth), truth).cosine.item() == 0


def test_equal_gradients_agree_whatever_their_scale() -> None:
    g = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    same = compare_gradients(g, g)
    assert torch.allclose(same.cosine, torch.ones(3, dtype=torch.float64))
    assert (same.relative_error == 0).all()
    double = compare_gradients(2 * g, g)
    assert torch.allclose(double.cosine, torch.ones(3, dtype=torch.float64))
    assert torch.allclose(double.relative_error, torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="differ in shape"):
        compare_gradients(g, g[:1])


def test_unreached_layers_have_zero_gradient() -> None:
    first, second = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():  # evaluation code may call it
        got = mask_embedding_gradients(lambda: ((second**2).sum(), [first, second]))
    assert (got[0] == 0).all()
    assert torch.equal(got[1], (2 * second).detach())


def forward_with(masks: torch.Tensor):
    """Two attention layers that look through masks (Q, cells); the loss pulls each query's mask to its object."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(16, 8, generator=g, dtype=torch.float64)
    queries = torch.randn(3, 8, generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.zeros(3, 16, dtype=torch.float64)
    for query in range(3):
        target[query, 5 * query : 5 * query + 5] = 1

    def run():
        content, embeddings = queries, []
        loss = torch.zeros((), dtype=torch.float64)
        for _ in range(2):
            scores = (content @ features.T).masked_fill(masks == 0, -torch.inf)
            content = content + scores.softmax(-1) @ features
            embeddings.append(content)
            loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(content @ features.T, target)
        return loss, embeddings

    return run, target


def test_worse_masks_give_worse_gradients() -> None:
    _, target = forward_with(torch.ones(3, 16))
    truth, _ = forward_with(target)
    near = target.clone()
    near[:, 3] = 1
    wrong = target.roll(1, 0)
    good, bad = (attention_accuracy(forward_with(masks)[0], truth) for masks in (near, wrong))
    perfect = attention_accuracy(truth, truth)
    assert (perfect.relative_error == 0).all()
    assert (good.relative_error < bad.relative_error).all()
    assert (good.cosine > bad.cosine).all()


def test_attention_misses() -> None:
    blocked = torch.ones(2, 3, 2, 2, dtype=torch.bool)
    blocked[0, 0, 0, 0] = False  # query 0 sees its object
    blocked[0, 1, 0, 0] = False  # query 1 looks elsewhere; query 2 sees nothing
    cells = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [0, 1]]], dtype=torch.bool)
    matched = torch.tensor([[0, 1, -1], [-1, -1, -1]])
    empty, missed = attention_misses(blocked, cells, matched)
    assert empty.tolist() == pytest.approx([1 / 3, 1])
    assert missed[0].item() == 0.5
    assert torch.isnan(missed[1])
    assert torch.isnan(attention_misses(blocked, cells[:0], matched * 0 - 1)[1]).all()
