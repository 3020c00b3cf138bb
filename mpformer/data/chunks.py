"""Work on many images, cut into chunks that processes share and that a second start need not do again. No torch."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from mpformer.data.coco_layout import Record, write_json

#: takes (done, total) images
Progress = Callable[[int, int], None]
_CHUNK = 50


@dataclass(frozen=True)
class Chunk:
    """A part of the work: images start ... stop - 1 of a split."""

    split: str
    start: int
    stop: int

    @property
    def file(self) -> str:
        return f"{self.split}-{self.start:06d}-{self.stop:06d}.json"


#: writes the images of a chunk below a directory and returns their records
Work = Callable[[Path, Chunk], list[Record]]


def chunks_of(split: str, count: int) -> list[Chunk]:
    """Cut a split into chunks of at most 50 images."""
    return [Chunk(split, start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]


def run_chunks(work: Work, root: Path, chunks: list[Chunk], workers: int | None) -> Iterator[Chunk]:
    """Do the chunks, in processes if there are several, keep each one's records, and give it when it is done."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(chunks))
    if workers <= 1:
        for chunk in chunks:
            yield _do(work, root, chunk)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=ignore_interrupts) as pool:
        try:
            for future in as_completed([pool.submit(_do, work, root, chunk) for chunk in chunks]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def ignore_interrupts() -> None:
    """Ctrl-C is for the parent, which then stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _do(work: Work, root: Path, chunk: Chunk) -> Chunk:
    write_json(root / "chunks" / chunk.file, work(root, chunk))
    return chunk
