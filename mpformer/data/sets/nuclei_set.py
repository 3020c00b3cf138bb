"""The ``nuclei`` dataset: the tiles of :mod:`mpformer.data.sets.nuclei` as COCO files. No torch but to read it."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from mpformer.config.schema import DatasetConfig
from mpformer.data.chunks import Chunk, Progress
from mpformer.data.coco_layout import Layout, Record, write_scene
from mpformer.data.coco_reader import read_prepared
from mpformer.data.prepare import Recipe, build
from mpformer.data.sets import nuclei
from mpformer.data.sources import Prepared
from mpformer.runtime.errors import UserError


def prepare_nuclei(
    source: Path, data_root: Path, crop: int = nuclei.DEFAULT_CROP, progress: Progress | None = None
) -> Path:
    """Convert the Data Science Bowl's public layout (directory or archive); returns the dataset's directory.

    Raises UserError if the source is missing, incomplete or broken, or the data root cannot be written.
    """
    images = nuclei.read_source(Path(source))
    tiles: dict[str, list[nuclei.Tile]] = {"train": [], "val": []}
    for done, item in enumerate(images, start=1):
        tiles[item.split] += nuclei.tiles(item, crop)
        if progress:
            progress(done, 2 * len(images))
    counts = {split: len(found) for split, found in tiles.items()}
    if not all(counts.values()):
        raise UserError(f"{source} gives {counts} tiles of {crop} px; both splits need some: use the whole set")
    identity = nuclei.fingerprint(images, crop)
    recipe = Recipe("nuclei", identity, nuclei.parameters(crop), counts, partial(_tile_chunk, tiles))
    total = sum(counts.values())
    half = (lambda done, _: progress(total + done, 2 * total)) if progress else None
    return build(recipe, data_root, half, workers=1)


def _tile_chunk(tiles: Mapping[str, list[nuclei.Tile]], root: Path, chunk: Chunk) -> list[Record]:
    layout = Layout(root, chunk.split)
    records = []
    for index in range(chunk.start, chunk.stop):
        tile = tiles[chunk.split][index]
        record = write_scene(layout, index + 1, tile.scene, stuff=False)
        record["image"] |= {"source": tile.source, "corner": list(tile.corner)}
        records.append(record)
    return records


def _prepare(
    dataset: DatasetConfig, data_root: Path, source: Path | None, progress: Progress | None, _: int | None
) -> Path:
    if source is None:
        raise UserError("nuclei needs its source: mpformer data prepare nuclei SRC (directory or archive)")
    return prepare_nuclei(source, data_root, dataset.crop or nuclei.DEFAULT_CROP, progress)


SOURCE = Prepared(
    partial(read_prepared, "nuclei"),
    _prepare,
    "mpformer data prepare nuclei SRC",
    f", where SRC is the directory or archive of {nuclei.WHERE}",
    crop=nuclei.DEFAULT_CROP,
)
