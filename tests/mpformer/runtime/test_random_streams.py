"""The named random streams are reproducible and independent."""

import itertools

import numpy as np
import pytest
import torch

from mpformer.runtime.errors import UserError
from mpformer.runtime.random_streams import PURPOSES, generator, numpy_generator


def test_same_name_same_numbers() -> None:
    first = torch.rand(8, generator=generator(3, "noise", 7))
    assert torch.equal(first, torch.rand(8, generator=generator(3, "noise", 7)))
    assert np.array_equal(numpy_generator(3, "data", 7, 2).random(8), numpy_generator(3, "data", 7, 2).random(8))


def test_streams_differ_in_every_coordinate() -> None:
    names = list(itertools.product((0, 1), PURPOSES, (0, 1, 2), (0, 1)))
    draws = {tuple(numpy_generator(*name).integers(0, 2**62, 2)) for name in names}
    assert len(draws) == len(names)
    torch_draws = {generator(seed, purpose, it, slot=slot).initial_seed() for seed, purpose, it, slot in names}
    assert len(torch_draws) == len(names)


def test_streams_do_not_touch_the_global_generators() -> None:
    before = torch.get_rng_state()
    torch.rand(4, generator=generator(0, "points", 0))
    assert torch.equal(before, torch.get_rng_state())


def test_unknown_purpose_lists_the_valid_ones() -> None:
    with pytest.raises(UserError, match="initialisation, data, noise, points"):
        generator(0, "dropout", 0)  # type: ignore[arg-type]
