"""Scoring a checkpoint: one pass over the validation images gives the recorded scores, those of every decoder layer,
the layer analysis, and what the bootstrap, the figures and the explorer need later without the model.

Files written into the evaluation's directory: ``layers.parquet``, ``per_image.parquet`` and ``layer_masks/``;
``result.json`` is the caller's to write, last.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis import scores as analysis_scores
from analysis.masks import write_layer_masks
from analysis.recorder import LayerRecorder
from mpformer.config.classes import class_table
from mpformer.config.schema import Config
from mpformer.data.coco_layout import empty_at_stride
from mpformer.data.validation import ValidationItem, ValidationItems, validation_items
from mpformer.evaluation.compute_cost import costs
from mpformer.evaluation.gradient_accuracy import attention_numbers
from mpformer.evaluation.layer_masks import mask_record, pixels_of
from mpformer.evaluation.layer_pass import ImageOutput, image_outputs
from mpformer.evaluation.layer_scores import LayerScores, record_last
from mpformer.evaluation.parts import Parts
from mpformer.evaluation.scoring import per_image
from mpformer.evaluation.scoring.scorer import SegmentationScorer, scorer_versions
from mpformer.modeling.deformable_attention import require_kernel
from mpformer.modeling.matcher import match_weights
from mpformer.modeling.meta_arch import MPFormer, build_model
from mpformer.modeling.weights import load_weights
from mpformer.runtime.disk import disk_failures
from mpformer.runtime.errors import RunFailure
from mpformer.runtime.process import peak_memory, prepare_process
from mpformer.runtime.rank import current_rank

__all__ = ["evaluate"]

Progress = Callable[[dict[str, Any]], None]
_STRIDES = (4, 8, 16, 32)
GRADIENT_IMAGES = 64
"""Images, spread over the set, on which gradients under predicted and true attention masks are compared."""
#: scores of every layer that result.json lists
_LAYER_SCORES = ("AP", "PQ", "mIoU")


def evaluate(
    config: Config, weights: Path, out: Path, data_root: Path, *, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Score the weights file on the validation images and write the evaluation's files into `out`.

    All processes of a run may call this together: they share the images (:mod:`mpformer.evaluation.parts`), rank 0
    merges, writes and returns the content of ``result.json`` (percent; without the run's and evaluation's id), the
    others return {}. ``progress`` gets ``image``, ``images`` and ``eta_seconds`` after each image; what it raises ends
    the evaluation, whose parts are kept for the next start. Raises UserError for weights that do not fit,
    RunFailure("nan") for outputs that are not finite, RunFailure("disk" | "data").
    """
    began = time.perf_counter()
    device = prepare_process(config.runtime.device, config.runtime.threads, tf32=config.runtime.tf32)
    require_kernel(device, config.runtime.slow_attention)
    model = build_model(config)
    load_weights(model, weights)
    items = validation_items(config, data_root)
    model.to(device)
    with disk_failures(out):
        parts = Parts.of(config, weights, out, len(items))
    _score_parts(model, config, items, parts, progress)
    if not current_rank().main:
        return {}
    collected = _merged(config, parts)
    with disk_failures(out):
        collected.write(out)
    numbers = _numbers(collected, model, config, items)
    parts.remove()
    return {
        "schema": 1,
        "iteration": config.schedule.max_iter,
        "complete": True,
        "images": collected.images,
        "skipped_images": collected.skipped,
        **numbers,
        "scorers": scorer_versions(),
        "seconds": round(time.perf_counter() - began, 3),
        "peak_memory_bytes": peak_memory(device),
    }


def _numbers(collected: "Collector", model: MPFormer, config: Config, items: ValidationItems) -> dict[str, Any]:
    """The scores of what was collected, and what is measured on a few images besides."""
    numbers = collected.summary()
    if config.evaluation.layer_analysis:
        sample = items.only(spread(len(items), GRADIENT_IMAGES))
        numbers["layers"] |= attention_numbers(model, config, sample)
        numbers["gradient_images"] = len(sample)
    if config.evaluation.costs:
        numbers["costs"] = costs(model, config, items)
    return numbers


def _score_parts(model: MPFormer, config: Config, items: ValidationItems, parts: Parts, progress: Progress) -> None:
    """Score this process's parts and what the others have not done."""
    began, scored = time.perf_counter(), 0
    kept = {int(items.records[index]["image_id"]) for index in spread(len(items), config.evaluation.layer_mask_images)}
    for number in parts.to_do(current_rank()):
        collected, chosen = Collector(config, kept), items.only(parts.indices(number))
        before = parts.images_done()
        for image in image_outputs(model, chosen):
            collected.add(image)
            scored, done = scored + 1, before + collected.images
            left = (time.perf_counter() - began) / scored * (len(items) - done) / current_rank().world_size
            progress({"image": done, "images": len(items), "eta_seconds": round(left, 1)})
        collected.skipped = len(chosen.skipped)
        with disk_failures(parts.folder):
            parts.write(number, collected.state())


def _merged(config: Config, parts: Parts) -> "Collector":
    """All parts in one."""
    collected = Collector(config)
    for number in range(len(parts)):
        collected.absorb(parts.read(number))
    return collected


