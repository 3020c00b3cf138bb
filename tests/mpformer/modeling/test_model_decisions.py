"""docs/decisions.md: the release's defects, decided one by one, each with a test that is really there."""

import re
from pathlib import Path

import pytest
import torch

from mpformer.runtime.errors import UserError
from tests.support.small_models import batch, rng, small_config, small_model

ROOT = Path(__file__).parents[3]
TABLE = (ROOT / "docs" / "decisions.md").read_text()


def test_every_defect_is_decided() -> None:
    numbers = [int(found) for found in re.findall(r"^\| (\d+)[a-z]? \|", TABLE, re.MULTILINE)]
    assert sorted(set(numbers)) == list(range(1, 11))


def test_every_test_of_the_table_exists() -> None:
    named = re.findall(r"`(\w+\.py)::(\w+)`", TABLE)
    assert len(named) > 15
    for file, test in named:
        (path,) = (ROOT / "tests").rglob(file)
        assert f"def {test}(" in path.read_text(), f"{file}::{test}"


def test_every_switch_of_the_table_is_a_key() -> None:
    config = small_config()
    for key in re.findall(r"`((?:toggles|schedule|runtime)\.\w+)", TABLE):
        section, field = key.split(".")
        assert hasattr(getattr(config, section), field), key


@pytest.mark.parametrize("mode", ["points", "base", "shift_scale", "patch"])
def test_an_unknown_noise_mode_is_an_error_that_lists_the_valid_ones(mode: str) -> None:
    with pytest.raises(UserError, match=r"mask_noise.*point.*shift.*scale.*shift-scale"):
        small_config(toggles__mask_noise=mode)


@pytest.mark.parametrize("heads", [1, 2, 16])
def test_any_number_of_heads_and_no_boxes(heads: int) -> None:
    model = small_model(model__heads=heads, toggles__mp_queries=True, toggles__point_noise=0.2)
    items = batch((2, 1))
    assert not any(item["instances"].has("gt_boxes") for item in items)
    losses = model(items, noise=rng(), points=rng())
    assert all(torch.isfinite(loss) for loss in losses.values())
