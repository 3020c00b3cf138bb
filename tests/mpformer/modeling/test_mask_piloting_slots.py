"""Layout of the piloted part: slots, groups, who may read whom, which layers are guided, mask resizing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mpformer.config.presets import PRESETS, changes
from mpformer.config.schema import Toggles
from mpformer.modeling.mask_piloting import (
    PilotNoise,
    blocked_cells,
    group_count,
    pilot_batch,
    self_attention_mask,
)
from tests.support.small_models import rng, some_targets

SIZES = [(4, 4), (8, 8), (16, 16)]
TABLE = torch.randn(12, 32, generator=rng(9))


def test_object_of_a_group_sits_in_its_slot() -> None:
    targets = some_targets((3, 1, 2))
    made = pilot_batch(Toggles(mp_groups=2), targets, TABLE, 8, SIZES, None)
    assert made.slots == 6
    assert made.real.tolist() == [[True] * 6, [True, False, False] * 2, [True, True, False] * 2]
    for image, labels in enumerate(targets.labels):
        for group in range(2):
            for j, label in enumerate(labels.tolist()):
                assert torch.equal(made.content[image, group * 3 + j], TABLE[label])
    assert made.content[~made.real].eq(0).all()


@pytest.mark.parametrize(("budget", "largest", "groups"), [(100, 7, 14), (10, 7, 1), (3, 7, 1), (14, 7, 2)])
def test_query_budget_becomes_groups(budget: int, largest: int, groups: int) -> None:
    toggles = Toggles(mp_groups=f"budget-{budget}")
    assert group_count(toggles, largest) == groups


@pytest.mark.parametrize(
    ("value", "guided"), [("first", [0]), ("first-2", [0, 1]), ("first-9", [0, 1, 2]), ("every", [0, 1, 2])]
)
def test_guided_layers(value: str, guided: list[int]) -> None:
    toggles = Toggles(guided_layers=value)
    made = pilot_batch(toggles, some_targets(), TABLE, 8, SIZES, None)
    assert [i for i in range(3) if made.attention(i, SIZES[i]) is not None] == guided


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any),
    groups=st.integers(1, 3),
    hide=st.booleans(),
)
def test_who_may_read_whom(counts: list[int], groups: int, hide: bool) -> None:
    largest, queries = max(counts), 5
    real = (torch.arange(largest) < torch.tensor(counts)[:, None]).repeat(1, groups)
    slots = real.shape[1]
    mask = self_attention_mask(real, groups, queries, hide).expand(len(counts), -1, -1)
    group = torch.arange(slots) // largest
    assert mask[:, slots:, :slots].all(), "a matching query reads the piloted part"
    assert not mask[:, :, slots:].any(), "a query cannot read the matching part"
    assert mask[:, :slots, :slots][:, group[:, None] != group].all(), "a piloted query reads another group"
    own = mask[:, :slots, :slots] & (group[:, None] == group)
    assert torch.equal(own, (group[:, None] == group) & ~real[:, None] & hide)


def test_one_learnt_vector_fills_every_real_slot() -> None:
    toggles = Toggles(class_embedding="learnt")
    made = pilot_batch(toggles, some_targets(), TABLE[:1], 8, SIZES, None)
    assert made.content[made.real].eq(TABLE[0]).all()


def test_content_is_fed_once_or_in_every_layer() -> None:
    queries = torch.zeros(2, 3 + 8, 32)
    once = pilot_batch(Toggles(), some_targets(), TABLE, 8, SIZES, None)
    every = pilot_batch(Toggles(class_embedding_layers="every"), some_targets(), TABLE, 8, SIZES, None)
    assert torch.equal(once.feed(1, queries), queries)
    assert torch.equal(every.feed(0, queries), queries)
    assert torch.equal(every.feed(1, queries)[:, :3], every.content)
    assert every.feed(1, queries)[:, 3:].eq(0).all()


def test_a_batch_without_objects_has_no_piloted_part() -> None:
    budget = Toggles(mp_groups="budget-100")
    assert pilot_batch(budget, some_targets((0, 0)), TABLE, 8, SIZES, None) is None


def test_given_noise_replaces_every_draw() -> None:
    generator = rng()
    before = generator.get_state()
    masks = [torch.rand(2, 3, h * w) > 0.5 for h, w in SIZES]
    noise = PilotNoise(masks, torch.tensor([4, 3, 2, 1]))
    toggles = Toggles(point_noise=0.4, flip_noise=0.5)
    made = pilot_batch(toggles, some_targets(), TABLE, 8, SIZES, generator, noise)
    assert made.labels.tolist() == [[4, 3, 2], [1, 0, 0]]
    assert all(made.attention(i, SIZES[i]) is masks[i] for i in range(3))
    assert torch.equal(generator.get_state(), before)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100), cells=st.tuples(st.integers(1, 9), st.integers(1, 9)), divides=st.booleans())
def test_cells_are_blocked_where_the_area_average_is_zero(seed: int, cells: tuple[int, int], divides: bool) -> None:
    shape = (cells[0] * 4, cells[1] * 4) if divides else (37, 29)
    masks = torch.rand(3, *shape, generator=rng(seed)) > 0.97
    average = F.interpolate(masks.float()[None], size=cells, mode="area")[0]
    assert torch.equal(blocked_cells(masks, cells), average <= 1e-8)


def test_presets_differ_only_where_they_say() -> None:
    paper, release = PRESETS["mp-former/paper"], PRESETS["mp-former/release"]
    assert (paper.point_noise, release.point_noise) == (0.2, 0.0)
    assert paper.flip_noise == release.flip_noise == 0.2
    assert paper.query_position
    assert not release.query_position
    assert (paper.pilot_padding, release.pilot_padding) == ("masked", "reference")
    assert changes("mp-former/release")["schedule.class_mean"] == "per-rank"
    assert "schedule.class_mean" not in changes("mp-former/paper")
    assert not PRESETS["mask2former"].mp_queries
