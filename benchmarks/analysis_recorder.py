"""CPU seconds and memory of the layer analysis, one thread.

    python benchmarks/analysis_recorder.py mini [images]   128-pixel images, 7 layers, 30 queries, 10 objects

    python benchmarks/analysis_recorder.py coco [images]   800 × 1066 pixels, 10 layers, 100 queries, 7 objects

The model is not part of it: a few random mask features and embeddings are used again and again. Two things are
measured: some images at full size, from which the seconds of the whole set are extrapolated (the time of an image
does not depend on how many came before); and the whole set, every image × layer × object line of it, on small masks,
by two processes whose recorders are merged: what is kept and written does not depend on the masks' size, so these are
the memory and the ending of the whole set.
"""

import multiprocessing
import pickle
import resource
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from analysis.recorder import LayerRecorder


@dataclass(frozen=True)
class Setting:
    """Sizes of one benchmark."""

    image: tuple[int, int]
    layers: int
    queries: int
    objects: int
    width: int
    images: int


SETTINGS = {
    "mini": Setting((128, 128), 7, 30, 10, 64, 500),
    "coco": Setting((800, 1066), 10, 100, 7, 256, 5000),
}


def inputs(setting: Setting, seed: int) -> tuple[torch.Tensor, ...]:
    """(mask embeddings, mask features, class logits, masks, labels): boxes as objects, embeddings that paint about
    their size.
    """
    g = torch.Generator().manual_seed(seed)
    height, width = setting.image
    embed = torch.randn(setting.layers, setting.queries, setting.width, generator=g)
    features = torch.randn(setting.width, -(-height // 4), -(-width // 4), generator=g)
    classes = torch.randn(setting.layers, setting.queries, 81, generator=g)
    masks = torch.zeros(setting.objects, height, width, dtype=torch.bool)
    for mask in masks:
        y, x = (int(torch.randint(0, side // 2, (1,), generator=g)) for side in (height, width))
        mask[y : y + height // 4, x : x + width // 4] = True
    return embed, features, classes, masks, torch.randint(0, 80, (setting.objects,), generator=g)


def record(
    setting: Setting, images: range, samples: int | None = 4, out: Path | None = None
) -> tuple[LayerRecorder, list[float]]:
    """(recorder, CPU seconds of each image), of ``samples`` different inputs (None: each image has its own).

    The recorder is also pickled to ``out``, for another process.
    """
    torch.set_num_threads(1)
    made = [inputs(setting, seed) for seed in range(samples or 0)]
    recorder, seconds = LayerRecorder(), []
    for image in images:
        sample = made[image % len(made)] if made else inputs(setting, image)
        start = time.process_time()
        recorder.add_embeddings(image, *sample, image_size=setting.image)
        seconds.append(time.process_time() - start)
    if out is not None:
        out.write_bytes(pickle.dumps(recorder))
    return recorder, seconds


def whole_set(setting: Setting, folder: Path) -> LayerRecorder:
    """All images of the set on masks of 32 x 32 cells, half of them by another process, merged."""
    small = replace(setting, image=(128, 128), width=16)
    half, theirs = small.images // 2, folder / "other"
    other = multiprocessing.get_context("spawn").Process(
        target=record, args=(small, range(half, small.images), None, theirs)
    )
    other.start()
    recorder, _ = record(small, range(half), None)
    other.join()
    recorder.merge(pickle.loads(theirs.read_bytes()))
    return recorder


class Peak:
    """Most private memory of this process inside a ``with`` block beyond what it had before, in MiB.

    Private: pages of libraries come and go with the page cache. A thread looks every few milliseconds.
    """

    def __enter__(self) -> "Peak":
        self.mib, self._before = 0.0, _private()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.003):
            self.mib = max(self.mib, _private() - self._before)

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        self._thread.join()


def _private() -> float:
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * resource.getpagesize() / 2**20


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "mini"
    setting = SETTINGS[name]
    images = int(sys.argv[2]) if len(sys.argv) > 2 else min(100, setting.images)
    record(SETTINGS["mini"], range(4))  # libraries allocate when they are first used
    with tempfile.TemporaryDirectory() as folder, Peak() as peak:
        recorder = whole_set(setting, Path(folder))
        start = time.process_time()
        recorder.summary()
        recorder.write(Path(folder) / "layers.parquet")
        ending = time.process_time() - start
        size = (Path(folder) / "layers.parquet").stat().st_size
    rows = recorder.rows()
    kept = sum(column.nbytes for column in rows.values())
    print(f"{name}, the whole set: {len(recorder.images)} images, {len(rows['layer'])} lines, merged of two processes")
    print(f"kept for the set    {kept / 2**20:9.1f} MiB; memory grew by {peak.mib:.0f} MiB at most")
    print(f"summary and file    {ending:9.2f} s, {size / 2**20:.1f} MiB")
    samples = 2
    with Peak() as peak:
        _, seconds = record(setting, range(images), samples)
    held = samples * sum(value.nbytes for value in inputs(setting, 0)) / 2**20
    print(f"{name}, {images} images at full size")
    print(f"per image           {1000 * np.median(seconds):9.2f} ms (median), {1000 * min(seconds):.2f} ms (least)")
    print(f"whole set           {np.mean(seconds) * setting.images + ending:9.1f} s, extrapolated")
    print(f"memory grew by      {peak.mib:9.1f} MiB at most, {held:.0f} MiB of it inputs")


if __name__ == "__main__":
    main()
