"""Mask piloting of transformers' Mask2Former: equal to the product's, and gone without a trace once it is removed."""

import copy
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

pytest.importorskip("transformers")

from mpformer.config.schema import ResNetConfig, Toggles
from mpformer.modeling.meta_arch import MPFormer, build_model
from mpformer.modeling.outputs import padded_targets
from mpformer.modeling.points import FixedPoints
from mpformer.piloting import TOGGLES, MaskPiloting
from mpformer.runtime import distributed
from mpformer.runtime.errors import UserError
from tests.support.huggingface_models import mask2former
from tests.support.paired_models import CLASSES, tiny_config
from tests.support.present import present
from tests.support.transformers_peer import build_peer, load_ours, renamed

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "piloting_library.md"
COUNTS, SIZE = (2, 3), (64, 96)
NARROW = ResNetConfig(depth=50, stem_channels=8, res2_channels=16, width_per_group=4)
HEADS, POINTS = 5, 64


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_batch(counts: tuple[int, ...] = COUNTS, seed: int = 0) -> dict[str, Any]:
    """Images with rectangles, as transformers' image processor gives them."""
    generator = rng(seed)
    masks = torch.zeros(sum(counts), *SIZE)
    for mask in masks:
        top, left = (
            int(torch.randint(0, 30, (), generator=generator)),
            int(torch.randint(0, 60, (), generator=generator)),
        )
        mask[top : top + 30, left : left + 30] = 1
    labels = torch.randint(0, CLASSES, (sum(counts),), generator=generator)
    return {
        "pixel_values": torch.randn(len(counts), 3, *SIZE, generator=generator),
        "mask_labels": list(masks.split(counts)),
        "class_labels": list(labels.split(counts)),
    }


def small_model(**config: Any) -> Any:
    return mask2former(num_labels=CLASSES, **config)


@dataclass(frozen=True)
class Pair:
    """The product's model and transformers' with piloting, at equal weights."""

    ours: MPFormer
    pilot: MaskPiloting


