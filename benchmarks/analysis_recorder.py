"""CPU seconds and memory of the layer analysis, one thread.

    python benchmarks/analysis_recorder.py mini [images]   128-pixel images, 7 layers, 30 queries, 10 objects

    python benchmarks/analysis_recorder.py coco [images]   800 × 1066 pixels, 10 layers, 100 queries, 7 objects

The model is not part of it: a few random mask features and embeddings are used again and again. With fewer images
than the set has, the seconds of the whole set are extrapolated; the memory that grows with the set is measured from
the recorder itself.
"""

import resource
import sys
import tempfile
import time
from dataclasses import dataclass
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


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "mini"
    setting = SETTINGS[name]
    images = int(sys.argv[2]) if len(sys.argv) > 2 else setting.images
    torch.set_num_threads(1)
    samples = [inputs(setting, seed) for seed in range(4)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recorder, seconds = LayerRecorder(), []
    for image in range(images):
        start = time.process_time()
        recorder.add_embeddings(image, *samples[image % 4], image_size=setting.image)
        seconds.append(time.process_time() - start)
    start = time.process_time()
    recorder.summary()
    with tempfile.TemporaryDirectory() as folder:
        recorder.write(Path(folder) / "layers.parquet")
        size = (Path(folder) / "layers.parquet").stat().st_size
    ending = time.process_time() - start
    rows = recorder.rows()
    kept = sum(column.nbytes for column in rows.values())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{name}: {images} images of {setting.images}, {len(rows['layer'])} lines")
    print(f"per image           {1000 * np.median(seconds):9.2f} ms (median), {1000 * min(seconds):.2f} ms (least)")
    print(f"whole set           {np.mean(seconds) * setting.images + ending:9.1f} s")
    print(f"summary and file    {ending:9.2f} s, {size / 2**20:.1f} MiB")
    print(f"kept for the set    {kept / images * setting.images / 2**20:9.1f} MiB")
    print(f"peak memory grew by {grown / 1024:9.1f} MiB")


if __name__ == "__main__":
    main()
