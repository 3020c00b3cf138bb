"""What a training step asks of a GPU, counted without one: operators, synchronisations, uploads, bytes.

    python -m benchmarks.device_counts --write

R50 at 1024², batch 2, one group, with 60 and with 6 objects an image, beside ``transformers``' Mask2Former on the same
pretend device (:mod:`tests.pretend_device`). Operators are dispatched ones without views. Deformable attention is one
forward and one backward operator in ours, as its kernel is; in the peer it is what the peer computes.
"""

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from detectron2.structures import Instances
from torch import Tensor

from benchmarks.settings import MASK2FORMER, PILOTED
from mpformer.config.schema import Config, DatasetConfig, Toggles
from tests.pretend_device.device import PretendDevice, device
from tests.pretend_device.training import Batch, make_trainer, pretending, step
from tests.support.transformers_peer import build_peer

RESULT = Path(__file__).parent / "results" / "device_counts.json"
SIDE, IMAGES, CLASSES = 1024, 2, 80
_BACKBONE = "backbone"


@dataclass(frozen=True)
class Counts:
    """One step."""

    name: str
    objects: int
    operators: int
    by_phase: dict[str, int]
    synchronisations: list[str]
    uploads: list[str]
    saved: dict[str, int]
    """Bytes that autograd keeps, by phase."""
    peaks: dict[str, int]
    """Bytes above what was there when the phase began, by phase."""

    @property
    def saved_outside_the_backbone(self) -> int:
        return sum(size for phase, size in self.saved.items() if phase != _BACKBONE)


def config(toggles: Toggles) -> Config:
    """The R50 model of the papers."""
    return Config(dataset=DatasetConfig(name="coco", task="instance"), toggles=toggles)


def ours(name: str, toggles: Toggles, objects: int) -> Counts:
    """The second step of the trainer: what is made once is there by then."""
    with pretending(values=False) as pretend, TemporaryDirectory() as folder:
        made = make_trainer(config(toggles), Path(folder))
        for iteration in range(2):
            _forget(pretend)
            step(pretend, made, _batch(objects), iteration)
        return _counts(pretend, name, objects)


def peer(objects: int) -> Counts:
    """``transformers``' model with its own losses, gradients clipped and stepped as ours."""
    model: torch.nn.Module = build_peer(config(MASK2FORMER).model, CLASSES)
    with pretending(values=False) as pretend:
        model.to(device())
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        for _ in range(2):
            _forget(pretend)
            _peer_step(pretend, model, optimiser, objects)
        return _counts(pretend, "transformers", objects)


def _peer_step(pretend: PretendDevice, model: Any, optimiser: torch.optim.Optimizer, objects: int) -> None:
    places = [
        (model.model.pixel_level_module.encoder, "forward", _BACKBONE),
        (model.model.pixel_level_module.decoder, "forward", "pixel decoder"),
        (model.model.transformer_module, "forward", "decoder"),
        (model, "get_loss_dict", "losses"),
        (model.criterion.matcher, "forward", "matching"),
        (Tensor, "backward", "backward"),
        (torch.nn.utils, "clip_grad_norm_", "clipping"),
        (optimiser, "step", "optimiser"),
    ]
    with pretend.phase("rest"), pretend.saving(), ExitStack() as stack:
        for owner, name, phase in places:
            stack.enter_context(pretend.watched(owner, name, phase))
        masks = [torch.zeros(objects, SIDE, SIDE).to(device()) for _ in range(IMAGES)]
        labels = [torch.zeros(objects, dtype=torch.int64).to(device()) for _ in range(IMAGES)]
        images = torch.zeros(IMAGES, 3, SIDE, SIDE).to(device())
        model(pixel_values=images, mask_labels=masks, class_labels=labels).loss.sum().backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.01, foreach=True)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def _batch(objects: int) -> Batch:
    batch = []
    for _ in range(IMAGES):
        instances = Instances((SIDE, SIDE))
        instances.gt_classes = torch.zeros(objects, dtype=torch.int64)
        instances.gt_masks = torch.zeros(objects, SIDE, SIDE, dtype=torch.bool)
        batch.append({"image": torch.zeros(3, SIDE, SIDE, dtype=torch.uint8), "instances": instances})
    return batch


def _forget(pretend: PretendDevice) -> None:
    pretend.events.clear()
    pretend.peaks.clear()
    pretend.memory.saved.clear()


def _counts(pretend: PretendDevice, name: str, objects: int) -> Counts:
    events = [event for event in pretend.events if event.phase != "outside"]
    places = {
        kind: [f"{event.phase}, {event.line}" for event in events if event.kind == kind]
        for kind in ("synchronisation", "upload")
    }
    by_phase = Counter(event.phase for event in events if event.kind == "operator")
    waits, uploads = places["synchronisation"], places["upload"]
    saved, peaks = dict(pretend.memory.saved), dict(pretend.peaks)
    return Counts(name, objects, by_phase.total(), dict(by_phase), waits, uploads, saved, peaks)


def _table(found: list[Counts]) -> str:
    gib = 2**30
    lines = [
        "| | objects | operators | synchronisations | uploads | saved outside the backbone, GiB |"
        " peak of matching, losses, GiB | peak of the step, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in found:
        peaks = [c.peaks.get(phase, 0) / gib for phase in ("matching", "losses", "rest")]
        lines.append(
            f"| {c.name} | {c.objects} | {c.operators} | {len(c.synchronisations)} | {len(c.uploads)}"
            f" | {c.saved_outside_the_backbone / gib:.2f} | {peaks[0]:.2f}, {peaks[1]:.2f} | {peaks[2]:.2f} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--write", is_flag=True, help=f"write {RESULT.name}")
def main(write: bool) -> None:
    """Count a step of every method with 60 and 6 objects, and of the peer."""
    found = []
    for objects in (60, 6):
        found += [ours("MP-Former", PILOTED, objects), ours("Mask2Former", MASK2FORMER, objects), peer(objects)]
    print(_table(found))
    if write:
        RESULT.write_text(json.dumps([vars(counts) for counts in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
