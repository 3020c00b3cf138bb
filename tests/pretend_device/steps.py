"""The trainer's step on a device that is not the host: nothing mixes devices, few things wait, nothing bad enters."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpformer.data.coco_layout import encode_mask
from mpformer.data.validation import GroundTruth, Segment, ValidationItem
from mpformer.evaluation.evaluate import Collector
from mpformer.evaluation.layer_pass import image_outputs
from mpformer.modeling.criterion import Criterion
from mpformer.runtime.callbacks import TrainCallbacks
from mpformer.runtime.errors import RunFailure
from mpformer.training import accumulation
from mpformer.training.trainer import Trainer
from tests.pretend_device.device import MixedDevices, PretendDevice, device
from tests.pretend_device.training import Batch, make_trainer, pretending, step
from tests.support import small_models
from tests.support.small_models import small_config

PILOTED = {"toggles__mp_queries": True, "toggles__point_noise": 0.2, "toggles__flip_noise": 0.2}
METHODS = {"MP-Former": PILOTED, "Mask2Former": {}}
MATCHING = "mpformer/modeling/matcher.py"


@pytest.fixture
def pretend() -> Iterator[PretendDevice]:
    with pretending() as found:
        yield found


def items(counts: tuple[int, ...] = (3, 1)) -> Batch:
    """The small batch, with classes that every task has."""
    made = small_models.batch(counts)
    for item in made:
        item["instances"].gt_classes %= 8
    return made


def waits(pretend: PretendDevice) -> list[str]:
    """Files in which the host waited for the device."""
    return [e.line.split(":")[0] for e in pretend.events if e.kind == "synchronisation"]


def weights(made: Trainer) -> list[torch.Tensor]:
    return [p.detach().cpu().clone() for p in made.core.parameters()]


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_mixes_no_devices_and_waits_once(method: str, task: str, pretend: PretendDevice, tmp_path: Path) -> None:
    made = make_trainer(small_config(dataset__task=task, **METHODS[method]), tmp_path)
    for iteration, counts in enumerate(((3, 1), (2, 0, 1), (0, 0))):
        pretend.events.clear()
        step(pretend, made, items(counts), iteration)
        assert waits(pretend) == ([MATCHING] if any(counts) else [])
        uploads = Counter(e.phase for e in pretend.events if e.kind == "upload")
        # image, labels, masks; then where rows and piloted slots are, which only the host knows
        assert uploads.pop("rest") == 3 * len(counts)
        assert set(uploads) <= {"losses", "piloting", "pixel decoder"}
        assert max(uploads.values(), default=0) <= 1


def test_losses_and_weights_are_those_of_the_cpu(tmp_path: Path) -> None:
    with pretending() as pretend:
        made = make_trainer(small_config(**PILOTED), tmp_path)
        step(pretend, made, items())
        assert pretend.count("synchronisation") == 1
        with pretend.phase("log"):
            found = made.meter.line()
        assert pretend.count("synchronisation") == 2
        ours = weights(made)
    cpu = Trainer(made.config, tmp_path, tmp_path, TrainCallbacks(), torch.device("cpu"), made.rank)
    cpu.iter, cpu.parts = 0, accumulation.micro_batches(iter([items()]), cpu.config)
    cpu.run_step()
    expected = cpu.meter.line()
    names = [name for name in expected if name != "seconds"]
    assert [found[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-3)
    for one, other in zip(ours, weights(cpu), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_operators_do_not_grow_with_objects(pretend: PretendDevice, tmp_path: Path) -> None:
    made, found = make_trainer(small_config(**PILOTED), tmp_path), []
    step(pretend, made, items())  # makes what is made once
    for counts in ((1, 1), (7, 7), (7, 7, 7)):
        pretend.events.clear()
        step(pretend, made, items(counts))
        found.append(pretend.count("operator"))
    assert abs(found[0] - found[1]) <= 5
    assert found[2] < 1.25 * found[1]


def test_no_hidden_value_of_the_encoders_feed_forward_blocks_is_kept(tmp_path: Path) -> None:
    kept = []
    for width in (64, 256):
        with pretending() as pretend:
            step(pretend, make_trainer(small_config(model__encoder_ffn=width), tmp_path), items())
            kept.append(pretend.memory.saved["pixel decoder"])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_step_that_is_no_number_is_left_out_and_named(
    amp: str, pretend: PretendDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Criterion.weighted, itertools.count(1)

    def weighted(self: Criterion, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = real(self, losses)
        return found | {"loss_dice": found["loss_dice"] + math.inf} if next(calls) == 2 else found

    monkeypatch.setattr(Criterion, "weighted", weighted)
    made = make_trainer(small_config(schedule__amp=amp, **PILOTED), tmp_path)
    made.scaler = torch.amp.GradScaler("pretend", init_scale=8.0, enabled=amp == "fp16")  # no gradient overflows
    states = [weights(made)]
    for iteration in range(3):
        step(pretend, made, items(), iteration)
        states.append(weights(made))
    unchanged = [all(map(torch.equal, one, other)) for one, other in itertools.pairwise(states)]
    assert unchanged == [False, True, False]
    with pytest.raises(RunFailure, match=r"iteration 2: loss_dice = inf"):
        made.save()
    assert not list(tmp_path.glob("checkpoints/*.pth"))


def test_a_gradient_that_is_no_number_is_left_out_and_named(pretend: PretendDevice, tmp_path: Path) -> None:
    made = make_trainer(small_config(), tmp_path)
    before = weights(made)
    bias = made.core.sem_seg_head.predictor.class_embed.bias
    hook = bias.register_hook(lambda gradient: gradient * math.nan)
    step(pretend, made, items())
    hook.remove()
    assert all(map(torch.equal, before, weights(made)))
    with pytest.raises(RunFailure, match=r"iteration 1: norm of the gradient = nan"):
        made.meter.line()


def validation_item(number: int, count: int) -> ValidationItem:
    """An image of the small batch with its ground truth for every task."""
    (inputs,) = items((count,))
    masks, labels = inputs["instances"].gt_masks.numpy(), inputs["instances"].gt_classes.tolist()
    ids = (masks * np.arange(1, count + 1)[:, None, None]).max(0)
    annotations = tuple(
        {"category_id": c, "iscrowd": 0, "area": int(mask.sum()), "segmentation": encode_mask(mask)}
        for mask, c in zip(masks, labels, strict=True)
    )
    segments = tuple(Segment(n + 1, c, False) for n, c in enumerate(labels) if (ids == n + 1).any())
    semantic = np.append(255, labels).astype(np.uint8)[ids]
    height, width = ids.shape
    truth = GroundTruth(number, height, width, annotations, ids, segments, semantic)
    return ValidationItem(inputs | {"image_id": number, "file_name": f"{number}.png"}, truth)


def evaluated(made: Trainer) -> dict[str, Any]:
    collected = Collector(made.config, {1})
    for image in image_outputs(made.core, [validation_item(1, 3), validation_item(2, 2)]):
        collected.add(image)
    return collected.summary()


def test_an_evaluation_mixes_no_devices_and_gives_the_cpus_numbers(tmp_path: Path) -> None:
    with pretending() as pretend:
        ours = make_trainer(small_config(**PILOTED), tmp_path)
        with pretend.phase("evaluation"):
            found = evaluated(ours)
        assert pretend.count("operator", "evaluation") > 100
    cpu = Trainer(ours.config, tmp_path, tmp_path, TrainCallbacks(), torch.device("cpu"), ours.rank)
    assert found == evaluated(cpu)


def test_the_device_sees_what_it_is_for(pretend: PretendDevice) -> None:
    with pretend.phase("here"):
        there = torch.ones(3, 4).to(device())
        assert pretend.count("upload") == 1
        assert (there @ there.T * 2).cpu().sum() == 72
        assert float(there.sum()) == 12
        assert there[there > 0].shape == (12,)
        there[:, 0] = 5.0
        assert pretend.count("synchronisation") == 3
        assert there[torch.tensor([0, 2])].shape == (2, 4)
        assert pretend.count("upload") == 2
        with pytest.raises(MixedDevices, match="two devices"):
            there + torch.ones(3, 4)
    assert there.cpu()[:, 0].tolist() == [5.0, 5.0, 5.0]
    assert pretend.peaks["here"] >= 4 * 12
