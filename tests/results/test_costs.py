"""The costs beside the study's runs."""

from pathlib import Path

import costs
import pytest

from experiments.store.run_dir import Store
from mpformer.runtime.errors import UserError


def test_a_ratio_has_its_interval_and_spread() -> None:
    found = costs.ratio_of([1.0, 1.1, 1.21, 1.331])
    assert found["ratio"] == pytest.approx(1.1**1.5)
    assert found["interval"][0] < found["ratio"] < found["interval"][1]
    assert found["interval"][0] * found["interval"][1] == pytest.approx(found["ratio"] ** 2)
    assert found["middle_half"] == [1.1, 1.21]


def test_without_runs_it_says_what_trains_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run of study-headline on shapes is in .*; make study trains them"):
        costs.configured(Store(tmp_path), "shapes", "mp-former")
