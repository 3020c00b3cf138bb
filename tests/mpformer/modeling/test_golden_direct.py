"""The direct implementation gives the golden values of the public implementation, all keys of all files."""

import numpy as np
import pytest
import torch

from tests.support import direct_adapter
from tests.support.golden_rules import Arrays, GoldenCase, problems

CASES = ["case1_eval", "case2_4_mp_all_layers", "case2_4_no_mp", "case3_all_empty", "case7_mask2former"]


def arrays(result: dict) -> Arrays:
    found = {k: v.detach().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for k, v in result.items()}
    return {k: v.astype(np.uint8) if v.dtype == bool else v for k, v in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_direct_implementation_equals_golden_values(name: str) -> None:
    case = GoldenCase.named(name)
    wrong, missing = problems(arrays(direct_adapter.run(case)), case)
    assert not wrong
    assert not missing


def test_rules_notice_a_wrong_weight() -> None:
    case = GoldenCase.named("case2_4_mp_all_layers")
    state = dict(case.state)
    name = "sem_seg_head.predictor.transformer_ffn_layers.3.linear2.weight"
    state[name] = state[name] * 1.001
    changed = GoldenCase(case.path)
    changed.__dict__["state"] = state
    wrong, _ = problems(arrays(direct_adapter.run(changed)), case, only="^out/")
    assert any(line.startswith("out/pred_masks") for line in wrong)
