"""The product path gives the golden values, and the direct implementation's for kinds that no file covers."""

from typing import Any

import pytest
import torch

from tests.support import parity_adapter
from tests.support.golden_rules import GoldenCase, problems
from tests.support.made_cases import arrays, make_case

CASES = ["case1_eval", "case2_4_mp_all_layers", "case2_4_no_mp", "case3_all_empty", "case7_mask2former"]

MADE: dict[str, dict[str, Any]] = {
    "guided in the first four layers": {"objects": (3, 1), "guided": 4},
    "guided in the first layer": {"objects": (2, 2), "guided": 1},
    "three groups": {"objects": (3, 1), "num_dn": 3},
    "three groups, first four layers": {"objects": (1, 4), "num_dn": 3, "guided": 4},
    "a budget of slots": {"objects": (5, 2), "num_dn": 100},
    "one empty image": {"objects": (3, 0)},
    "one empty image of three, two groups": {"objects": (0, 2, 5), "num_dn": 2},
    "injected noise": {"objects": (3, 1), "noise": 0.2},
    "injected noise, two groups, first four layers": {"objects": (3, 2), "noise": 0.2, "num_dn": 2, "guided": 4},
    "more objects than queries": {"objects": (14, 1)},
}


@pytest.mark.parametrize("name", CASES)
def test_product_gives_golden_values(name: str) -> None:
    case = GoldenCase.named(name)
    wrong, missing = problems(arrays(parity_adapter.run(case)), case)
    assert not wrong
    assert not missing


@pytest.mark.parametrize("name", MADE)
def test_product_equals_direct_implementation(name: str) -> None:
    case = make_case(**MADE[name])
    wrong, missing = problems(arrays(parity_adapter.run(case)), case)
    assert not wrong
    assert not missing


def test_matching_part_does_not_depend_on_piloting() -> None:
    """Golden files with and without piloting: same images, same matching part."""
    piloted = parity_adapter.run(GoldenCase.named("case2_4_mp_all_layers"))
    plain = parity_adapter.run(GoldenCase.named("case2_4_no_mp"))
    for key in ("out/pred_logits", "out/pred_masks"):
        torch.testing.assert_close(piloted[key], plain[key], rtol=1e-5, atol=1e-4)
