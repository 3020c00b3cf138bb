"""Released files load with nothing missing and nothing left over; untrusted ones run no code."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpformer.config.schema import ResNetConfig
from mpformer.modeling.weights import ClassNames, detect_toggles, load_weights, read_weights
from mpformer.runtime.disk import sha256
from mpformer.runtime.errors import UserError

GOLDEN = [Path(__file__).parents[2] / "golden", Path(__file__).parents[4] / "shared" / "golden"]
PREDICTOR = "sem_seg_head.predictor."


def golden(name: str) -> Any:
    for folder in GOLDEN:
        if (folder / name).exists():
            return np.load(folder / name)
    pytest.skip(f"{name} is in neither tests/golden nor ../shared/golden")


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """State dict of a tiny MP-Former: no query position, with a label embedding."""
    with golden("weights_tiny.npz") as file:
        return {name: file[name] for name in file.files}


class Skeleton(nn.Module):
    """A module with given parameter names and shapes, so that names are tested without building the network."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *parents, last = name.split(".")
            node: nn.Module = self
            for part in parents:
                if part not in node._modules:
                    node.add_module(part, nn.Module())
                node = node._modules[part]  # type: ignore[assignment]
            node.register_parameter(last, nn.Parameter(torch.full(shape, -7.0)))


def test_live_normalisation_takes_a_file_of_a_frozen_one(tmp_path: Path) -> None:
    """Cityscapes' models: their batch counters are in no ImageNet file and in no model with frozen normalisation."""
    from mpformer.modeling.backbones import build_backbone

    class Whole(nn.Module):
        def __init__(self, norm: str) -> None:
            super().__init__()
            small = ResNetConfig(depth=50, stem_channels=8, res2_channels=16, width_per_group=4, norm=norm)
            self.backbone = build_backbone(small, 32)

    frozen, live = Whole("FrozenBN"), Whole("SyncBN")
    state = frozen.backbone.state_dict()
    found = load_weights(live, saved(tmp_path / "r50.pth", {"model": state}), allow_backbone=True)
    assert all(name.endswith("num_batches_tracked") for name in found["kept"])
    assert len(found["kept"]) == 53  # convolutions of ResNet-50
    images = torch.rand(2, 3, 64, 64)
    before, after = (model.eval().backbone(images)["res5"] for model in (frozen, live))
    assert torch.allclose(before, after, atol=1e-4 * float(before.abs().max()))


def skeleton(arrays: dict[str, Any]) -> Skeleton:
    return Skeleton({name: tuple(value.shape) for name, value in arrays.items()})


