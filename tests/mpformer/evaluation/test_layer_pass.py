"""Evaluation: every layer scored as inference and scorer would one by one; files and result as the store expects."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch.nn import functional

from analysis import layer_table, scores
from analysis.masks import read_layer_masks
from mpformer.config.classes import class_table
from mpformer.config.schema import Config, plain, validate
from mpformer.data.validation import validation_items
from mpformer.evaluation.evaluate import Collector, evaluate, spread
from mpformer.evaluation.layer_pass import image_outputs
from mpformer.evaluation.layer_scores import LayerScores
from mpformer.evaluation.parts import Parts
from mpformer.evaluation.scoring.scorer import SegmentationScorer
from mpformer.modeling.inference import InferenceSettings
from mpformer.modeling.meta_arch import MPFormer, build_model
from mpformer.modeling.outputs import DecoderOutput
from mpformer.runtime.errors import RunFailure, UserError
from mpformer.runtime.rank import Rank
from mpformer.training.checkpoints import write

MODEL = {
    "backbone": {"kind": "resnet", "depth": 18, "stem_channels": 8, "res2_channels": 8, "norm": "GN"},
    "hidden_dim": 16,
    "conv_dim": 16,
    "mask_dim": 16,
    "heads": 2,
    "encoder_layers": 1,
    "encoder_ffn": 16,
    "decoder_layers": 2,
    "decoder_ffn": 16,
    "queries": 20,
    "attention_strides": (16, 8),
    "size_divisibility": 16,
}


@pytest.fixture(scope="module")
def config(shapes_config: Config) -> Config:
    # low thresholds, so that an untrained model has segments to score
    return shapes_config.replace(
        {f"model.{name}": value for name, value in MODEL.items()}
        | {"evaluation.object_mask_threshold": 0.0, "evaluation.overlap_threshold": 0.1}
        | {"evaluation.layer_mask_images": 2}
    )


@pytest.fixture(scope="module")
def model(config: Config) -> MPFormer:
    """Untrained, but with classes spread out, so that scores are not all 0."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    head = model.sem_seg_head.predictor.class_embed
    head.weight.data.normal_(0, 2, generator=generator)
    head.bias.data[-1] = -3
    return model


