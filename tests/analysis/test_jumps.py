"""The jump rate: the definition counted by hand, and the laws that hold for any table."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import layer_table
from analysis.jumps import THRESHOLD, checkpoint_interval, jump_curve, jump_rates, jumps
from analysis.layer_table import LayerTable


def table_of(ious: np.ndarray, per_image: int = 2) -> LayerTable:
    """A table of objects whose masks have these IoUs, (L, objects), to the layer before; NaN: both empty."""
    layers, objects = ious.shape[0] + 1, ious.shape[1]
    columns = {name: np.zeros(layers * objects, dtype=dtype) for name, dtype in layer_table.COLUMNS.items()}
    columns["layer"] = np.repeat(np.arange(layers, dtype=np.int16), objects)
    columns["image_id"] = np.tile(np.arange(objects) // per_image, layers)
    columns["object"] = np.tile(np.arange(objects, dtype=np.int32) % per_image, layers)
    columns["iou_previous"] = np.concatenate([np.full((1, objects), np.nan), ious]).ravel().astype(np.float32)
    return LayerTable(columns, layers, 20)


NAN = float("nan")
#                 at 1  at 2  never  empty  exactly 0.5
BY_HAND = [[0.2, 0.9, 0.9, NAN, 0.5], [0.9, 0.1, 0.6, NAN, 0.9], [0.4, 0.9, 0.7, 0.8, 0.9]]


def test_by_hand() -> None:
    table = table_of(np.array(BY_HAND))
    assert jumps(table).any(0).tolist() == [True, True, False, False, False]
    rates = jump_rates(table)
    assert (rates.once, rates.late, rates.objects) == (40, 40, 5)
    first_alone = jump_rates(table_of(np.array(BY_HAND)[:1]))
    assert (first_alone.once, first_alone.late) == (20, 0)
    assert THRESHOLD == 0.5


def test_it_is_among_the_metrics_of_an_evaluation() -> None:
    metrics = layer_table.summarise(table_of(np.array(BY_HAND)))["metrics"]
    assert (metrics["jump-rate"], metrics["jump-rate-late"]) == (40, 40)
    none = layer_table.summarise(LayerTable(layer_table.empty_columns(), 3, 5))["metrics"]
    assert none["jump-rate"] is None
    assert none["jump-rate-late"] is None


ious = st.integers(1, 5).flatmap(
    lambda steps: st.lists(
        st.lists(st.one_of(st.just(NAN), st.floats(0, 1, width=32)), min_size=steps, max_size=steps),
        min_size=1, max_size=12,
    )
)  # fmt: skip


@given(ious, st.lists(st.floats(0, 1), min_size=2, max_size=4))
def test_laws(found: list[list[float]], thresholds: list[float]) -> None:
    table = table_of(np.array(found).T)
    rates = jump_rates(table)
    assert 0 <= rates.late <= rates.once <= 100
    by_object = [any(iou < 0.5 for iou in steps) for steps in found]
    assert rates.once == pytest.approx(100 * sum(by_object) / len(by_object))
    curve = jump_curve(table, sorted(thresholds))
    assert all(a.once <= b.once and a.late <= b.late for a, b in itertools.pairwise(curve))
    assert jump_rates(table, 0).once == 0


@given(ious)
def test_the_order_of_the_lines_does_not_matter(found: list[list[float]]) -> None:
    table = table_of(np.array(found).T)
    order = np.random.default_rng(len(found)).permutation(len(table))
    shuffled = LayerTable({name: values[order] for name, values in table.columns.items()}, table.layers, table.queries)
    assert jump_rates(shuffled) == jump_rates(table)
    np.testing.assert_array_equal(jumps(shuffled), jumps(table))


def test_interval_of_checkpoints() -> None:
    rng = np.random.default_rng(0)
    first, second = (table_of(rng.random((3, 200)) ** power) for power in (1.0, 0.3))
    low, high = checkpoint_interval(first)
    assert 0 <= low < jump_rates(first).once < high <= 100
    assert checkpoint_interval(first) == (low, high)  # reproducible
    difference = checkpoint_interval(first, second)
    assert difference[0] < jump_rates(second).once - jump_rates(first).once < difference[1] < 0
    assert checkpoint_interval(first, first) == (0, 0)
    late = checkpoint_interval(first, late=True)
    assert late[0] < jump_rates(first).late < late[1]
    with pytest.raises(ValueError, match="different images"):
        checkpoint_interval(first, table_of(rng.random((3, 10))))
    with pytest.raises(ValueError, match="no object"):
        checkpoint_interval(LayerTable(layer_table.empty_columns(), 3, 5))
