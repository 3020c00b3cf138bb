"""Scoring and layer analysis of given decoder outputs at COCO val's size: CPU seconds and memory of one process.

    python -m benchmarks.coco_layers [--images 625] [--task instance|panoptic] [--side 0|800] [--out FILE.json]

Images of 480 × 640 pixels with seven objects, 100 queries, 10 layers (the network's forward pass is no part of it). The
outputs are made from the objects: each is predicted by one query and, less well, by two more, the other queries predict
blobs; early layers are noisier and less sure. Everything that an evaluation does with an image's outputs is timed
(AP of the last layer by pycocotools, AP of the nine others, the layer analysis, 16 images' masks), its ends included.
Eight processes share 5,000 images: one of them has 625. ``--side 800`` gives outputs of images resized as for the
papers' COCO results, ``--task panoptic`` scores PQ and mIoU of 133 classes as well.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from mpformer.config.schema import Config, validate
from mpformer.data.coco_layout import encode_mask
from mpformer.data.mappers import pack
from mpformer.data.validation import GroundTruth, Segment, ValidationItem
from mpformer.evaluation.evaluate import Collector
from mpformer.evaluation.layer_pass import ImageOutput
from mpformer.modeling.inference import InferenceSettings
from mpformer.modeling.outputs import DecoderOutput
from mpformer.runtime.process import peak_memory, prepare_process

HEIGHT, WIDTH = 480, 640
OBJECTS, QUERIES, LAYERS, CHANNELS, BLOBS = 7, 100, 10, 256, 30
GOAL_SECONDS = 15 * 60


@dataclass(frozen=True)
class Case:
    """What is scored, and the size (height, width) of the model's input."""

    config: Config
    settings: InferenceSettings
    classes: int
    size: tuple[int, int]

    @classmethod
    def of(cls, task: str, side: int) -> "Case":
        panoptic = task == "panoptic"
        scored = {"instance": True, "panoptic": panoptic, "semantic": panoptic}
        config = validate({"dataset": {"name": "coco", "task": task}, "evaluation": scored})
        size = (HEIGHT, WIDTH) if not side else (side, round(side * WIDTH / HEIGHT))
        things = frozenset(range(80))
        return cls(config, InferenceSettings(things, True, panoptic, panoptic), 133 if panoptic else 80, size)


def image_output(case: Case, number: int) -> ImageOutput:
    """One image with its ground truth and what ten layers predict for it."""
    rng = np.random.default_rng(number)
    masks, labels = _objects(rng), rng.integers(0, case.classes if case.classes > 80 else 80, OBJECTS)
    output = _decoder_output(case, torch.from_numpy(masks), labels, rng)
    sized = F.interpolate(torch.from_numpy(masks)[None].float(), size=case.size)[0] > 0
    inputs = pack(np.zeros((*case.size, 3), dtype=np.uint8), labels, sized.numpy())
    item = ValidationItem(inputs | {"file_name": f"{number}.jpg", "image_id": number}, _truth(masks, labels, number))
    return ImageOutput(SimpleNamespace(inference=case.settings), item, output, 0, case.size)  # type: ignore[arg-type]


