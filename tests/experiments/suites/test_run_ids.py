"""Every suite's run ids and evaluation ids stay what they were when the modules moved into rooms.

``tests/golden/run_ids.json`` holds, for each suite at each scale and dataset, each row's run id at its first seed and
its evaluation id, as commit ce6f541 gave them with an empty data root. Later work that changes an id names it below.
"""

import json
from pathlib import Path

import pytest

from experiments.suites import planning

GOLDEN: dict[str, dict[str, list[str]]] = json.loads(
    (Path(__file__).parents[2] / "golden" / "run_ids.json").read_text()
)

CHANGED: dict[str, str] = {}
"""What has another id now, and why: ``suite@scale+dataset``, or with ``/row``, to the reason."""


def request(place: str) -> planning.Request:
    suite, _, rest = place.partition("@")
    scale, _, dataset = rest.partition("+")
    return planning.Request(suite, scale, dataset)


@pytest.mark.parametrize("place", GOLDEN)
def test_ids_are_what_they_were(place: str, tmp_path: Path) -> None:
    plan = planning.make(request(place), tmp_path)
    now = {run.row.name: [run.run_id, run.eval_id] for run in reversed(plan.runs)}
    for row, ids in GOLDEN[place].items():
        if place not in CHANGED and f"{place}/{row}" not in CHANGED:
            assert now.get(row) == ids, f"{place}, row {row}"


def test_a_change_that_is_listed_is_one() -> None:
    known = {*GOLDEN, *(f"{place}/{row}" for place, rows in GOLDEN.items() for row in rows)}
    assert known >= set(CHANGED), "a listed change names no known id"
    assert all(CHANGED.values()), "a listed change has no reason"