@pytest.fixture(scope="module")
def weights(model: MPFormer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "final.pth"
    write(path, {"model": model.state_dict()})
    return path


@pytest.fixture(scope="module")
def evaluated(
    config: Config, weights: Path, shapes_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("eval") / "setting"
    beats: list[dict[str, Any]] = []
    return out, evaluate(config, weights, out, shapes_root, progress=beats.append), beats


def test_result_is_whole_and_plain_json(evaluated: tuple[Path, dict[str, Any], list[dict[str, Any]]]) -> None:
    out, result, beats = evaluated
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["complete"] is True
    assert result["images"] == 6
    scored = {"AP", "AP50", "AP75", "PQ", "SQ", "RQ", "PQ_th", "PQ_st", "mIoU"}
    assert scored | {"mIoU-L", "mIoU-L-last", "Util", "Util-consecutive"} <= result["metrics"].keys()
    assert {name: len(values) for name, values in result["layers"].items() if name in ("AP", "PQ", "mIoU", "Util")} == {
        "AP": 3,
        "PQ": 3,
        "mIoU": 3,
        "Util": 3,
    }
    assert len(result["layers"]["empty_attention_share"]) == 2
    assert result["layers"]["Util"][-1] == 100
    assert result["layers"]["mIoU-L"][0] is None
    assert set(result["empty_ground_truth_share"]) == {"4", "8", "16", "32"}
    assert {"pycocotools", "panopticapi"} <= result["scorers"].keys()
    assert [beat["image"] for beat in beats] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in out.iterdir()) == ["layer_masks", "layers.parquet", "per_image.parquet"]


class Guesser:
    """Predicts from the ground truth, worse in earlier layers, so that no score is 0; stands in for a model."""

    training = False

    def __init__(self, settings: InferenceSettings, classes: int) -> None:
        self.inference, self.classes = settings, classes

    def train(self, mode: bool = True) -> None: ...

    def eval(self) -> None: ...

    def layer_outputs(self, items: list[dict[str, Any]]) -> tuple[DecoderOutput, list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(int(items[0]["image_id"]))
        logits, embed = torch.zeros(3, len(items), 20, self.classes + 1), torch.zeros(3, len(items), 20, 21)
        features = torch.zeros(len(items), 21, 16, 16)
        for b, item in enumerate(items):
            found = item["instances"][:19]
            n = len(found)
            features[b, :n] = functional.avg_pool2d(found.gt_masks.float(), 4) * 8 - 4
            features[b, 20] = torch.rand(16, 16, generator=generator) - 1.5
            for layer, right in enumerate((1.0, 3.0, 9.0)):
                logits[layer, b] = torch.randn(20, self.classes + 1, generator=generator)
                logits[layer, b, torch.arange(n), found.gt_classes] += right
                embed[layer, b, :n, :n] = torch.eye(n)
                embed[layer, b, :n, 20] = 6 / right
                embed[layer, b, n:, 20] = 2.0
        empty = torch.zeros(2, len(items), 20, dtype=torch.bool)
        return DecoderOutput(logits, embed, features, None, None, empty), [(64, 64)] * len(items)


@pytest.mark.parametrize("tasks", [("instance", "panoptic", "semantic"), ("instance",), ("instance", "semantic")])
def test_layers_equal_inference_and_recorded_scorer_one_by_one(
    tasks: tuple[str, ...], config: Config, shapes_root: Path
) -> None:
    """The direct way: detectron2-style results of each layer into pycocotools and panopticapi."""
    wanted = config.replace({f"evaluation.{task}": task in tasks for task in ("instance", "panoptic", "semantic")})
    settings = build_model(wanted).inference
    guesser: Any = Guesser(settings, 12)
    direct = [SegmentationScorer(wanted) for _ in range(3)]
    collected = Collector(wanted)
    for image in image_outputs(guesser, validation_items(wanted, shapes_root)):
        for layer, scorer in enumerate(direct):
            scorer.add(image.result(layer), image.truth)
        collected.add(image)
    expected = [scorer.result() for scorer in direct]
    summary = collected.summary()
    assert collected.scores() == pytest.approx(expected[-1], abs=1e-9)
    for name in {"AP", "PQ", "mIoU"} & expected[-1].keys():
        assert summary["layers"][name] == pytest.approx([found[name] for found in expected], abs=1e-6), name
        assert summary["layers"][name][2] > max(1, summary["layers"][name][0]), name


def test_per_image_and_layer_files_give_the_same_numbers(
    evaluated: tuple[Path, dict[str, Any], list[dict[str, Any]]],
) -> None:
    out, result, _ = evaluated
    again = scores.read(out / "per_image.parquet").scores()
    for name in ("AP", "PQ", "mIoU"):
        assert again[name] == pytest.approx(result["metrics"][name], abs=1e-9)
    table = layer_table.read(out / "layers.parquet")
    summary = layer_table.summarise(table)
    assert summary["metrics"]["Util"] == result["metrics"]["Util"]
    assert summary["layers"]["mIoU-L"] == result["layers"]["mIoU-L"]


def test_class_scores_are_what_the_means_are_of(evaluated: tuple[Path, dict[str, Any], list[dict[str, Any]]]) -> None:
    _, result, _ = evaluated
    assert set(result["classes"]) == {"AP", "PQ", "IoU"}
    assert set(result["classes"]["IoU"]) <= set(class_table("shapes", "panoptic").names)
    assert set(result["classes"]["AP"]) <= set(class_table("shapes", "panoptic").things)
    for score, mean in (("AP", "AP"), ("PQ", "PQ"), ("IoU", "mIoU")):
        assert np.mean(list(result["classes"][score].values())) == pytest.approx(result["metrics"][mean], abs=1e-9)


def test_scores_of_no_layer_the_last_or_every(
    evaluated: tuple[Path, dict[str, Any], list[dict[str, Any]]],
    config: Config,
    weights: Path,
    shapes_root: Path,
    tmp_path: Path,
) -> None:
    found = {
        wanted: evaluate(
            config.replace({"evaluation.layer_scores": wanted}), weights, tmp_path / str(wanted), shapes_root
        )
        for wanted in ("none", "final")
    }
    every = evaluated[1]
    assert found["final"]["metrics"] == every["metrics"]
    assert found["final"]["classes"] == every["classes"]
    assert "AP" not in found["final"]["layers"]
    assert "AP" not in found["none"]["metrics"]
    assert not (tmp_path / "none" / "per_image.parquet").exists()
    for result in found.values():
        assert result["layers"]["mIoU-L"] == every["layers"]["mIoU-L"]
    with pytest.raises(UserError, match="leaves nothing to measure"):
        config.replace({"evaluation.layer_scores": "none", "evaluation.layer_analysis": False})


@pytest.mark.parametrize(("stored", "wanted"), [(True, "every"), (False, "final")])
def test_what_older_runs_stored_of_layer_scores_keeps_its_id(config: Config, stored: bool, wanted: str) -> None:
    tree = config.model_dump(mode="json")
    tree["evaluation"]["layer_scores"] = stored
    read = validate(tree)
    assert read.evaluation.layer_scores == wanted
    assert plain(read.evaluation)["layer_scores"] is stored
    assert plain(read.replace({"evaluation.layer_scores": "none"}).evaluation)["layer_scores"] == "none"


def test_kept_masks_are_spread_over_the_set(evaluated: tuple[Path, dict[str, Any], list[dict[str, Any]]]) -> None:
    records = read_layer_masks(evaluated[0] / "layer_masks")
    ids = pq.read_table(evaluated[0] / "per_image.parquet")["image_id"].to_pylist()
    assert [record["image_id"] for record in records] == [ids[0], ids[-1]]
    assert all((evaluated[0] / "layer_masks" / record["image"]).exists() for record in records)
    assert spread(500, 16) == spread(500, 16)
    assert len(spread(500, 16)) == 16
    assert spread(3, 16) == {0, 1, 2}
    assert spread(5, 0) == set()


def test_what_is_switched_off_is_absent(config: Config, weights: Path, shapes_root: Path, tmp_path: Path) -> None:
    off = {"panoptic": False, "semantic": False, "layer_analysis": False, "layer_scores": False, "val_images": 2}
    result = evaluate(
        config.replace({f"evaluation.{name}": value for name, value in off.items()}), weights, tmp_path, shapes_root
    )
    assert result["images"] == 2
    assert result["layers"] == {}
    assert not {"PQ", "mIoU", "Util"} & result["metrics"].keys()
    assert "AP" in result["metrics"]
    assert not (tmp_path / "layers.parquet").exists()


def test_semantic_alone(config: Config, weights: Path, shapes_root: Path, tmp_path: Path) -> None:
    changes = {"evaluation.instance": False, "evaluation.panoptic": False}
    result = evaluate(config.replace(changes), weights, tmp_path, shapes_root)
    assert len(result["layers"]["mIoU"]) == 3
    assert result["layers"]["mIoU"][-1] == pytest.approx(result["metrics"]["mIoU"])
    assert "AP" not in result["metrics"]


def test_resized_inputs_are_scored_at_the_original_size(config: Config, model: MPFormer, shapes_root: Path) -> None:
    sized = config.replace({"evaluation.min_size_test": 80, "evaluation.max_size_test": 160})
    image = next(iter(image_outputs(model, validation_items(sized, shapes_root))))
    assert image.size == (80, 80)
    assert image.resized(-1)[1].shape[-2:] == (64, 64)
    counted, direct = LayerScores(sized, range(1, 2)), SegmentationScorer(sized)
    counted.add(image)
    direct.add(image.result(1), image.truth)
    expected = {name: value for name, value in direct.result().items() if name not in ("APs", "APm", "APl")}
    assert counted.results()[0] == pytest.approx(expected, abs=1e-6)


def test_model_is_left_in_its_mode(config: Config, model: MPFormer, shapes_root: Path) -> None:
    model.train()
    for _ in image_outputs(model, validation_items(config, shapes_root, 1)):
        assert not model.training
    assert model.training
    model.eval()


def test_what_an_image_took_is_free_once_it_is_scored(config: Config, model: MPFormer, shapes_root: Path) -> None:
    """Without the garbage collector, which would come after dozens of images of COCO's size: 0.7 GiB of masks."""
    collected = Collector(config, {0})
    gc.collect()
    gc.disable()
    try:
        images = list(image_outputs(model, validation_items(config, shapes_root, 2)))
        left = [weakref.ref(image) for image in images]
        for image in images:
            collected.add(image)
        del images, image
        assert [each() for each in left] == [None, None]
    finally:
        gc.enable()


def test_outputs_that_are_not_finite_fail_the_run(
    config: Config, model: MPFormer, shapes_root: Path, tmp_path: Path
) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["sem_seg_head.predictor.class_embed.bias"][0] = np.nan
    write(tmp_path / "bad.pth", {"model": state})
    with pytest.raises(RunFailure, match="not finite") as failure:
        evaluate(config, tmp_path / "bad.pth", tmp_path / "out", shapes_root)
    assert failure.value.failure_class == "nan"


def same(result: dict[str, Any]) -> dict[str, Any]:
    """What two evaluations of one model must agree on."""
    return {name: value for name, value in result.items() if name not in ("seconds", "peak_memory_bytes")}


def test_processes_share_an_evaluation_and_one_goes_on_where_another_stopped(
    evaluated: tuple[Path, dict[str, Any], list[dict[str, Any]]],
    config: Config,
    weights: Path,
    shapes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 1 of 2 scores its part and dies in the next one; rank 0 does the rest, and the numbers are one process'."""
    monkeypatch.setattr("mpformer.evaluation.parts.PART_IMAGES", 2)
    monkeypatch.setattr("mpformer.evaluation.evaluate.current_rank", lambda: Rank(1, 2))

    def dies(beat: dict[str, Any]) -> None:
        if beat["image"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(config, weights, tmp_path, shapes_root, progress=dies)
    (file,) = tmp_path.glob("parts/*/*.pt")
    assert file.name == "00001.pt"
    monkeypatch.setattr("mpformer.evaluation.evaluate.current_rank", lambda: Rank(0, 2))
    beats: list[dict[str, Any]] = []
    result = evaluate(config, weights, tmp_path, shapes_root, progress=beats.append)
    assert [beat["image"] for beat in beats] == [3, 4, 5, 6]
    assert same(result) == same(evaluated[1])
    for name in ("layers.parquet", "per_image.parquet"):
        assert_frame_equal(pq.read_table(tmp_path / name).to_pandas(), pq.read_table(evaluated[0] / name).to_pandas())
    assert not (tmp_path / "parts").exists()


def test_a_process_that_helps_writes_parts_alone(
    config: Config, weights: Path, shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpformer.evaluation.parts.PART_IMAGES", 4)
    monkeypatch.setattr("mpformer.evaluation.evaluate.current_rank", lambda: Rank(1, 2))
    assert evaluate(config, weights, tmp_path, shapes_root) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]
    assert sorted(path.name for path in tmp_path.glob("parts/*/*")) == ["00000.pt", "00001.pt"]


def test_a_damaged_part_is_taken_away_and_parts_of_other_settings_are_not_used(
    config: Config, weights: Path, tmp_path: Path
) -> None:
    parts = Parts.of(config, weights, tmp_path, 6)
    parts.write(0, {"images": 6, "masks": np.arange(3)})
    assert parts.read(0)["masks"].tolist() == [0, 1, 2]
    assert list(parts.to_do(Rank())) == []
    assert list(Parts.of(config.replace({"evaluation.detections": 7}), weights, tmp_path, 6).to_do(Rank())) == [0]
    (file,) = parts.folder.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(RunFailure, match="damaged and was removed"):
        parts.read(0)
    assert list(parts.to_do(Rank())) == [0]


def test_weights_that_do_not_fit(config: Config, weights: Path, shapes_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"query_embed.*toggles\.query_position"):
        evaluate(config.replace({"toggles.query_position": False}), weights, tmp_path, shapes_root)


def test_progress_may_end_an_evaluation(config: Config, weights: Path, shapes_root: Path, tmp_path: Path) -> None:
    def stop(beat: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(config, weights, tmp_path / "out", shapes_root, progress=stop)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["parts"]
