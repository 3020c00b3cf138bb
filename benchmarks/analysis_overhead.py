"""What the layer analysis adds to an evaluation, part by part: CPU seconds of one thread, image after image.

    python -m benchmarks.analysis_overhead RUN [--images N] [--data-root datasets]   a finished run's directory

The parts take turns on every image, so that a busy machine slows all alike. *Evaluation* is the forward pass and the
recorded scores of the last layer, ends included; the recorder (``layers.parquet``), the scores of the other layers,
the masks kept for figures, and the gradients of 64 images are shares on top of it.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from experiments.store.run_dir import RunDir
from mpformer.config.schema import Config
from mpformer.data.validation import validation_items
from mpformer.evaluation.evaluate import GRADIENT_IMAGES, Collector
from mpformer.evaluation.gradient_accuracy import attention_numbers
from mpformer.evaluation.layer_masks import mask_record
from mpformer.evaluation.layer_pass import image_outputs
from mpformer.evaluation.layer_scores import add_layer
from mpformer.evaluation.scoring import per_image
from mpformer.modeling.meta_arch import build_model
from mpformer.modeling.weights import load_weights

EVALUATION = ("forward pass", "scores of the last layer")
LIMIT = 25
"""Percent that the recorder may add to the evaluation."""


class Parts:
    """CPU seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add what the block takes."""
        start = time.process_time()
        yield
        self.seconds[part] += time.process_time() - start

    def each(self, part: str, items: Iterator[Any]) -> Iterator[Any]:
        """Pass items on; the time is that of making them."""
        while True:
            with self.timed(part):
                item = next(items, None)
            if item is None:
                return
            yield item


def measure(config: Config, weights: Path, data_root: Path, images: int | None, folder: Path) -> dict[str, float]:
    """Seconds by part of one evaluation of a weights file."""
    model = build_model(config)
    load_weights(model, weights)
    items = validation_items(config, data_root, images)
    collected, parts = Collector(config, len(items)), Parts()
    assert collected.recorder is not None
    for number, image in enumerate(parts.each(EVALUATION[0], image_outputs(model, items))):
        with parts.timed(EVALUATION[1]):
            add_layer(collected.scorer, image, -1)
        with parts.timed("recorder"):
            collected.recorder.add_prediction(
                image.image_id, image.prediction, image.masks, image.labels, empty_attention=image.empty_attention
            )
        with parts.timed("scores of the other layers"):
            for layer, scorer in enumerate(collected.layer_scorers):
                add_layer(scorer, image, layer)
        if number in collected.kept:
            with parts.timed("masks kept"):
                mask_record(config, image)
    _ends(collected, parts, folder)
    with parts.timed("gradients"):
        attention_numbers(model, config, items.only(range(min(len(items), GRADIENT_IMAGES))))
    return dict(parts.seconds)


def _ends(collected: Collector, parts: Parts, folder: Path) -> None:
    """What is computed and written once all images have been seen."""
    with parts.timed(EVALUATION[1]):
        collected.scorer.result()
        per_image.write(folder / "per_image.parquet", collected.scorer.per_image())
    with parts.timed("scores of the other layers"):
        for scorer in collected.layer_scorers:
            scorer.result()
    with parts.timed("recorder"):
        assert collected.recorder is not None
        collected.recorder.summary()
        collected.recorder.write(folder / "layers.parquet")


def lines(seconds: dict[str, float], images: int) -> Iterator[str]:
    """The parts as text, those on top of the evaluation in percent of it."""
    whole = sum(seconds[part] for part in EVALUATION)
    yield f"evaluation {whole:.1f} s of CPU for {images} images ({1000 * whole / images:.1f} ms an image)"
    for part, spent in seconds.items():
        share = f"{100 * spent / whole:5.1f} %"
        yield f"  {part:<28}{spent:8.2f} s  {share}{' of it' if part in EVALUATION else ' on top'}"
    recorder = 100 * seconds["recorder"] / whole
    yield f"recorder: {recorder:.1f} % on top of the evaluation, {'within' if recorder <= LIMIT else 'OVER'} {LIMIT} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--images", type=int, help="the first N validation images; default: all")
    parser.add_argument("--data-root", type=Path, default=Path("datasets"))
    asked = parser.parse_args()
    directory = RunDir(asked.run)
    trained = directory.trained()
    if trained is None:
        raise SystemExit(f"{asked.run} is not a trained run")
    config = directory.config()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(config, asked.run / str(trained["weights"]), asked.data_root, asked.images, Path(folder))
    print("\n".join(lines(seconds, asked.images or len(validation_items(config, asked.data_root)))))


if __name__ == "__main__":
    main()
