"""What the layer analysis adds to an evaluation, part by part: CPU seconds of one thread, image after image.

    python -m benchmarks.analysis_overhead [RUN] [--images N] [--passes N] [--data-root datasets]

RUN is the directory of a finished run; without one it is the mini model as it is before training. Each pass is printed,
then the median and the range of what is added.

The parts take turns on every image, so that a busy machine slows all alike. *Scoring* is the forward pass and the
recorded scores of the last layer, ends included; every other part is printed as a share on top of it. The scores of
the other layers are also held against the whole evaluation that a run makes without them (``layer_scores: final``),
which has the recorder (``layers.parquet``), the masks kept for figures, and the gradients of 64 images as well.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from experiments.store.run_dir import RunDir
from experiments.suites.scales import base
from mpformer.config.schema import Config
from mpformer.data.prepared import resolve
from mpformer.data.validation import validation_items
from mpformer.evaluation.evaluate import GRADIENT_IMAGES, Collector, spread
from mpformer.evaluation.gradient_accuracy import attention_numbers
from mpformer.evaluation.layer_masks import mask_record
from mpformer.evaluation.layer_pass import image_outputs
from mpformer.evaluation.layer_scores import record_last
from mpformer.evaluation.scoring import per_image
from mpformer.modeling.meta_arch import MPFormer, build_model
from mpformer.modeling.weights import load_weights
from mpformer.runtime.process import prepare_process

SCORING = ("forward pass", "scores of the last layer")
OTHERS = "scores of the other layers"


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


def measure(model: MPFormer, config: Config, data_root: Path, images: int | None, folder: Path) -> dict[str, float]:
    """Seconds by part of one evaluation of a model."""
    items = validation_items(config, data_root, images)
    collected, parts = Collector(config), Parts()
    assert collected.scorer is not None
    assert collected.recorder is not None
    assert collected.layer_scores is not None
    kept = spread(len(items), config.evaluation.layer_mask_images)
    for number, image in enumerate(parts.each(SCORING[0], image_outputs(model, items))):
        with parts.timed(SCORING[1]):
            record_last(collected.scorer, image)
        with parts.timed("recorder"):
            collected.recorder.add_prediction(
                image.image_id, image.prediction, image.masks, image.labels, empty_attention=image.empty_attention
            )
        with parts.timed(OTHERS):
            collected.layer_scores.add(image)
        if number in kept:
            with parts.timed("masks kept"):
                mask_record(config, image)
    _ends(collected, parts, folder)
    with parts.timed("gradients"):
        attention_numbers(model, config, items.only(range(min(len(items), GRADIENT_IMAGES))))
    return dict(parts.seconds)


def _ends(collected: Collector, parts: Parts, folder: Path) -> None:
    """What is computed and written once all images have been seen."""
    assert collected.scorer is not None
    with parts.timed(SCORING[1]):
        collected.scorer.result()
        per_image.write(folder / "per_image.parquet", collected.scorer.per_image())
    with parts.timed(OTHERS):
        assert collected.layer_scores is not None
        collected.layer_scores.results()
    with parts.timed("recorder"):
        assert collected.recorder is not None
        collected.recorder.summary()
        collected.recorder.write(folder / "layers.parquet")


def lines(seconds: dict[str, float], images: int) -> Iterator[str]:
    """The parts as text, those on top of the scoring in percent of it."""
    whole = _sum(seconds, SCORING)
    yield f"scoring {whole:.1f} s of CPU for {images} images ({1000 * whole / images:.1f} ms an image)"
    for part, spent in seconds.items():
        share = f"{100 * spent / whole:5.1f} %"
        yield f"  {part:<28}{spent:8.2f} s  {share}{' of it' if part in SCORING else ' on top'}"


def verdicts(passes: list[dict[str, float]]) -> Iterator[str]:
    """Of the parts that have a limit: the median and the range over the passes, in percent of what they add to."""
    yield f"recorder, of scoring: {_added(passes, 'recorder', SCORING, 25)}"
    without = [part for part in passes[0] if part != OTHERS]
    yield f"{OTHERS}, of an evaluation without them: {_added(passes, OTHERS, without, 50)}"


def _added(passes: list[dict[str, float]], part: str, to: Sequence[str], limit: float) -> str:
    added = sorted(100 * seconds[part] / _sum(seconds, to) for seconds in passes)
    median = statistics.median(added)
    verdict = "within" if median <= limit else "OVER"
    return f"{median:.1f} % ({added[0]:.1f}-{added[-1]:.1f}, n = {len(passes)}), {verdict} {limit} %"


def _sum(seconds: dict[str, float], parts: Iterable[str]) -> float:
    return sum(seconds[part] for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, nargs="?", help="directory of a finished run; default: the untrained mini model"
    )
    parser.add_argument("--images", type=int, help="the first N validation images; default: all")
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--data-root", type=Path, default=Path("datasets"))
    asked = parser.parse_args()
    prepare_process("cpu", 1)
    config, model = untrained(asked.data_root) if asked.run is None else trained(asked.run)
    images, passes = asked.images or len(validation_items(config, asked.data_root)), []
    for _ in range(asked.passes):
        with tempfile.TemporaryDirectory() as folder:
            passes.append(measure(model, config, asked.data_root, asked.images, Path(folder)))
        print("\n".join(lines(passes[-1], images)), flush=True)
    print("\n".join(verdicts(passes)))


def trained(run: Path) -> tuple[Config, MPFormer]:
    """A finished run's configuration and model."""
    directory = RunDir(run)
    record = directory.trained()
    if record is None:
        raise SystemExit(f"{run} is not a trained run")
    config = directory.config()
    model = build_model(config)
    load_weights(model, run / record.weights)
    return config, model


def untrained(data_root: Path) -> tuple[Config, MPFormer]:
    """The mini model with random classes that are spread out: every query is confident, which is dear for PQ."""
    config = resolve(base("mini"), data_root)
    model = build_model(config)
    head = model.sem_seg_head.predictor.class_embed
    head.weight.data.normal_(0, 2, generator=torch.Generator().manual_seed(0))
    head.bias.data[-1] = -3
    return config, model


if __name__ == "__main__":
    main()
