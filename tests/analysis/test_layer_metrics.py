"""The layer metrics: exact on hand-made cases, equal between the stream and the plain functions, and invariant
where they must be.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import layer_table, layers
from analysis.jumps import checkpoint_interval, jumps
from analysis.layers import ImageLayers
from analysis.matching import (
    Grid,
    ImagePrediction,
    MatchWeights,
    assign,
    ground_truth_cells,
    match_layers,
    matching_costs,
)
from analysis.recorder import LayerRecorder

LAYERS, QUERIES, CLASSES = 4, 6, 3


def random_image(seed: int, objects: int, side: int = 32, layers: int = LAYERS):
    """(mask logits, class logits, gt masks, gt labels) of one image at stride 4."""
    g = torch.Generator().manual_seed(seed)
    cells = side // 4
    logits = torch.randn(layers, QUERIES, cells, cells, generator=g) * 3 - 2
    classes = torch.randn(layers, QUERIES, CLASSES + 1, generator=g)
    masks = torch.rand(objects, side, side, generator=g) > 0.4
    return logits, classes, masks, torch.randint(CLASSES, (objects,), generator=g)


def plain(image) -> ImageLayers:
    logits, classes, masks, labels = image
    prediction = ImagePrediction.from_masks(logits, classes, tuple(masks.shape[-2:]))
    cells = ground_truth_cells(masks, prediction.grid)
    assignment = match_layers(prediction, cells, labels)
    return ImageLayers(logits > 0, torch.from_numpy(assignment), cells)


def recorded(images, start: int = 0) -> LayerRecorder:
    recorder = LayerRecorder()
    for number, (logits, classes, masks, labels) in enumerate(images, start):
        recorder.add(number, logits, classes, masks, labels, image_size=tuple(masks.shape[-2:]))
    return recorder


def by_hand() -> ImageLayers:
    """Two queries are matched at the last of three layers: query 0 to object 1, query 2 to object 0."""
    masks = torch.zeros(3, 3, 1, 4, dtype=torch.bool)
    masks[0, 0, 0, :2] = True  # layer 0: cells 0, 1
    masks[1, 0, 0, 1:3] = True  # layer 1: cells 1, 2
    masks[2, 0, 0, 1:4] = True  # layer 2: cells 1, 2, 3
    masks[2, 2, 0, 0] = True  # query 2 is empty until the last layer
    assignment = torch.tensor([[0, 1, -1], [1, 0, -1], [1, -1, 0]])
    truth = torch.tensor([[[1, 0, 0, 0]], [[0, 1, 1, 1]]], dtype=torch.bool)
    return ImageLayers(masks, assignment, truth)


def test_hand_made_case_is_exact() -> None:
    images = [by_hand()]
    nan = float("nan")
    # Query 0: 1/3 then 2/3. Query 2: both empty (left out), then 0/1.
    assert layers.mean_iou_previous(images).tolist() == pytest.approx([nan, 1 / 3, (2 / 3 + 0) / 2], nan_ok=True)
    # Query 0: 1/4, 2/3, 1. Query 2: 0, 0, 1.
    assert layers.mean_iou_last(images).tolist() == pytest.approx([1 / 8, 1 / 3, 1])
    assert layers.empty_pair_share(images).tolist() == pytest.approx([nan, 1 / 2, 0], nan_ok=True)
    # Query 0 against object 1: 1/4, 2/3, 1. Query 2 against object 0: 0, 0, 1.
    assert layers.iou_to_ground_truth(images).tolist() == pytest.approx([1 / 8, 1 / 3, 1])
    assert layers.utilization(images).tolist() == [0, 1 / 2, 1]
    # Layer 0 → 1: nothing stays; 1 → 2: object 1 stays with query 0.
    assert layers.utilization_consecutive(images).tolist() == pytest.approx([0, 1 / 2, nan], nan_ok=True)
    assert layers.query_counts(images).tolist() == [1, 0, 1]
    assert layers.used_query_share(images) == 2 / 3
    assert layers.effective_queries(layers.query_counts(images)) == pytest.approx(2)
    assert layers.instability(images[0].assignment[0], images[0].assignment[1]) == 1
    assert layers.instability(images[0].assignment[1], images[0].assignment[2]) == pytest.approx(2 / 3)


def test_effective_queries_of_uneven_use() -> None:
    counts = torch.tensor([3, 1, 0, 0])
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert layers.effective_queries(counts) == pytest.approx(expected)
    assert layer_table.effective_queries(counts.numpy()) == pytest.approx(expected)
    assert np.isnan(layer_table.effective_queries(np.zeros(4)))


@pytest.mark.parametrize("objects", [1, 4, 6, 9])
def test_stream_equals_the_plain_functions(objects: int) -> None:
    images = [random_image(seed, objects) for seed in range(5)] + [random_image(99, 0)]
    references = [plain(image) for image in images]
    summary = recorded(images).summary()
    for name, function in {
        "mIoU-L": layers.mean_iou_previous,
        "mIoU-L-last": layers.mean_iou_last,
        "Util": layers.utilization,
        "Util-consecutive": layers.utilization_consecutive,
        "IoU-gt": layers.iou_to_ground_truth,
        "empty_pair_share": layers.empty_pair_share,
    }.items():
        wanted = (100 * function(references)).tolist()
        got = [float("nan") if value is None else value for value in summary["layers"][name]]
        assert got == pytest.approx(wanted, rel=1e-6, nan_ok=True), name
    assert summary["used_query_share"] == pytest.approx(100 * layers.used_query_share(references))
    assert summary["effective_queries"] == pytest.approx(layers.effective_queries(layers.query_counts(references)))
    assert summary["metrics"]["mIoU-L"] == pytest.approx(np.mean(summary["layers"]["mIoU-L"][1:]))
    assert summary["metrics"]["Util"] == pytest.approx(np.mean(summary["layers"]["Util"][:-1]))


def test_costs_are_mask2formers_on_all_cells() -> None:
    logits, classes, masks, labels = random_image(3, 4)
    cells = ground_truth_cells(masks, Grid.of((8, 8), (32, 32)))
    costs = matching_costs(logits, classes, cells, labels)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    for layer, query, obj in itertools.product(range(LAYERS), range(QUERIES), range(4)):
        x, t = logits[layer, query], cells[obj].float()
        dice = 1 - (2 * (x.sigmoid() * t).sum() + 1) / (x.sigmoid().sum() + t.sum() + 1)
        wanted = 5 * bce(x, t) + 5 * dice - 2 * classes[layer, query].softmax(-1)[labels[obj]]
        assert costs[layer, query, obj].item() == pytest.approx(wanted.item(), abs=1e-5)


def test_costs_survive_extreme_logits() -> None:
    logits = torch.tensor([-1e4, 0.0, 1e4, 300.0]).view(1, 1, 2, 2)
    cells = torch.tensor([[[True, False], [False, True]]])
    cost = matching_costs(logits, torch.zeros(1, 1, 2), cells, torch.tensor([0]))
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits[0], cells.float())
    assert cost.item() == pytest.approx((5 * bce + 5 * (1 - 3 / 5.5) - 1).item(), rel=1e-5)


def test_assignment_is_the_cheapest_of_all() -> None:
    costs = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    for layer, row in enumerate(assign(costs)):
        best = min(sum(costs[layer, q, m].item() for m, q in enumerate(p)) for p in itertools.permutations(range(5), 4))
        assert costs[layer, row >= 0, row[row >= 0]].sum().item() == pytest.approx(best, abs=1e-5)


def test_a_cost_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        assign(torch.full((1, 2, 2), torch.nan))


def test_more_objects_than_queries() -> None:
    rows = recorded([random_image(0, QUERIES + 3)]).rows()
    assert len(rows["layer"]) == LAYERS * QUERIES
    assert (rows["query_here"][rows["layer"] == LAYERS - 1] >= 0).all()


def test_embeddings_give_the_rows_of_their_masks() -> None:
    g = torch.Generator().manual_seed(5)
    embed, features = torch.randn(LAYERS, QUERIES, 7, generator=g), torch.randn(7, 8, 12, generator=g)
    _, classes, masks, labels = random_image(5, 3)
    masks = torch.rand(3, 30, 41, generator=g) > 0.5
    first, second = LayerRecorder(), LayerRecorder()
    first.add_embeddings(1, embed, features, classes, masks, labels, image_size=(30, 41))
    logits = torch.einsum("aqd,dhw->aqhw", embed, features)
    second.add(1, logits, classes, masks, labels, image_size=(30, 41))
    assert_rows_equal(first.rows(), second.rows())


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [random_image(seed, 4) for seed in range(3)]
    whole = recorded(images).rows()
    monkeypatch.setattr(ImagePrediction.chunks, "__defaults__", (QUERIES * 64 * 2,))
    assert_rows_equal(recorded(images).rows(), whole)


def test_padding_is_cropped() -> None:
    logits, classes, masks, labels = random_image(2, 3)
    padded = torch.full((LAYERS, QUERIES, 12, 10), 50.0)
    padded[..., :8, :8] = logits
    one, other = LayerRecorder(), LayerRecorder()
    one.add(0, logits, classes, masks, labels, image_size=(32, 32))
    other.add(0, padded, classes, masks, labels, image_size=(32, 32))
    assert_rows_equal(one.rows(), other.rows())


def test_ground_truth_is_area_averaged() -> None:
    masks = torch.zeros(1, 6, 8, dtype=torch.bool)
    masks[0, :2, :4] = True  # half of cell (0, 0)
    masks[0, 0, 4:] = True  # a quarter of cell (0, 1)
    masks[0, 4, 4:] = True  # half of what the image covers of cell (1, 1)
    cells = ground_truth_cells(masks, Grid.of((2, 2), (6, 8)))
    assert cells.tolist() == [[[True, False], [False, True]]]


@pytest.mark.parametrize("factor", [2, 3])
def test_ground_truth_at_another_resolution(factor: int) -> None:
    masks = torch.rand(4, 36, 30, generator=torch.Generator().manual_seed(0)) > 0.5
    grid = Grid.of((9, 8), (36, 30))
    finer = masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    assert torch.equal(ground_truth_cells(finer, grid), ground_truth_cells(masks, grid))
    # A resolution that no stride divides takes the general path.
    uneven = ground_truth_cells(torch.ones(1, 50, 31, dtype=torch.bool), grid)
    assert uneven.all()


def test_recorder_refuses_what_cannot_be_pooled() -> None:
    recorder = recorded([random_image(0, 2)])
    with pytest.raises(ValueError, match="image 0 was recorded before"):
        recorder.add(0, *random_image(0, 2))
    with pytest.raises(ValueError, match="changed from"):
        recorder.add(1, *random_image(0, 2, layers=LAYERS + 1))
    with pytest.raises(ValueError, match="both recorders"):
        recorder.merge(recorded([random_image(1, 2)]))
    with pytest.raises(ValueError, match="needs"):
        Grid.of((8, 8), (40, 32))


def test_nothing_recorded_is_none_not_zero() -> None:
    summary = recorded([random_image(0, 0)]).summary()
    assert summary["metrics"]["mIoU-L"] is None
    assert summary["layers"]["Util"] == [None] * LAYERS
    assert summary["used_query_share"] is None
    assert LayerRecorder().summary()["effective_queries"] is None


def test_empty_attention_is_counted_over_all_queries() -> None:
    first, second = LayerRecorder(), LayerRecorder()
    empty = torch.zeros(LAYERS - 1, QUERIES, dtype=torch.bool)
    empty[0, :3] = True
    first.add(0, *random_image(0, 2), empty_attention=empty)
    second.add(1, *random_image(1, 0), empty_attention=torch.zeros_like(empty))
    first.merge(second)
    assert first.summary()["layers"]["empty_attention_share"] == [25, 0, 0]


def test_sigmoid_classifiers_and_given_scores() -> None:
    logits, classes, masks, labels = random_image(1, 4)
    size = (32, 32)
    softmax, given, sigmoid = LayerRecorder(), LayerRecorder(classifier="scores"), LayerRecorder(classifier="sigmoid")
    softmax.add(0, logits, classes, masks, labels, image_size=size)
    given.add(0, logits, classes.softmax(-1), masks, labels, image_size=size)
    assert_rows_equal(given.rows(), softmax.rows())
    sigmoid.add(0, logits, classes[..., :CLASSES], masks, labels, image_size=size)
    rows = sigmoid.rows()
    scores, predicted = classes[..., :CLASSES].sigmoid().max(-1)
    for layer, query, score, label in zip(
        rows["layer"], rows["query_final"], rows["score"], rows["predicted_class"], strict=True
    ):
        assert score == pytest.approx(float(scores[layer, query]))
        assert label == int(predicted[layer, query])
    costs = matching_costs(logits, classes[..., :CLASSES], ground_truth_cells(masks, Grid.of((8, 8), size)), labels,
                           MatchWeights(1, 0, 0), "sigmoid")  # fmt: skip
    torch.testing.assert_close(costs, -classes[..., labels].sigmoid())


@pytest.mark.parametrize(
    ("classifier", "change", "message"),
    [
        ("scores", lambda logits: logits, "must be in .0, 1. and sum to one"),
        ("scores", lambda logits: logits.sigmoid(), "must be in .0, 1. and sum to one"),
        ("scores", lambda logits: logits.softmax(-1)[..., :-1], "must be in .0, 1. and sum to one"),
        ("scores", lambda logits: logits.softmax(-1) * 2 - 1 / (CLASSES + 1), "must be in .0, 1. and sum to one"),
        ("softmax", lambda logits: logits.softmax(-1), "are scores, not logits: give classifier='scores'"),
        ("logits", lambda logits: logits, "unknown classifier 'logits'; valid: softmax, sigmoid, scores"),
    ],
)
def test_scores_are_refused_not_softmaxed_again(classifier, change, message: str) -> None:
    logits, classes, masks, labels = random_image(1, 4)
    recorder = LayerRecorder(classifier=classifier)
    with pytest.raises(ValueError, match=message):
        recorder.add(0, logits, change(classes), masks, labels)


def test_a_model_without_layer_0_has_the_numbers_of_its_other_layers(tmp_path: Path) -> None:
    logits, classes, masks, labels = random_image(2, 4)
    whole, less = LayerRecorder(), LayerRecorder()
    whole.add(0, logits, classes, masks, labels)
    less.add(0, logits[1:], classes[1:], masks, labels, first_layer=1)
    with pytest.raises(ValueError, match="first layer"):
        less.add(1, logits, classes, masks, labels)
    with pytest.raises(ValueError, match="other numbers of layers"):
        less.merge(whole)
    first_pair = {"mIoU-L", "empty_pair_share"}
    for name, values in whole.summary()["layers"].items():
        known = 2 if name in first_pair else 1
        assert less.summary()["layers"][name] == [None] * known + values[known:], name
    other = LayerRecorder()
    other.absorb(less.state())
    other.write(tmp_path / "layers.parquet")
    read = layer_table.read(tmp_path / "layers.parquet")
    assert read.first_layer == 1
    assert layer_table.summarise(read) == less.summary()
    transitions = layer_table.transitions(read)
    np.testing.assert_array_equal(transitions[1:, 1:], layer_table.transitions(whole.table())[1:, 1:])
    assert np.isnan(transitions[0]).all()
    assert np.isnan(transitions[:, 0]).all()
    stability = layer_table.stability(read, read)
    assert np.isnan(stability[0])
    assert (stability[1:] == 1).all()
    with pytest.raises(ValueError, match=r"layer must be in 1 … 2"):
        layer_table.query_transitions(read, 0)
    with pytest.raises(ValueError, match="late=True"):
        checkpoint_interval(read)
    np.testing.assert_array_equal(jumps(read)[1:], jumps(whole.table())[1:])


# ---------------------------------------------------------------- properties

seeds = st.integers(0, 2**31)


@given(seeds, st.integers(1, 8), st.permutations(range(QUERIES)))
@settings(max_examples=30, deadline=None)
def test_permuting_queries_changes_nothing(seed: int, objects: int, order: list[int]) -> None:
    logits, classes, masks, labels = random_image(seed, objects)
    one = recorded([(logits, classes, masks, labels)])
    other = recorded([(logits[:, order], classes[:, order], masks, labels)])
    assert_close(one.summary(), other.summary())


@given(seeds, st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_identical_layers_give_one(seed: int, objects: int) -> None:
    logits, classes, masks, labels = random_image(seed, objects)
    same = logits[:1].expand_as(logits), classes[:1].expand_as(classes)
    summary = recorded([(*same, masks, labels)]).summary()
    assert set(summary["layers"]["Util"]) == {100.0}
    assert set(summary["layers"]["mIoU-L-last"]) == {100.0}
    assert set(summary["layers"]["mIoU-L"][1:]) == {100.0}
    assert set(summary["layers"]["Util-consecutive"][:-1]) == {100.0}


@given(seeds, st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_bounds(seed: int, objects: int) -> None:
    summary = recorded([random_image(seed, objects)]).summary()
    for values in summary["layers"].values():
        assert all(value is None or 0 <= value <= 100 + 1e-9 for value in values)
    assert summary["layers"]["Util"][-1] == 100
    assert summary["layers"]["mIoU-L-last"][-1] == pytest.approx(100)
    assert 1 - 1e-9 <= summary["effective_queries"] <= QUERIES + 1e-9


@given(st.lists(st.integers(0, 5), min_size=3, max_size=6), st.randoms())
@settings(max_examples=20, deadline=None)
def test_merging_is_associative_and_commutative(counts: list[int], random) -> None:
    images = [random_image(seed, n) for seed, n in enumerate(counts)]
    whole = recorded(images)
    parts = [recorded([image], start=i) for i, image in enumerate(images)]
    random.shuffle(parts)
    left = LayerRecorder()
    for part in parts[:2]:
        left.merge(part)
    right = LayerRecorder()
    for part in parts[2:]:
        right.merge(part)
    right.merge(left)
    assert_rows_equal(right.rows(), whole.rows())
    assert right.summary() == whole.summary()


def assert_rows_equal(first: dict, second: dict) -> None:
    assert list(first) == list(layer_table.COLUMNS)
    for name in first:
        assert first[name].dtype == second[name].dtype
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5, err_msg=name)


def assert_close(first: dict, second: dict) -> None:
    for group in ("metrics", "layers"):
        for name, value in first[group].items():
            assert np.array(value, float) == pytest.approx(np.array(second[group][name], float), nan_ok=True), name
    assert first["effective_queries"] == pytest.approx(second["effective_queries"])
    assert first["used_query_share"] == pytest.approx(second["used_query_share"])