def pickled(path: Path, content: Any, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


def assert_loaded(model: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    for name, value in model.state_dict().items():
        if name != "criterion.empty_weight":  # computed from the configuration
            assert np.array_equal(value.numpy(), arrays[name]), name


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_released_pickle(tmp_path: Path, arrays: dict[str, np.ndarray], protocol: int) -> None:
    path = pickled(tmp_path / "model_final.pkl", {"model": arrays, "__author__": "release"}, protocol)
    model = skeleton(arrays)
    found = load_weights(model, path)
    assert_loaded(model, arrays)
    assert found["kept"] == []


def test_released_checkpoint_with_optimizer_and_wrapper_prefix(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    state = {f"module.{name}": value for name, value in tensors(arrays).items()}
    content = {"model": state, "optimizer": {"state": {}}, "iteration": 368749}
    model = skeleton(arrays)
    load_weights(model, saved(tmp_path / "model_final.pth", content))
    assert_loaded(model, arrays)


def test_bare_state_dict_without_version_metadata_is_not_doubled(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = saved(tmp_path / "bare.pth", dict(tensors(arrays)))
    assert read_weights(path).keys() == arrays.keys()


def test_early_names_are_brought_up_to_date(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    old = {
        name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat.", "static_query."): value
        for name, value in tensors(arrays).items()
    }
    assert old.keys() != arrays.keys()
    assert read_weights(saved(tmp_path / "early.pth", {"model": old})).keys() == arrays.keys()


def test_toggles_are_told_from_the_file(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    mp = saved(tmp_path / "mp.pth", tensors(arrays))
    assert detect_toggles(mp) == {"toggles.query_position": False, "toggles.mp_queries": True}
    plain = tensors(arrays)
    del plain[f"{PREDICTOR}label_enc.weight"]
    plain[f"{PREDICTOR}query_embed.weight"] = torch.zeros(12, 32)
    m2f = saved(tmp_path / "m2f.pth", plain)
    assert detect_toggles(m2f) == {"toggles.query_position": True, "toggles.mp_queries": False}


@pytest.mark.parametrize(("drop_from", "hint"), [("file", "missing"), ("model", "unexpected")])
def test_missing_or_unexpected_names_are_an_error(
    tmp_path: Path, arrays: dict[str, np.ndarray], drop_from: str, hint: str
) -> None:
    fewer = {name: value for name, value in arrays.items() if "label_enc" not in name}
    in_file, in_model = (fewer, arrays) if drop_from == "file" else (arrays, fewer)
    path = saved(tmp_path / "w.pth", tensors(in_file))
    with pytest.raises(UserError, match=rf"1 {hint} \(.*label_enc.weight\); check toggles.mp_queries"):
        load_weights(skeleton(in_model), path)


def test_wrong_shape_is_an_error(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    other = tensors(arrays) | {f"{PREDICTOR}query_feat.weight": torch.zeros(13, 32)}
    with pytest.raises(UserError, match=r"query_feat.weight \(13, 32\) instead of \(12, 32\)"):
        load_weights(skeleton(arrays), saved(tmp_path / "w.pth", other))


def of_other_classes(arrays: dict[str, np.ndarray], count: int) -> dict[str, Tensor]:
    """The model's weights with a class head of another class list: row i is all i."""
    rows = torch.arange(count + 1.0)
    return tensors(arrays) | {
        f"{PREDICTOR}class_embed.weight": rows[:, None].repeat(1, 32),
        f"{PREDICTOR}class_embed.bias": rows,
        f"{PREDICTOR}label_enc.weight": rows[:count, None].repeat(1, 32),
        "criterion.empty_weight": torch.ones(count + 1),
    }


OURS = ("tree", "traffic light", "dog", "window", "cat")


def test_another_class_count_is_refused_without_the_option(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = saved(tmp_path / "w.pth", of_other_classes(arrays, 80))
    with pytest.raises(UserError, match=r"80 classes, the model 5.*`train` and `launch` have --reinit-class-head"):
        load_weights(skeleton(arrays), path)
    with pytest.raises(UserError, match=r"has 80 classes, model\.init_classes lists 3: set it to the DATASET/TASK"):
        load_weights(skeleton(arrays), path, new_classes=ClassNames(("a", "b", "c"), OURS))


def test_class_rows_are_taken_by_name_and_listed(
    tmp_path: Path, arrays: dict[str, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    """The row of "no object", the last, is taken too; what begins anew keeps what the model was initialised with."""
    caplog.set_level("INFO")
    path, model = saved(tmp_path / "w.pth", of_other_classes(arrays, 4)), skeleton(arrays)
    found = load_weights(model, path, new_classes=ClassNames(("car", "Dog", "traffic-light", "tree"), OURS))
    assert found["kept"] == []
    rows = [3.0, 2.0, 1.0, -7.0, -7.0, 4.0]
    assert model.get_parameter(f"{PREDICTOR}class_embed.bias").tolist() == rows
    assert model.get_parameter(f"{PREDICTOR}class_embed.weight").mean(1).tolist() == rows
    assert model.get_parameter(f"{PREDICTOR}label_enc.weight").mean(1).tolist() == rows[:-1]
    assert "class head: 3 classes taken by name from w.pth: tree, traffic light, dog" in caplog.text
    assert "class head: 2 classes begin anew: window, cat" in caplog.text
    name = f"{PREDICTOR}query_feat.weight"
    assert np.array_equal(model.get_parameter(name).detach(), arrays[name])


def test_an_unknown_class_list_gives_no_row(
    tmp_path: Path, arrays: dict[str, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    path, model = saved(tmp_path / "w.pth", of_other_classes(arrays, 7)), skeleton(arrays)
    load_weights(model, path, new_classes=ClassNames((), OURS))
    assert model.get_parameter(f"{PREDICTOR}class_embed.bias").tolist() == [-7.0] * 5 + [7.0]
    assert "its class list is not known (model.init_classes)" in caplog.text


def test_mask2formers_weights_start_a_model_with_a_piloted_part(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    """And the other way round: the label embedding of either is a part of the class head."""
    label = f"{PREDICTOR}label_enc.weight"
    plain = {name: value for name, value in of_other_classes(arrays, 5).items() if name != label}
    model = skeleton(arrays)
    with pytest.raises(UserError, match=r"1 missing .*toggles\.mp_queries"):
        load_weights(model, saved(tmp_path / "plain.pth", plain))
    found = load_weights(model, tmp_path / "plain.pth", new_classes=ClassNames(OURS, OURS))
    assert found["kept"] == [label]
    assert model.get_parameter(f"{PREDICTOR}class_embed.bias").tolist() == [0, 1, 2, 3, 4, 5]
    other = skeleton({name: value for name, value in arrays.items() if name != label})
    load_weights(other, saved(tmp_path / "w.pth", of_other_classes(arrays, 5)), new_classes=ClassNames(OURS, OURS))


def backbone_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n.removeprefix("backbone."): v for n, v in arrays.items() if n.startswith("backbone.")}


def to_torchvision(name: str) -> str:
    name = name.replace("stem.conv1.norm", "bn1").replace("stem.", "")
    for stage in (2, 3, 4, 5):
        name = name.replace(f"res{stage}.", f"layer{stage - 1}.")
    for conv in (1, 2, 3):
        name = name.replace(f"conv{conv}.norm", f"bn{conv}")
    return name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")


@pytest.mark.parametrize("style", ["detectron2 pickle", "torchvision"])
def test_imagenet_resnet(tmp_path: Path, arrays: dict[str, np.ndarray], style: str) -> None:
    backbone = backbone_of(arrays)
    counter = np.array(3)
    if style == "torchvision":
        state = {to_torchvision(n): torch.from_numpy(np.array(v)) for n, v in backbone.items()}
        extra = {"fc.weight": torch.zeros(10, 4), "bn1.num_batches_tracked": torch.tensor(3)}
        path = saved(tmp_path / "resnet50.pth", state | extra)
        assert "layer1.0.downsample.1.running_mean" in state
    else:
        extra_arrays = {"stem.fc.weight": np.zeros((10, 4)), "stem.conv1.norm.num_batches_tracked": counter}
        content = {"model": backbone | extra_arrays, "__author__": "torchvision", "matching_heuristics": True}
        path = pickled(tmp_path / "R-50.pkl", content)
    model = skeleton(arrays)
    with pytest.raises(UserError, match="whole model"):
        load_weights(model, path)
    found = load_weights(model, path, allow_backbone=True)
    assert len(found["loaded"]) == len(backbone)
    for name, value in backbone.items():
        assert np.array_equal(model.get_parameter(f"backbone.{name}").detach(), value)
    assert float(model.get_parameter(f"{PREDICTOR}query_feat.weight").detach().mean()) == -7.0


def test_imagenet_swin(tmp_path: Path) -> None:
    block = {
        "patch_embed.proj.weight": (4, 3, 4, 4),
        "layers.0.blocks.0.norm1.weight": (4,),
        "layers.0.blocks.0.attn.relative_position_bias_table": (9, 1),
        "layers.0.downsample.norm.weight": (16,),
    }
    shapes = {f"backbone.{n}": s for n, s in block.items()}
    shapes |= {"backbone.norm0.weight": (4,), "sem_seg_head.predictor.query_feat.weight": (2, 2)}
    state = {n: torch.ones(s) for n, s in block.items()}
    state |= {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4),
        "layers.0.blocks.1.attn_mask": torch.zeros(1, 4, 4),
        "norm.weight": torch.zeros(4),
        "head.weight": torch.zeros(10, 4),
    }
    model = Skeleton(shapes)
    path = saved(tmp_path / "swin.pth", {"model": state})
    found = load_weights(model, path, allow_backbone=True)
    assert found == {"loaded": sorted(f"backbone.{n}" for n in block), "kept": ["backbone.norm0.weight"]}


class Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def evil_contents(marker: Path) -> list[Any]:
    import builtins
    import os

    return [
        Evil(os.system, f"touch {marker}"),
        Evil(builtins.eval, f"open({str(marker)!r}, 'w')"),
        Evil(np.load, str(marker), None, True),
        Evil(getattr, "text", "upper"),
        np.array([Evil(os.system, f"touch {marker}")], dtype=object),
        Evil(torch.storage._load_from_bytes, pickle.dumps(Evil(os.system, f"touch {marker}"))),
    ]


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
@pytest.mark.parametrize("which", range(6))
def test_malicious_files_are_refused_and_run_nothing(tmp_path: Path, suffix: str, which: int) -> None:
    marker = tmp_path / "ran"
    content = {"model": {"w": evil_contents(marker)[which]}}
    path = tmp_path / f"evil.{suffix}"
    if suffix == "pth":
        torch.save(content, path)
    else:
        pickled(path, content)
    with pytest.raises(UserError, match=r"refused|not an array of numbers"):
        read_weights(path)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_damaged_or_missing_files_are_user_errors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    with pytest.raises(UserError, match="no weights file"):
        read_weights(path)
    for data in (b"", b"not a pickle", b"\x80\x04N."):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"damaged|no state dict|refused"):
            read_weights(path)


def test_checksum_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


TINY = {
    "model.backbone": {"kind": "resnet", "depth": 50, "stem_channels": 8, "res2_channels": 16, "width_per_group": 4},
    "model.hidden_dim": 32,
    "model.conv_dim": 32,
    "model.mask_dim": 32,
    "model.encoder_layers": 2,
    "model.decoder_ffn": 64,
    "model.queries": 12,
}


def tiny_model(**toggles: bool) -> nn.Module:
    from mpformer.config.schema import Config, DatasetConfig
    from mpformer.modeling.meta_arch import build_model

    config = Config(dataset=DatasetConfig(name="coco", task="instance"))
    return build_model(config.replace(TINY | {f"toggles.{name}": on for name, on in toggles.items()}), 5, (0, 1, 2))


def test_golden_weights_load_into_the_real_model(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = saved(tmp_path / "mp.pth", {"model": tensors(arrays)})
    toggles = {name.removeprefix("toggles."): on for name, on in detect_toggles(path).items()}
    model = tiny_model(**toggles)
    found = load_weights(model, path)
    assert len(found["loaded"]) == 493  # all but the class weights, which the configuration gives
    assert found["kept"] == []
    assert_loaded(model, arrays)


def test_own_weights_come_back(tmp_path: Path) -> None:
    model = tiny_model(mp_queries=True)
    path = saved(tmp_path / "own.pth", {"model": model.state_dict()})
    other = tiny_model(mp_queries=True)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    load_weights(other, path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert detect_toggles(path) == {"toggles.query_position": True, "toggles.mp_queries": True}


def test_learnt_content_is_told_by_its_shape(tmp_path: Path) -> None:
    from mpformer.config.schema import Config, DatasetConfig
    from mpformer.modeling.meta_arch import build_model

    base = Config(dataset=DatasetConfig(name="coco", task="instance")).replace(TINY)
    model = build_model(base.replace({"toggles.mp_queries": True, "toggles.class_embedding": "learnt"}), 5, (0,))
    found = detect_toggles(saved(tmp_path / "learnt.pth", model.state_dict()))
    assert found["toggles.class_embedding"] == "learnt"


def test_swin_backbone_of_the_real_model(tmp_path: Path) -> None:
    """An ImageNet Swin file has the model's names but for norms of the outputs, and a classifier."""
    from mpformer.config.schema import SwinConfig
    from mpformer.modeling.swin import Swin

    swin = SwinConfig(embed_dim=8, depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), window=4)
    model = nn.Module()
    model.backbone = Swin(swin, ("res2", "res3", "res4", "res5"))
    names = {name for name, _ in model.named_parameters()}
    state = {n.removeprefix("backbone."): torch.ones(p.shape) for n, p in model.named_parameters()}
    state = {n: v for n, v in state.items() if not n.startswith(("norm0", "norm1", "norm2", "norm3"))}
    state |= {"norm.weight": torch.zeros(64), "head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}
    found = load_weights(model, saved(tmp_path / "swin.pth", {"model": state}), allow_backbone=True)
    assert set(found["loaded"]) | set(found["kept"]) == names
    assert all(name.startswith("backbone.norm") for name in found["kept"])


def test_swin_pickle_with_torch_tensors(tmp_path: Path) -> None:
    """Mask2Former's converter pickles the tensors themselves."""
    path = tmp_path / "swin_tiny.pkl"
    content = {"model": {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).half()}}
    path.write_bytes(pickle.dumps(content))
    state = read_weights(path)
    assert torch.equal(state["a.weight"], content["model"]["a.weight"])
    assert state["b"].dtype == torch.float16
