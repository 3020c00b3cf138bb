"""The ``shapes`` dataset: the images of :mod:`mpformer.data.sets.shapes` as COCO files. No torch but to read it."""

from functools import partial
from pathlib import Path

from mpformer.config.schema import DatasetConfig, ShapesConfig
from mpformer.data.chunks import Chunk, Progress
from mpformer.data.coco_layout import Layout, Record, write_scene
from mpformer.data.coco_reader import read_prepared
from mpformer.data.prepare import Recipe, build
from mpformer.data.sets import shapes
from mpformer.data.sources import Prepared


def prepare_shapes(
    config: ShapesConfig, data_root: Path, progress: Progress | None = None, workers: int | None = None
) -> Path:
    """Draw the shapes dataset unless it is there; returns its directory.

    progress(done, total) counts images; workers is the number of processes (None: one per processor).
    Raises UserError if the data root cannot be written.
    """
    counts = {"train": config.train_images, "val": config.val_images}
    parameters = {"version": shapes.GENERATOR_VERSION, **config.model_dump()}
    work = partial(_draw_chunk, config)
    return build(Recipe("shapes", shapes.fingerprint(config), parameters, counts, work), data_root, progress, workers)


def _draw_chunk(config: ShapesConfig, root: Path, chunk: Chunk) -> list[Record]:
    layout = Layout(root, chunk.split)
    return [
        write_scene(layout, index + 1, shapes.generate(config, chunk.split, index), stuff=True)
        for index in range(chunk.start, chunk.stop)
    ]


def _prepare(
    dataset: DatasetConfig, data_root: Path, _: Path | None, progress: Progress | None, workers: int | None
) -> Path:
    return prepare_shapes(_parameters(dataset), data_root, progress, workers)


def _fingerprint(dataset: DatasetConfig) -> str:
    return shapes.fingerprint(_parameters(dataset))


def _parameters(dataset: DatasetConfig) -> ShapesConfig:
    assert dataset.shapes is not None
    return dataset.shapes


SOURCE = Prepared(partial(read_prepared, "shapes"), _prepare, "mpformer data prepare shapes", fingerprint=_fingerprint)