def _objects(rng: np.random.Generator) -> NDArray[np.bool_]:
    """Ellipses of which later ones hide parts of earlier ones: (7, H, W), up to a quarter of the image."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    owner = np.full((HEIGHT, WIDTH), -1)
    for n in range(OBJECTS):
        area = HEIGHT * WIDTH * np.exp(rng.uniform(np.log(0.002), np.log(0.25)))
        ratio = np.exp(rng.uniform(-0.7, 0.7))
        a, b = np.sqrt(area / np.pi * ratio), np.sqrt(area / np.pi / ratio)
        cy, cx = rng.uniform(0, HEIGHT), rng.uniform(0, WIDTH)
        owner[((y - cy) / a) ** 2 + ((x - cx) / b) ** 2 < 1] = n
    for n in set(range(OBJECTS)) - set(owner.flat):
        owner[0, n] = n  # an object that others hide keeps a cell of its own
    return owner == np.arange(OBJECTS)[:, None, None]


def _decoder_output(
    case: Case, masks: torch.Tensor, labels: NDArray[np.int64], rng: np.random.Generator
) -> DecoderOutput:
    """Class logits and embeddings of ten layers; features hold the objects and some blobs in separate channels."""
    g = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    padded = [-(-side // 32) * 32 for side in case.size]
    cells = (padded[0] // 4, padded[1] // 4)
    inside = (-(-case.size[0] // 4), -(-case.size[1] // 4))
    features = torch.zeros(CHANNELS, *cells)
    soft = F.interpolate(masks[None].float(), size=inside, mode="bilinear", antialias=True)[0]
    features[:OBJECTS, : inside[0], : inside[1]] = 12 * soft - 6
    blobs = F.interpolate(torch.randn(1, BLOBS, 8, 10, generator=g), size=cells, mode="bicubic")[0]
    features[OBJECTS : OBJECTS + BLOBS] = 6 * blobs - 7
    features[-1] = torch.randn(cells, generator=g)
    logits = torch.randn(LAYERS, 1, QUERIES, case.classes + 1, generator=g)
    logits[..., -1] += 7
    embed = torch.zeros(LAYERS, 1, QUERIES, CHANNELS)
    objects = torch.arange(QUERIES) % OBJECTS
    on_object = torch.arange(QUERIES) < 3 * OBJECTS
    for layer in range(LAYERS):
        sure = 2 + layer
        embed[layer, 0, on_object, objects[on_object]] = 1.0
        others = torch.nonzero(~on_object).flatten()
        embed[layer, 0, others, OBJECTS + others % BLOBS] = 1.0
        embed[layer, 0, :, -1] = 6 / sure
        first = torch.arange(OBJECTS)
        logits[layer, 0, first, torch.from_numpy(labels)] += 4 + sure
        twice = torch.arange(OBJECTS, 3 * OBJECTS)
        logits[layer, 0, twice, torch.from_numpy(labels)[twice % OBJECTS]] += 4
    empty = torch.zeros(LAYERS - 1, 1, QUERIES, dtype=torch.bool)
    return DecoderOutput(logits, embed, features[None], None, None, empty)


def _truth(masks: NDArray[np.bool_], labels: NDArray[np.int64], number: int) -> GroundTruth:
    annotations = tuple(
        {"category_id": int(c), "iscrowd": 0, "area": int(mask.sum()), "segmentation": encode_mask(mask)}
        for mask, c in zip(masks, labels, strict=True)
        if c < 80
    )
    ids = (masks * np.arange(1, OBJECTS + 1)[:, None, None]).sum(0)
    semantic = np.append(255, labels).astype(np.uint8)[ids]
    segments = tuple(Segment(n + 1, int(c), False) for n, c in enumerate(labels))
    return GroundTruth(number, HEIGHT, WIDTH, annotations, ids, segments, semantic)


def _resident() -> int:
    """MiB of this process's memory that are in use or kept by the allocator now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def _clocks() -> NDArray[np.float64]:
    """CPU and wall seconds."""
    return np.array([time.process_time(), time.perf_counter()])


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=625)
    parser.add_argument("--task", choices=("instance", "panoptic"), default="instance")
    parser.add_argument("--side", type=int, default=0, help="shorter side of the model's input; 0: as the image")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    asked = _asked()
    prepare_process("cpu", 1)
    result = _measured(Case.of(asked.task, asked.side), asked.images, asked.task)
    print(json.dumps(result, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


def _measured(case: Case, count: int, task: str) -> dict[str, Any]:
    """What scoring this many images takes."""
    for number in (1, 2):  # libraries allocate when they are first used
        Collector(case.config).add(image_output(case, number))
    before = peak_memory(torch.device("cpu"))
    collected, spent, resident = Collector(case.config, range(1, 17)), np.zeros(2), {}
    for number in range(1, count + 1):
        image = image_output(case, number)
        start = _clocks()
        collected.add(image)
        spent += _clocks() - start
        if number % max(1, count // 5) == 0:
            resident[number] = _resident()
    images, seen = spent[0], peak_memory(torch.device("cpu"))
    start = _clocks()
    with tempfile.TemporaryDirectory() as folder:
        summary = collected.summary()
        collected.write(Path(folder))
    cpu, wall = spent + _clocks() - start
    return {
        "what": f"{count} images of {HEIGHT} x {WIDTH}, input {case.size}, {task}",
        "queries": QUERIES,
        "layers": LAYERS,
        "cpu_seconds": round(cpu, 1),
        "wall_seconds": round(wall, 1),
        "milliseconds_an_image": round(1000 * images / count, 1),
        "cpu_seconds_of_625_images": round(625 * images / count + cpu - images, 1),
        "goal_seconds_of_625_images": GOAL_SECONDS,
        "peak_memory_mib": round(peak_memory(torch.device("cpu")) / 2**20),
        "of_it_after_two_images_mib": round(before / 2**20),
        "of_it_before_the_ends_mib": round(seen / 2**20),
        "resident_mib_after_images": resident,
        "load": os.getloadavg(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "AP_by_layer": [round(ap, 3) for ap in summary["layers"]["AP"]],
    }


if __name__ == "__main__":
    main()
