"""Every suite's run ids and evaluation ids stay what they were when the modules moved into rooms.

``tests/golden/run_ids.json`` holds, for each suite at each scale and dataset, each row's run id at its first seed and
its evaluation id, as commit ce6f541 gave them with an empty data root (`stress`, which came after it, as it began).
Later work that changes an id names it below.
"""

import json
from pathlib import Path

import pytest

from experiments.store.identity import eval_id, run_id
from experiments.suites import planning
from mpformer.config.schema import Config

GOLDEN: dict[str, dict[str, list[str]]] = json.loads(
    (Path(__file__).parents[2] / "golden" / "run_ids.json").read_text()
)

CHANGED: dict[str, str] = {
    "released@paper+coco/mp-former,instance-r50": "the preset mp-former/release is what the release trains with: its "
    "piloted queries see padding, its class loss counts it, and is averaged in each process (the row trains nothing)",
}
"""What has another id now, and why: ``suite@scale+dataset``, or with ``/row``, to the reason."""


def request(place: str) -> planning.Request:
    suite, _, rest = place.partition("@")
    scale, _, dataset = rest.partition("+")
    return planning.Request(suite, scale, dataset)


SCORED_ANEW = {"@mini": ("evaluation.object_mask_threshold", 0.8)}
"""Evaluations that have another id now, by a part of their place: the key that changed, and its value before.

The object threshold of scale mini is 0.2, Mask2Former's 0.8 (`MINI_OBJECT_THRESHOLD` of experiments/suites/scales.py
has the reason). Evaluations without panoptic segments keep their setting, and every run its id.
"""


def former(place: str, config: Config) -> Config:
    """The configuration with the evaluation setting that it had."""
    changes = [change for part, change in SCORED_ANEW.items() if part in place]
    return config.replace(dict(changes)) if config.evaluation.panoptic else config


@pytest.mark.parametrize("place", GOLDEN)
def test_ids_are_what_they_were(place: str, tmp_path: Path) -> None:
    plan = planning.make(request(place), tmp_path)
    now = {run.row.name: [run.run_id, eval_id(former(place, run.config))] for run in reversed(plan.runs)}
    for row, ids in GOLDEN[place].items():
        if place not in CHANGED and f"{place}/{row}" not in CHANGED:
            assert now.get(row) == ids, f"{place}, row {row}"


def test_the_object_threshold_of_scale_mini_is_outside_the_run_id(tmp_path: Path) -> None:
    """Issue 12, 5.12."""
    (run, *_) = planning.make(planning.Request("headline"), tmp_path).runs
    assert run.config.evaluation.object_mask_threshold == 0.2
    before = run.config.replace({"evaluation.object_mask_threshold": 0.8})
    assert (run_id(before), eval_id(before) == run.eval_id) == (run.run_id, False)
    (paper, *_) = planning.make(planning.Request("coco-panoptic", "paper"), tmp_path).runs
    assert paper.config.evaluation.object_mask_threshold == 0.8


def test_a_change_that_is_listed_is_one() -> None:
    known = {*GOLDEN, *(f"{place}/{row}" for place, rows in GOLDEN.items() for row in rows)}
    assert known >= set(CHANGED), "a listed change names no known id"
    assert all(CHANGED.values()), "a listed change has no reason"