def pair(**toggles: Any) -> Pair:
    config = tiny_config(Toggles(mp_queries=True, **toggles), backbone=NARROW)
    ours = build_model(config, CLASSES, range(CLASSES)).train()
    generator = rng(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        peer = build_peer(config.model, CLASSES)
        load_ours(peer, ours.state_dict())
        pilot = MaskPiloting.for_huggingface(peer, **toggles).train()
        peer.model.pixel_level_module.encoder.eval()  # its batch normalisation is frozen in ours
        pilot.label_enc.weight.copy_(present(ours.sem_seg_head.predictor.label_enc).weight)
    return Pair(ours, pilot)


def fixed_points(groups: int = 1) -> FixedPoints:
    def draw(*shape: int) -> Tensor:
        return torch.rand(HEADS, *shape, POINTS, 2, generator=generator)

    generator = rng(7)
    return FixedPoints(draw(len(COUNTS)), draw(sum(COUNTS)), draw(groups * sum(COUNTS)))


def give_points(model: Any, points: FixedPoints, patch: pytest.MonkeyPatch) -> None:
    """Have transformers' criterion use given points: it takes the last head first, then the others in order."""
    order = [HEADS - 1, *range(HEADS - 1)]
    for_loss = iter([points.loss[head] for head in order])
    for_matching = iter([image[None] for head in order for image in points.matching[head]])
    patch.setattr(model.criterion, "sample_points_using_uncertainty", lambda *_: next(for_loss))
    forward = model.criterion.matcher.forward

    def match(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(torch, "rand", lambda *shape, **_: next(for_matching))
            return forward(*args)

    patch.setattr(model.criterion.matcher, "forward", match)


def our_losses(ours: MPFormer, batch: dict[str, Any], noise: int, points: FixedPoints) -> dict[str, Tensor]:
    targets = padded_targets(batch["class_labels"], batch["mask_labels"], SIZE)
    pixels = ours.pixel_features(batch["pixel_values"])
    pilot = ours.pilot(targets, pixels, rng(noise))
    output = ours.sem_seg_head.predictor(pixels, pilot)
    return ours.criterion.weighted(ours.criterion.by_layer(output, targets, pilot, points))


EQUAL: list[dict[str, Any]] = [
    {"point_noise": 0.2, "flip_noise": 0.2, "guided_layers": "every"},
    {"point_noise": 0.2, "flip_noise": 0.2, "guided_layers": "first-2", "mp_groups": 2, "mask_noise": "shift-scale"},
    {"point_noise": 0.1, "flip_noise": 0.5, "class_embedding_layers": "every", "pilot_padding": "reference"},
    {"point_noise": 0.3, "flip_noise": 0.0, "class_embedding": "learnt", "layer0_supervision": False},
]


@pytest.mark.parametrize("toggles", EQUAL, ids=lambda toggles: "-".join(map(str, toggles.values())))
def test_losses_and_gradients_are_the_products(toggles: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    both, batch = pair(**toggles), small_batch()
    points = fixed_points(toggles.get("mp_groups", 1))
    wanted = our_losses(both.ours, batch, 3, points)
    torch.cat(list(wanted.values())).sum().backward()
    give_points(both.pilot.model, points, monkeypatch)
    found = both.pilot(batch, noise=rng(3), points=points)
    found.loss.backward()

    piloted = sum(loss.sum() for name, loss in wanted.items() if "pilot" in name)
    torch.testing.assert_close(found.pilot_loss, piloted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss, sum(loss.sum() for loss in wanted.values()), rtol=1e-4, atol=1e-4)
    theirs = renamed({name: present(p.grad) for name, p in both.pilot.model.named_parameters() if p.grad is not None})
    theirs["sem_seg_head.predictor.label_enc.weight"] = present(both.pilot.label_enc.weight.grad)
    ours = {name: p.grad for name, p in both.ours.named_parameters() if p.grad is not None}
    frozen = {name for name in theirs if name.startswith("backbone.") and ".norm." in name}  # no parameters of ours
    assert theirs.keys() - frozen == ours.keys()
    for name, gradient in ours.items():
        atol = 1e-3 * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(theirs[name].view_as(gradient), gradient, rtol=1e-3, atol=atol, msg=name)


def test_matching_part_is_as_without_piloting() -> None:
    """Learnable queries read no slot, and the model draws the random points that it draws without piloting."""
    model, batch = small_model().train(), small_batch()
    torch.manual_seed(5)
    plain = model(**batch)
    after = torch.get_rng_state()
    pilot = MaskPiloting.for_huggingface(model).train()
    torch.manual_seed(5)
    piloted = pilot(batch)
    assert torch.equal(torch.get_rng_state(), after)
    assert piloted.pilot_loss.item() > 1
    parts, structure = tree_flatten(piloted)  # as distributed training does
    assert tree_unflatten(parts, structure).pilot_loss is piloted.pilot_loss
    torch.testing.assert_close(piloted.loss - piloted.pilot_loss, plain.loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(piloted.masks_queries_logits, plain.masks_queries_logits, rtol=1e-4, atol=1e-4)
    for name in ("class_queries_logits", "transformer_decoder_last_hidden_state"):
        torch.testing.assert_close(piloted[name], plain[name], rtol=1e-4, atol=1e-4)


def test_noise_follows_the_default_generator() -> None:
    pilot, batch = MaskPiloting.for_huggingface(small_model()).train(), small_batch()
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(pilot(batch).pilot_loss.item())
    assert losses[0] == losses[2] != losses[1]


def test_a_plain_loop_trains_and_remove_gives_back_the_very_model() -> None:
    model, batch = small_model(), small_batch()
    weights = copy.deepcopy(model.state_dict())
    before = model(**batch)
    hooks = hook_counts(model)
    pilot = MaskPiloting.for_huggingface(model).train()
    optimizer = torch.optim.AdamW(pilot.parameters(), lr=1e-3)
    first = pilot(batch)
    first.loss.backward()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    label_enc = pilot.label_enc.weight.detach().clone()
    losses = []
    for step in range(8):
        torch.manual_seed(step)
        optimizer.zero_grad()
        outputs = pilot(batch)
        outputs.loss.backward()
        optimizer.step()
        losses.append(outputs.loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(label_enc, pilot.label_enc.weight)

    model.load_state_dict(weights)
    assert pilot.remove() is model
    assert hook_counts(model) == hooks
    assert model.state_dict().keys() == weights.keys()
    after = model.eval()(**{"pixel_values": batch["pixel_values"]})
    assert torch.equal(after.masks_queries_logits, before.masks_queries_logits)
    assert torch.equal(after.class_queries_logits, before.class_queries_logits)
    with pytest.raises(UserError, match="removed from this model; MaskPiloting"):
        pilot(batch)
    MaskPiloting.for_huggingface(model).remove()


def test_the_documented_loop_runs() -> None:
    code = re.search(r"## A loop of your own.*?```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict[str, Any] = {"model": small_model(), "batches": [small_batch(seed=seed) for seed in range(2)]}
    given = names["model"]
    exec(present(code)[1], names)
    assert names["model"] is given
    assert torch.isfinite(names["loss"])


def hook_counts(model: torch.nn.Module) -> list[int]:
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def test_inference_is_untouched_while_piloted() -> None:
    model, batch = small_model(), small_batch()
    with torch.no_grad():
        before = model(batch["pixel_values"], output_auxiliary_logits=True)
        pilot = MaskPiloting.for_huggingface(model).eval()
        for after in (model(batch["pixel_values"]), pilot(pixel_values=batch["pixel_values"]), pilot(batch)):
            assert torch.equal(after.masks_queries_logits, before.masks_queries_logits)
            assert torch.equal(after.class_queries_logits, before.class_queries_logits)


def test_an_error_inside_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    pilot, batch = MaskPiloting.for_huggingface(small_model()).train(), small_batch()
    hooks = hook_counts(pilot)
    with monkeypatch.context() as broken:
        broken.setattr(pilot.model.criterion, "forward", lambda *_, **__: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            pilot(batch)
    assert hook_counts(pilot) == hooks
    assert pilot(batch).pilot_loss > 0


def test_outputs_that_are_asked_for_are_those_of_the_matching_part() -> None:
    model, batch = small_model().train(), small_batch()
    wanted = {"output_hidden_states": True, "output_attentions": True, "output_auxiliary_logits": True}
    plain, piloted = model(**batch, **wanted), MaskPiloting.for_huggingface(model).train()(batch, **wanted)
    for name in ("transformer_decoder_hidden_states", "attentions"):
        assert len(plain[name]) == len(piloted[name])
        torch.testing.assert_close(tuple(piloted[name]), tuple(plain[name]), rtol=1e-4, atol=1e-4)
    for one, other in zip(piloted.auxiliary_logits, plain.auxiliary_logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_batch_without_objects_keeps_every_parameter_in_the_graph() -> None:
    pilot = MaskPiloting.for_huggingface(small_model()).train()
    outputs = pilot(small_batch((0, 0)))
    assert outputs.pilot_loss == 0
    outputs.loss.backward()
    assert float(present(pilot.label_enc.weight.grad).abs().sum()) == 0
    mixed = pilot(small_batch((0, 2)))
    assert torch.isfinite(mixed.loss)
    assert mixed.pilot_loss > 0


def test_processes_with_and_without_objects_take_part_in_one_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    pilot, sizes = MaskPiloting.for_huggingface(small_model()).train(), []

    def mean(values: Tensor) -> Tensor:
        sizes.append(values.shape)
        return values

    monkeypatch.setattr(distributed, "mean", mean)
    for counts in ((2, 3), (0, 0)):
        pilot(small_batch(counts))
    assert len(sizes) == 2
    assert sizes[0] == sizes[1]


def photographs(count: int) -> list[dict[str, Tensor]]:
    batch = small_batch((2,) * count)
    return [{name: values[i] for name, values in batch.items()} for i in range(count)]


def collate(items: list[dict[str, Tensor]]) -> dict[str, Any]:
    named = {name: [item[name] for item in items] for name in items[0]}
    return named | {"pixel_values": torch.stack(named["pixel_values"])}


def test_in_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    # the default data root, ./datasets, would be taken for Hugging Face's package of that name
    monkeypatch.setattr("transformers.trainer.is_datasets_available", lambda: False)
    from transformers import Trainer, TrainingArguments

    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2,
        "save_steps": 1, "logging_steps": 1, "report_to": [], "use_cpu": True, "learning_rate": 1e-3, "seed": 3,
        "disable_tqdm": True,
    }  # fmt: skip

    def trainer() -> Any:
        pilot = MaskPiloting.for_huggingface(small_model())
        data = photographs(8)
        return Trainer(pilot, TrainingArguments(**arguments), collate, train_dataset=data, eval_dataset=data[:2])

    whole = trainer()
    before = copy.deepcopy(whole.model.state_dict())
    whole.train()
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert len(losses) == 2
    changed = {name for name, value in whole.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"label_enc.weight", "model.class_predictor.weight"} <= changed

    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name

    predicted = whole.predict(photographs(2))
    model = whole.model.remove()
    with torch.no_grad():
        alone = model.eval()(torch.stack([item["pixel_values"] for item in photographs(2)]))
    assert any((part == alone.masks_queries_logits.numpy()).all() for part in predicted.predictions if part.ndim == 4)
    model.save_pretrained(tmp_path / "model")


def test_autocast() -> None:
    pilot, batch = MaskPiloting.for_huggingface(small_model()).train(), small_batch()
    torch.manual_seed(0)
    exact = pilot(batch).pilot_loss
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = pilot(batch)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.pilot_loss, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mp_group": 2}, f"unknown toggle 'mp_group'; valid: {', '.join(TOGGLES)}"),
        ({"query_position": False}, "unknown toggle 'query_position'; valid: guided_layers"),
        ({"guided_layers": "all"}, "invalid value for guided_layers: unknown value 'all'; valid: first, first-k"),
        ({"flip_noise": 2}, "invalid value for flip_noise: Input should be less than or equal to 1 .got 2"),
    ],
)
def test_wrong_arguments_are_refused_in_a_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        MaskPiloting.for_huggingface(small_model(), **arguments)
    assert "\n" not in str(refused.value)


def test_wrong_models_are_refused_in_a_line() -> None:
    model = small_model()
    with pytest.raises(UserError, match=r"takes a Mask2FormerForUniversalSegmentation .* not a Mask2FormerModel"):
        MaskPiloting.for_huggingface(model.model)
    with pytest.raises(UserError, match="without a wrapper, not a MaskPiloting"):
        MaskPiloting.for_huggingface(MaskPiloting.for_huggingface(model))


def test_wrong_batches_are_refused_in_a_line() -> None:
    pilot, batch = MaskPiloting.for_huggingface(small_model()).train(), small_batch()
    with pytest.raises(UserError, match="training needs mask_labels and class_labels"):
        pilot(pixel_values=batch["pixel_values"])
    for other in (batch["class_labels"][::-1], batch["class_labels"][:1]):
        with pytest.raises(UserError, match="an entry for each image, with as many objects in both"):
            pilot({**batch, "class_labels": other})
    with pytest.raises(UserError, match=r"class_labels must be in 0 \.\.\. 4"):
        pilot({**batch, "class_labels": [labels + 5 for labels in batch["class_labels"]]})


def test_without_transformers_one_line_names_it() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch\n"
        "from mpformer.piloting import MaskPiloting\n"
        "from mpformer.runtime.errors import UserError\n"
        "try: MaskPiloting.for_huggingface(torch.nn.Linear(1, 1))\n"
        "except UserError as error: print(error)\n"
        "print('detectron2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "mask piloting of a Hugging Face model needs transformers: pip install 'mpformer[huggingface]'",
        "False",
    ], done.stderr