class Collector:
    """Takes image after image; holds scores and per-image numbers, never the images' masks (but for the few kept).

    ``kept`` are the ids of the images whose masks of every layer are kept.
    """

    def __init__(self, config: Config, kept: Collection[int] = ()) -> None:
        wanted = config.evaluation
        table = class_table(config.dataset.name, config.dataset.task)
        weights = match_weights(config.model)
        self.config = config
        self.images = self.skipped = 0
        self.table = table
        self.scorer = SegmentationScorer(config) if wanted.layer_scores != "none" else None
        every = range(config.model.decoder_layers)
        self.layer_scores = LayerScores(config, every) if wanted.layer_scores == "every" else None
        self.recorder = LayerRecorder(table.is_thing, weights) if wanted.layer_analysis else None
        self.kept = kept
        self.mask_records: list[dict[str, Any]] = []
        self.pixels: dict[int, np.ndarray] = {}
        self.empty = dict.fromkeys(sorted({*_STRIDES, *config.model.attention_strides}), 0)
        self.objects = 0
        self._scores: dict[str, float] | None = None

    def add(self, image: ImageOutput) -> None:
        """Score one image at every layer and record its analysis; raises RunFailure("nan")."""
        if not torch.isfinite(image.output.logits[:, image.index]).all():
            raise RunFailure("nan", f"the model's outputs for image {image.image_id} are not finite")
        if self.scorer is not None:
            record_last(self.scorer, image)
        if self.layer_scores is not None:
            self.layer_scores.add(image)
        if self.recorder is not None:
            self.recorder.add_prediction(
                image.image_id, image.prediction, image.masks, image.labels, empty_attention=image.empty_attention
            )
        if image.image_id in self.kept:
            self.mask_records.append(mask_record(self.config, image))
            self.pixels[image.image_id] = pixels_of(image)
        self._count_empty(image.masks.numpy())
        self.images += 1

    def state(self) -> dict[str, Any]:
        """What has been added, as plain data and arrays."""
        counts = {
            name: getattr(self, name) for name in ("images", "skipped", "objects", "empty", "mask_records", "pixels")
        }
        return counts | {name: part.state() for name, part in self._parts().items()}

    def absorb(self, state: Mapping[str, Any]) -> None:
        """Add what another process was fed with."""
        self.images += state["images"]
        self.skipped += state["skipped"]
        self.objects += state["objects"]
        self.empty = {stride: count + state["empty"][stride] for stride, count in self.empty.items()}
        self.mask_records += state["mask_records"]
        self.pixels |= state["pixels"]
        for name, part in self._parts().items():
            part.absorb(state[name])

    def _parts(self) -> dict[str, Any]:
        scorer = None if self.layer_scores is None else self.layer_scores.scorer
        found = {"scorer": self.scorer, "layer_scores": scorer, "recorder": self.recorder}
        return {name: part for name, part in found.items() if part is not None}

    def _count_empty(self, masks: np.ndarray) -> None:
        """Ground-truth masks that vanish at an attention stride: there, guidance has nothing to open."""
        self.objects += len(masks)
        for stride in self.empty:
            self.empty[stride] += int(empty_at_stride(masks, stride).sum())

    def scores(self) -> dict[str, float]:
        """The recorded scores of the last layer, computed once."""
        if self._scores is None:
            self._scores = {} if self.scorer is None else self.scorer.result()
        return self._scores

    def class_scores(self) -> dict[str, dict[str, float]]:
        """AP, PQ and IoU of the last layer by class name, in percent; on Cityscapes AP is COCO's and called so."""
        self.scores()
        if self.scorer is None:
            return {}
        found = analysis_scores.from_table(per_image.table(self.scorer.per_image())).class_scores()
        if self.scorer.cityscapes and "AP" in found:
            found = {"COCO AP": found.pop("AP"), **found}
        return {score: {self.table.names[c]: value for c, value in by.items()} for score, by in found.items()}

    def write(self, out: Path) -> None:
        """Write everything but ``result.json``."""
        self.scores()  # matching fills what per_image.parquet holds
        if self.scorer is not None:
            per_image.write(out / "per_image.parquet", self.scorer.per_image())
        if self.recorder is not None:
            self.recorder.write(out / "layers.parquet")
        write_layer_masks(out / "layer_masks", self.mask_records, self.pixels)

    def summary(self) -> dict[str, Any]:
        """Metrics, values of every layer, and the analysis' numbers, in percent."""
        final = self.scores()
        layers: dict[str, list[Any]] = {}
        if self.layer_scores is not None:
            by_layer = [*self.layer_scores.results(), final]
            layers = {name: [scores.get(name) for scores in by_layer] for name in _LAYER_SCORES if name in final}
        shares = {str(s): 100 * n / self.objects if self.objects else None for s, n in self.empty.items()}
        analysis = self.recorder.summary() if self.recorder is not None else {"metrics": {}, "layers": {}}
        return {
            **analysis,
            "metrics": {**final, **{k: v for k, v in analysis["metrics"].items() if v is not None}},
            "classes": self.class_scores(),
            "layers": {**layers, **analysis["layers"]},
            "empty_ground_truth_share": shares,
        }


def spread(images: int, wanted: int) -> set[int]:
    """Indices of `wanted` images spread evenly over the set, first and last included: the same for every run."""
    if wanted >= images:
        return set(range(images))
    return {round(index) for index in np.linspace(0, images - 1, wanted)}


def probe_scores(
    model: MPFormer, config: Config, items: Iterable[ValidationItem]
) -> tuple[dict[str, float], LayerRecorder]:
    """Quick scores of the last layer on some validation images, with the layer analysis' recorder."""
    last = config.model.decoder_layers
    scores = LayerScores(config, range(last, last + 1))
    weights = match_weights(config.model)
    recorder = LayerRecorder(class_table(config.dataset.name, config.dataset.task).is_thing, weights)
    for image in image_outputs(model, items):
        scores.add(image)
        recorder.add_prediction(
            image.image_id, image.prediction, image.masks, image.labels, empty_attention=image.empty_attention
        )
    return scores.results()[0], recorder
