"""A dataset is one entry and one module: everything else finds both by its name."""

import hashlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mpformer.config import datasets
from mpformer.config.mask2former_yaml import from_cfg, to_cfg
from mpformer.config.schema import Config, DatasetConfig
from mpformer.data.catalog import records
from mpformer.data.check import check
from mpformer.data.chunks import Chunk
from mpformer.data.coco_layout import Layout, Record, write_scene
from mpformer.data.coco_reader import read_prepared
from mpformer.data.prepare import Recipe, build, prepare
from mpformer.data.prepared import dataset_dir, resolve
from mpformer.data.scene import Scene, Segment
from mpformer.data.sources import Prepared
from mpformer.data.validation import validation_items
from mpformer.runtime.errors import UserError

IDENTITY = hashlib.sha256(b"toys").hexdigest()


def draw(root: Path, chunk: Chunk) -> list[Record]:
    """A ball (class 1) on a lawn (class 2, stuff)."""
    ids = np.full((32, 32), 2, dtype=np.int32)
    ids[8:20, 8:20] = 1
    scene = Scene(np.zeros((32, 32, 3), np.uint8), ids, (Segment(1, 1, True), Segment(2, 2, False)))
    return [write_scene(Layout(root, chunk.split), i + 1, scene, stuff=True) for i in range(chunk.start, chunk.stop)]


def module() -> ModuleType:
    made = ModuleType("toys_set")
    recipe = Recipe("toys", IDENTITY, {}, {"train": 3, "val": 2}, draw)
    made.SOURCE = Prepared(  # type: ignore[attr-defined]
        partial(read_prepared, "toys"),
        lambda dataset, root, source, progress, workers: build(recipe, root, progress, 1),
        "mpformer data prepare toys",
        fingerprint=lambda dataset: IDENTITY,
    )
    return made


ENTRY = datasets.Dataset(
    name="toys",
    title="Toys",
    things=2,
    stuff=1,
    classes=lambda: datasets.things_then_stuff(("cube", "ball"), ("lawn",)),
    module="toys_set",
    folder="toys",
)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    monkeypatch.setitem(sys.modules, "toys_set", module())
    datasets.register(ENTRY)
    yield Config(dataset=DatasetConfig(name="toys", task="panoptic"))
    del datasets.DATASETS["toys"]


def test_a_dataset_is_one_entry_and_one_module(toys: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mpformer data prepare toys"):
        dataset_dir(toys, tmp_path)
    directory = prepare(toys.dataset, tmp_path)
    config = resolve(toys, tmp_path)
    assert directory == dataset_dir(config, tmp_path)
    (report,) = check("toys", tmp_path, full=True)
    assert report.ok
    assert "ball, lawn" in "\n".join(report.lines())
    found = records(config, tmp_path, "train", ["instance", "panoptic", "semantic"])
    assert [[a["category_id"] for a in record["annotations"]] for record in found] == [[1]] * 3
    assert len(validation_items(config, tmp_path)) == 2
    assert from_cfg(to_cfg(config)) == config


def test_names_that_are_not_registered_are_refused_with_those_that_are(toys: Config) -> None:
    with pytest.raises(UserError, match=r"dataset\.name: unknown dataset; valid: shapes, .*, toys"):
        toys.replace({"dataset.name": "toy"})
    with pytest.raises(UserError, match="already"):
        datasets.register(ENTRY)
