"""Converting official downloads into what training reads, in the layouts that Mask2Former's users have. No torch.

Conversions run in processes, go on where they stopped, and leave a checksum manifest (``mpformer_manifest.json``)
beside what they wrote.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpformer.config.datasets import dataset
from mpformer.data.chunks import Chunk, Progress, chunks_of, run_chunks
from mpformer.data.coco_layout import (
    Record,
    box,
    write_atomically,
    write_json,
)
from mpformer.data.sources import Release, source_of
from mpformer.runtime.errors import UserError

IGNORE = 255
MANIFEST = "mpformer_manifest.json"
#: converts image ``index`` of a job; returns its record, with the checksums of the files that it wrote under "files"
Convert = Callable[[int], Record]


@dataclass(frozen=True)
class Job:
    """One split of one conversion: where it keeps its progress, how many images, and what makes each."""

    directory: Path
    name: str
    count: int
    convert: Convert


def convert(name: str, data_root: Path, progress: Progress | None = None, workers: int | None = None) -> Path:
    """Convert a downloaded release below the data root; returns its directory.

    Raises UserError if a part of the release is missing or damaged, or the directory cannot be written.
    """
    source = source_of(name)
    if not isinstance(source, Release):
        raise UserError(f"{name} is not a release that is converted; run: {source.command}")
    directory = Path(data_root) / dataset(name).folder
    if not directory.is_dir():
        raise UserError(f"{directory} is not there; see: mpformer data check {name}")
    try:
        files = source.convert(directory, progress, workers)
        write_json(directory / MANIFEST, {"schema": 1, "name": name, "files": dict(sorted(files.items()))})
    except PermissionError as error:
        raise UserError(f"cannot write below {directory}: {error.strerror}") from None
    shutil.rmtree(directory / ".convert", ignore_errors=True)
    return directory


def run_jobs(jobs: Sequence[Job], progress: Progress | None, workers: int | None) -> list[list[Record]]:
    """The records of each job's images, in order; finished chunks of an earlier attempt are read back."""
    total, done = sum(job.count for job in jobs), 0
    results = []
    for job in jobs:
        beside = job.directory / ".convert" / job.name
        (beside / "chunks").mkdir(parents=True, exist_ok=True)
        chunks = chunks_of(job.name, job.count)
        missing = [c for c in chunks if not (beside / "chunks" / c.file).exists()]
        done += job.count - sum(c.stop - c.start for c in missing)
        for chunk in run_chunks(partial(_convert_chunk, job.convert), beside, missing, workers):
            done += chunk.stop - chunk.start
            if progress:
                progress(done, total)
        results.append([r for c in chunks for r in json.loads((beside / "chunks" / c.file).read_text())])
    return results


def _convert_chunk(convert_one: Convert, _: Path, chunk: Chunk) -> list[Record]:
    return [convert_one(index) for index in range(chunk.start, chunk.stop)]


def written(root: Path, path: Path, content: bytes) -> dict[str, str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return {str(path.relative_to(root)): write_atomically(path, content)}


def checksums(results: Sequence[Sequence[Record]]) -> dict[str, str]:
    return {path: sha for records in results for record in records for path, sha in record["files"].items()}


def read_labels(path: Path, name: str) -> NDArray[Any]:
    try:
        with Image.open(path) as file:
            return np.asarray(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); see: mpformer data check {name}") from None


def stems_in(folder: Path, suffix: str, name: str) -> list[str]:
    found = sorted(str(p.relative_to(folder)).removesuffix(suffix) for p in folder.rglob(f"*{suffix}"))
    if not found:
        raise UserError(f"{folder} holds no *{suffix}; see: mpformer data check {name}")
    return found


def segment_of(number: int, category: int, mask: NDArray[np.bool_], crowd: bool = False) -> Record:
    area = int(mask.sum())
    return {"id": number, "category_id": category, "area": area, "bbox": box(mask), "iscrowd": int(crowd)}
