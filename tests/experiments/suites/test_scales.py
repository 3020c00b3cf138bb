"""A registered dataset is one that suites of scale mini run on, if its entry says how."""

from pathlib import Path

import pytest

from experiments.suites import catalogue, scales
from experiments.suites.planning import Request, make
from mpformer.config.datasets import DATASETS, Dataset, Mini, things_then_stuff

CELLS = Dataset(
    name="cells",
    title="Cells",
    things=1,
    stuff=0,
    classes=lambda: things_then_stuff(("cell",)),
    module="mpformer.data.sets.nuclei_set",
    folder="cells",
    mini=Mini(queries=30, seconds=0.5, keys={"crop": 96}),
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "cells", CELLS)


def test_its_entry_alone_makes_it_a_dataset_of_scale_mini() -> None:
    assert scales.datasets("mini")[-1] == "cells"
    config = scales.base("mini", "cells")
    assert (config.dataset.task, config.dataset.crop, config.model.queries) == ("instance", 96, 30)
    assert not config.evaluation.panoptic
    assert scales.declared_seconds("mini", "cells")[0] == 0.5
    assert scales.column_reasons("cells", config.evaluation)["PQ"] == "cells has instances of one class and no stuff"


def test_what_its_counts_say_leaves_rows_and_suites_out_with_the_reason(tmp_path: Path) -> None:
    plan = make(Request("components", dataset="cells"), tmp_path)
    assert {row.name: row.not_applicable for row in plan.rows if row.not_applicable} == {
        "mp-flip": "cells has one class: a flipped label is the same label"
    }
    reasons = {name: suite.why_not("cells") for name, suite in catalogue.all_suites().items()}
    assert not reasons["headline"]
    assert all(reasons[name] for name in ("flip-noise", "class-embedding", "coco-instance", "released", "stress"))


def test_without_it_suites_do_not_run_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(DATASETS, "cells")
    assert "cells" not in scales.datasets("mini")
