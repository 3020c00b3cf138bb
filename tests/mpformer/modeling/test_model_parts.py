"""Parts of the model: shapes, parameter counts, kernels, matching, losses, precision, determinism, inference."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from analysis.matching import MatchWeights
from mpformer.config.schema import Config, DatasetConfig, ModelConfig, ResNetConfig, SwinConfig
from mpformer.modeling import criterion, matcher
from mpformer.modeling import deformable_attention as deformable
from mpformer.modeling.backbones import build_backbone
from mpformer.modeling.decoder import Attention
from mpformer.modeling.inference import InferenceSettings, boxes_of, infer, panoptic
from mpformer.modeling.matcher import match, matching_costs
from mpformer.modeling.meta_arch import build_model
from mpformer.modeling.outputs import DecoderOutput, Targets
from mpformer.modeling.points import PointSettings, cell_centres, draw_points, most_uncertain, sample
from mpformer.modeling.position import sine_position
from mpformer.modeling.resnet import FoldedConv2d, narrow_group_norm
from mpformer.runtime.errors import UserError
from tests.support.present import present
from tests.support.small_models import batch, rng, small_config, small_model


def coco(**model: object) -> Config:
    return Config(dataset=DatasetConfig(name="coco", task="instance"), model=ModelConfig(**model))


def million_parameters(config: Config) -> float:
    with torch.device("meta"):
        model = build_model(config, 80, range(80))
    return sum(p.numel() for p in model.parameters()) / 1e6


def test_parameter_counts_are_mask2formers() -> None:
    assert million_parameters(coco()) == pytest.approx(44, abs=0.5)
    large = SwinConfig(embed_dim=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12, pretrain_size=384)
    assert million_parameters(coco(backbone=large, queries=200)) == pytest.approx(216, abs=1)


def test_registered_with_detectron2() -> None:
    assert META_ARCH_REGISTRY.get("MPFormer").__name__ == "MPFormer"


@pytest.mark.parametrize(
    ("strides", "names"),
    [
        ((32, 16, 8), {"adapter_1", "layer_1"}),
        ((16, 8, 4), set()),
        ((32, 16), {"adapter_1", "layer_1", "adapter_2", "layer_2"}),
    ],
)
def test_fpn_steps_only_below_the_finest_attention_stride(strides: tuple[int, ...], names: set[str]) -> None:
    model = small_model(model__attention_strides=strides, model__size_divisibility=32)
    decoder = model.sem_seg_head.pixel_decoder
    assert {n for n, _ in decoder.named_children() if n.startswith(("adapter", "layer_"))} == names
    pixels = model.pixel_features(torch.randn(1, 3, 64, 96))
    assert pixels.mask_features.shape == (1, 32, 16, 24)
    assert [maps.shape[-2:] for maps in pixels.levels] == [(64 // s, 96 // s) for s in strides]


def test_impossible_shapes_are_user_errors() -> None:
    with pytest.raises(UserError, match="size_divisibility"):
        small_model(model__size_divisibility=8)
    with pytest.raises(UserError, match="hidden_dim"):
        small_model(model__hidden_dim=36)


def test_attention_is_multihead_attention() -> None:
    ours, theirs = Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    blocked = torch.rand(2, 5, 7) > 0.6
    blocked[..., 0] = False
    expected, _ = theirs(query, memory + 1, memory, attn_mask=blocked.repeat_interleave(4, 0))
    inputs = zip((query, memory + 1, memory), ours.projections(1, 1, 1), strict=True)
    q, k, v = (F.linear(x, *projection) for x, projection in inputs)
    torch.testing.assert_close(ours(q, k, v, ~blocked), expected, atol=1e-5, rtol=1e-4)


def test_sine_position_is_detrs() -> None:
    position = sine_position((3, 5), 8, torch.device("cpu")).view(3, 5, 8)
    assert torch.allclose(position[..., :4], position[:, :1, :4].expand(-1, 5, -1)), "first half is y"
    angle = torch.tensor(2 / (3 + 1e-6) * 2 * torch.pi)
    expected = torch.stack([angle.sin(), angle.cos(), (angle / 100).sin(), (angle / 100).cos()])
    torch.testing.assert_close(position[1, 0, :4], expected)


def test_frozen_norms_fold_to_the_same_numbers() -> None:
    """Once, when weights are loaded: a step multiplies the weight and convolves, nothing else."""
    backbone = build_backbone(ResNetConfig(stem_channels=8, res2_channels=16, width_per_group=4), 32)
    conv = next(m for m in backbone.modules() if isinstance(m, FoldedConv2d) and isinstance(m.norm, FrozenBatchNorm2d))
    state = copy.deepcopy(backbone.state_dict())
    assert not any(name.endswith(("factor", "shift")) for name in state), "released files have no such tensors"
    for name, value in state.items():
        if ".norm." in name:
            value.uniform_(0.5, 2)
    backbone.load_state_dict(state)
    maps = torch.randn(2, conv.in_channels, 16, 16)
    plain = conv.norm(F.conv2d(maps, conv.weight, None, conv.stride, conv.padding))
    with counted() as names:
        folded = conv(maps)
    torch.testing.assert_close(folded, plain, atol=1e-5, rtol=1e-4)
    assert names == ["aten.mul.Tensor", "aten.convolution.default"]
    torch.testing.assert_close(copy.deepcopy(backbone).double().stem.conv1.factor, backbone.stem.conv1.factor.double())


@contextmanager
def counted() -> Iterator[list[str]]:
    """The operators of the body, in order."""
    names: list[str] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **kwargs or {})

    with Counting():
        yield names


@pytest.mark.parametrize(("channels", "groups"), [(16, 4), (32, 8), (48, 4), (64, 32), (256, 32)])
def test_narrow_layers_get_groups_of_at_least_four_channels(channels: int, groups: int) -> None:
    assert narrow_group_norm(channels).num_groups == groups


def test_points_are_sampled_bilinearly() -> None:
    maps = torch.arange(12.0).view(1, 1, 3, 4)
    at_cells = sample(maps, cell_centres((3, 4), torch.device("cpu"))[None])[0, 0]
    torch.testing.assert_close(at_cells, torch.arange(12.0), atol=1e-5, rtol=1e-5)
    assert sample(maps, torch.tensor([[[0.25, 0.5]]])).item() == pytest.approx(4.5)
    chosen = most_uncertain(torch.tensor([[-9.0, 0.1, 3.0, -0.2]]), 2)
    assert sorted(chosen[0].tolist()) == [1, 3]


def test_no_matching_points_are_drawn_when_all_cells_are_fewer() -> None:
    settings = PointSettings(points=100)
    assert draw_points(settings, 2, (10, 10), rng(), torch.device("cpu")).matching is None
    drawn = draw_points(settings, 2, (10, 11), rng(), torch.device("cpu"))
    assert drawn.matching is not None
    assert drawn.matching.shape == (1, 2, 100, 2)
    assert drawn.candidates.shape == (2, 300, 2)
    assert drawn.uniform.shape == (2, 25, 2)


def random_output(layers: int = 2, images: int = 2, queries: int = 6, classes: int = 4) -> DecoderOutput:
    return DecoderOutput(
        logits=torch.randn(layers + 1, images, queries, classes + 1),
        mask_embed=torch.randn(layers + 1, images, queries, 8),
        mask_features=torch.randn(images, 8, 8, 8),
        pilot_logits=None,
        pilot_mask_embed=None,
        empty_attention=torch.zeros(layers, images, queries, dtype=torch.bool),
    )


def random_targets(counts: tuple[int, ...] = (3, 9), classes: int = 4) -> Targets:
    labels = torch.randint(0, classes, (sum(counts),))
    return Targets(labels, torch.rand(sum(counts), 32, 32) > 0.7, counts)


@pytest.mark.parametrize("layers_of_points", [0, 1, 3])
def test_costs_are_those_of_the_formulas(layers_of_points: int) -> None:
    output, targets, weights = random_output(), random_targets(), MatchWeights(2, 5, 3)
    points = torch.rand(layers_of_points, 2, 50, 2) if layers_of_points else None
    got = matching_costs(output, targets, points, weights)[..., 3:]
    for layer in range(3):
        where = cell_centres((8, 8), torch.device("cpu")) if points is None else points[layer % layers_of_points, 1]
        logits = sample(output.masks(layer)[1:2], where[None])[0]
        truth = sample(targets.masks[1][None].float(), where[None])[0]
        for query in range(6):
            bce = F.binary_cross_entropy_with_logits(logits[query].expand_as(truth), truth, reduction="none").mean(1)
            p = logits[query].sigmoid()
            dice = 1 - (2 * (p * truth).sum(1) + 1) / (p.sum() + truth.sum(1) + 1)
            classes = -output.logits[layer, 1, query].softmax(-1)[targets.labels[1]]
            torch.testing.assert_close(got[layer, query], 2 * classes + 5 * bce + 3 * dice, atol=1e-4, rtol=1e-4)


def test_more_objects_than_queries_leaves_the_surplus_unmatched() -> None:
    matching = match(random_output(), random_targets((3, 9)), None, MatchWeights())
    assert [q.shape for q in matching.queries] == [(3, 3), (3, 6)]
    for layer in range(3):
        queries, objects = matching.pairs(layer, 1)
        assert sorted(queries.tolist()) == list(range(6))
        assert objects.tolist() == sorted(set(objects.tolist()))
    model = small_model(model__queries=4)
    losses = model(batch((6, 2)), noise=rng(), points=rng())
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("class_mean", ["global", "per-rank"])
def test_a_batch_in_which_nothing_weighs_anything_has_finite_losses(class_mean: Literal["global", "per-rank"]) -> None:
    """Issue 12, 5.14: no object, and no weight of "no object" either."""
    model = small_model(model__no_object_weight=0.0, schedule__class_mean=class_mean)
    losses = model(batch((0, 0)), noise=rng(), points=rng())
    assert {loss.item() for loss in losses.values()} == {0.0}
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(loss.item() > 0 for loss in model(batch((2, 0)), noise=rng(), points=rng()).values())


def test_a_non_finite_prediction_reaches_the_loss() -> None:
    model = small_model()
    nn.init.constant_(model.sem_seg_head.predictor.class_embed.bias, float("nan"))
    losses = model(batch(), noise=rng(), points=rng())
    assert not losses["loss_ce"].isfinite()


def test_losses_of_layers_sum_to_what_each_layer_gives_alone() -> None:
    model = small_model(toggles__mp_queries=True)
    items = batch((3, 0, 2))
    losses = model(items, noise=rng(), points=rng())
    kinds = {name.rstrip("_0123456789") for name in losses}
    assert kinds == {f"loss_{kind}{part}" for kind in ("ce", "mask", "dice") for part in ("", "_pilot")}
    assert len(losses) == 6 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_costs_and_losses_in_float32(dtype: torch.dtype) -> None:
    model = small_model(toggles__mp_queries=True, toggles__point_noise=0.2)
    exact = model(batch(), noise=rng(), points=rng())
    with torch.autocast("cpu", dtype=dtype):
        losses = model(batch(), noise=rng(), points=rng())
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(present(p.grad).isfinite().all() for p in model.parameters())
    total, wanted = (sum(float(v.detach()) for v in each.values()) for each in (losses, exact))
    assert total == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_samples_and_costs_are_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where half precision would be half a cell, a wrong match or an overflow: samples, costs, losses."""
    seen: dict[str, set[torch.dtype]] = {"samples": set(), "costs": set(), "losses": set()}

    def watched(kind: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            result = function(*args)
            inputs = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
            outputs = result if isinstance(result, tuple) else (result,)
            seen[kind].update(inputs, (o.dtype for o in outputs))
            return result

        return call

    model = small_model(toggles__mp_queries=True)
    kernel = watched("samples", deformable.kernel_of("cpu"))
    monkeypatch.setattr(deformable, "kernel_of", lambda device: kernel)
    monkeypatch.setattr(matcher, "_mask_costs", watched("costs", matcher._mask_costs))
    monkeypatch.setattr(criterion, "point_losses", watched("losses", criterion.point_losses))
    with torch.autocast("cpu", dtype=dtype):
        model(batch(), noise=rng(), points=rng())
    assert seen == {kind: {torch.float32} for kind in seen}


def test_training_step_is_bit_exact() -> None:
    gradients = []
    for _ in range(2):
        model = small_model(toggles__mp_queries=True, toggles__point_noise=0.2, toggles__flip_noise=0.2)
        sum(model(batch(), noise=rng(), points=rng()).values()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_building_leaves_the_default_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = small_model(), small_model(), small_model(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.backbone.stem.conv1.weight, b.backbone.stem.conv1.weight)
    assert not torch.equal(a.backbone.stem.conv1.weight, c.backbone.stem.conv1.weight)


def test_position_and_piloting_tables_do_not_shift_each_other() -> None:
    both = small_model(toggles__mp_queries=True)
    without = small_model(toggles__mp_queries=True, toggles__query_position=False)
    name = "sem_seg_head.predictor.label_enc.weight"
    assert torch.equal(dict(both.named_parameters())[name], dict(without.named_parameters())[name])


def test_layer_outputs_and_results_of_any_layer() -> None:
    model = small_model(evaluation__panoptic=True, evaluation__semantic=True).eval()
    items = [{"image": item["image"], "height": 100, "width": 90} for item in batch()]
    output, sizes = model.layer_outputs(items)
    assert output.logits.shape == (4, 2, 8, 13)
    assert output.empty_attention.shape == (3, 2, 8)
    assert sizes == [(64, 64), (64, 64)]
    first, last = model.results(output, sizes, items, layer=0), model(items)
    assert last[0]["sem_seg"].shape == (12, 100, 90)
    assert last[0]["panoptic_seg"][0].shape == first[0]["panoptic_seg"][0].shape == (100, 90)
    assert last[0]["instances"].image_size == (100, 90)
    again = model.results(output, sizes, items)
    assert torch.equal(again[1]["instances"].scores, last[1]["instances"].scores)


def test_instance_rows_never_exceed_the_pairs_there_are() -> None:
    settings = InferenceSettings(frozenset({0, 1}), detections=100)
    found = infer(settings, torch.randn(3, 3), torch.randn(3, 4, 4), (16, 16), (16, 12), (8, 6))["instances"]
    assert len(found) == 6
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert found.pred_masks.shape == (6, 8, 6)


def test_panoptic_rules() -> None:
    settings = InferenceSettings(frozenset({0}), panoptic=True, object_mask_threshold=0.5, overlap_threshold=0.8)
    masks = torch.full((5, 4, 4), -9.0)
    masks[0, :, :2] = 9  # a thing
    masks[1, 0, :2] = 4  # a thing that mostly loses to the first
    masks[2, :2, 2:] = 9  # stuff, twice
    masks[3, 2:, 2:] = 9
    masks[4, 2:, 2:] = 20  # "no object"
    logits = torch.full((5, 3), -5.0)
    for query, category in enumerate([0, 0, 1, 1, 2]):
        logits[query, category] = 5.0
    ids, segments = panoptic(settings, logits, masks)
    assert [(s["category_id"], s["isthing"]) for s in segments] == [(0, True), (1, False)]
    assert ids[:, :2].eq(1).all()
    assert ids[:, 2:].eq(2).all()


def test_boxes_are_tight_and_zero_for_empty_masks() -> None:
    masks = torch.zeros(2, 5, 6, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    assert boxes_of(masks).tolist() == [[2, 1, 6, 3], [0, 0, 0, 0]]
    assert boxes_of(masks[:0]).shape == (0, 4)


@pytest.mark.parametrize("piloted", [False, True])
def test_decoder_layer_compiles_without_a_graph_break(piloted: bool) -> None:
    model = small_model(toggles__mp_queries=True, toggles__class_embedding_layers="every")
    decoder, items = model.sem_seg_head.predictor, batch((2,))
    images = model.preprocess(items)
    pixels = model.pixel_features(images.tensor)
    pilot = model.pilot(model.targets(items, images), pixels, rng()) if piloted else None
    slots = 0 if pilot is None else pilot.slots
    level = decoder._level(1, pixels.levels[1], pixels.mask_features)
    queries, position = decoder._first_queries(1, pilot), decoder._position(1, slots)
    allowed = torch.ones(1, slots + 8, level.size[0] * level.size[1]) > 0
    readable = None if pilot is None else ~pilot.self_attention
    arguments = (1, queries, position, level, allowed, readable)
    explained = torch._dynamo.explain(decoder._layer)(*arguments)
    assert explained.graph_break_count == 0
    # "eager": the graph as it was traced, without a compiler on the machine.
    compiled = torch.compile(decoder._layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), decoder._layer(*arguments))


def test_compiled_model_gives_the_same_losses_and_breaks_only_around_targets() -> None:
    """``runtime.compile``: images, targets, piloted part and criterion run as they are, all between them is traced."""
    model = small_model(toggles__mp_queries=True, toggles__point_noise=0.2)
    expected = model(batch(), noise=rng(), points=rng())
    losses = torch.compile(model, backend="eager")(batch(), noise=rng(), points=rng())
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(batch(), noise=rng(), points=rng())
    assert explained.graph_break_count > 0
    assert all("torch.compiler.disable" in str(reason.reason) for reason in explained.break_reasons)


def test_backbone_and_pixel_decoder_compile_without_a_break() -> None:
    """The forms that are fast by themselves on CPU (sparse products, tiles) leave the graph to the compiler."""
    model = small_model(model__conv_dim=128, model__hidden_dim=128, model__attention_strides=(16, 8))
    images = torch.randn(1, 3, 64, 64)
    plain = model.pixel_features(images)
    compiled = torch.compile(model.pixel_features, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(compiled.mask_features, plain.mask_features, rtol=1e-4, atol=1e-4)
    for one, other in zip(compiled.levels, plain.levels, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_config_of_the_small_model_is_what_it_says() -> None:
    assert small_config(toggles__mp_groups=2).toggles.mp_groups == 2
