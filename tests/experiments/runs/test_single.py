"""One model by hand, with the YAML and the overrides of a Mask2Former user: train, evaluate, predict, take up again."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.cli import main
from experiments.runs.single import read_config
from experiments.store.files import read_json
from experiments.store.identity import run_id
from experiments.store.run_dir import Store

YAML = """
MODEL:
  META_ARCHITECTURE: "MaskFormer"
  BACKBONE: {FREEZE_AT: 0, NAME: "build_resnet_backbone"}
  RESNETS: {DEPTH: 18, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 8, NORM: "GN", STRIDE_IN_1X1: False, STEM_TYPE: "basic",
            RES5_MULTI_GRID: [1, 1, 1]}
  SEM_SEG_HEAD:
    NAME: "MaskFormerHead"
    NUM_CLASSES: 80
    CONVS_DIM: 16
    MASK_DIM: 16
    NORM: "GN"
    PIXEL_DECODER_NAME: "MSDeformAttnPixelDecoder"
    TRANSFORMER_ENC_LAYERS: 1
    DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS: 2
  MASK_FORMER:
    TRANSFORMER_IN_FEATURE: "multi_scale_pixel_decoder"
    HIDDEN_DIM: 16
    NHEADS: 2
    DIM_FEEDFORWARD: 16
    DROPOUT: 0.0
    DEC_LAYERS: 4  # three, and the prediction of the bare queries
    NUM_OBJECT_QUERIES: 8
    TRAIN_NUM_POINTS: 32
    TEST: {SEMANTIC_ON: False, INSTANCE_ON: True}
  MASK_PILOTING: {MP_QUERIES: True, POINT_NOISE: 0.2, FLIP_NOISE: 0.2}
DATASETS:
  TRAIN: ("coco_2017_train",)
  TEST: ("coco_2017_val",)
SOLVER: {IMS_PER_BATCH: 4, MAX_ITER: 50, STEPS: [1], BASE_LR: 0.0001, OPTIMIZER: "ADAMW"}
INPUT: {DATASET_MAPPER_NAME: "coco_instance_lsj", IMAGE_SIZE: 64, FORMAT: "RGB", MIN_SIZE_TEST: 0, MAX_SIZE_TEST: 0}
TEST: {EVAL_PERIOD: 0}
DATALOADER: {NUM_WORKERS: 0}
MPFORMER: {MODEL: {ENCODER_FFN: 16}}
"""
SHORT = ("SOLVER.MAX_ITER", "2", "MPFORMER.DATASET.ON_CORRUPT", "skip")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO in miniature, with half of one training JPEG."""
    from tests.support.miniature import write_miniature

    root = tmp_path_factory.mktemp("data")
    write_miniature("coco", root, images=4, side=64)
    broken = min((root / "coco/train2017").glob("*.jpg"))
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    return root


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Execute the command in this process; returns exit code, output and error output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    (tmp_path / "mine.yaml").write_text(YAML)

    def execute(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mpformer", *arguments])
        with pytest.raises(SystemExit) as end:
            main.main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return execute


def test_train_evaluate_predict_and_take_up_again(run: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    code, out, _ = run("train", "mine.yaml", *SHORT)
    assert code == 0
    assert "done" in out
    assert "AP " in out
    (directory,) = Store(Path("store")).runs()
    assert run_id(directory.config()) == directory.run_id
    assert directory.config().toggles.mp_queries
    assert directory.config().schedule.max_iter == 2
    trained = directory.trained()
    assert trained is not None
    assert trained.more["skipped_images"] == 1
    code, out, _ = run("train", "mine.yaml", *SHORT)
    assert (code, "skipped" in out) == (0, True)
    assert len(directory.attempts()) == 1, "nothing was left to do"

    weights = str(directory.path / trained.weights)
    code, out, _ = run("eval", "mine.yaml", *SHORT, "--weights", weights, "--json")
    assert code == 0
    (scored,) = (read_json(path / "result.json") for path in (directory.path / "evals").iterdir())
    assert json.loads(out)["metrics"] == scored["metrics"]
    assert (tmp_path / "evaluation" / "layers.parquet").exists()

    image = str(min((data / "coco/val2017").glob("*.jpg")))
    for arguments in ((), ("--config", "mine.yaml", "--set", "TEST.DETECTIONS_PER_IMAGE", "5")):
        code, out, _ = run("predict", image, "--weights", weights, "--out", "seen", *arguments)
        assert code == 0
        with Image.open(out.strip()) as overlay, Image.open(image) as original:
            assert overlay.size == original.size
            assert np.asarray(overlay).ndim == 3


def test_a_yaml_has_the_identity_of_the_setting_that_it_writes_out(tmp_path: Path) -> None:
    """Whatever its keys' order and case of use: file, overrides or a setting's name, the same run."""
    from mpformer.config.mask2former_yaml import to_yaml
    from mpformer.config.paper_settings import setting

    config = setting("coco/instance/r50-12ep")
    (tmp_path / "whole.yaml").write_text(to_yaml(config))
    longer = ["SOLVER.MAX_ITER", "368750", "SOLVER.STEPS", "(327778, 355092)"]
    assert run_id(read_config(str(tmp_path / "whole.yaml"), [])) == run_id(config)
    assert run_id(read_config("coco/instance/r50-12ep", longer)) == run_id(setting("coco/instance/r50-50ep"))
    assert run_id(read_config(str(tmp_path / "whole.yaml"), longer)) == run_id(setting("coco/instance/r50-50ep"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "gone.yaml"), "no configuration file 'gone.yaml'"),
        (("train", "coco/instance/r50-13ep"), "valid: 12ep, 24ep, 36ep, 50ep, 100ep"),
        (("train", "mine.yaml", "SOLVER.BASE_LRR", "1"), "nearest: SOLVER.BASE_LR"),
        (("train", "mine.yaml", "SOLVER.BASE_LR"), "'SOLVER.BASE_LR' has no partner"),
        (("train", "mine.yaml", "MODEL.WEIGHTS", "gone.pkl"), "initial weights gone.pkl are not there"),
        (
            ("train", "mine.yaml", "--data-root", "nowhere"),
            "coco is not at nowhere/coco; see: mpformer data check coco",
        ),
        (("eval", "mine.yaml", "--weights", "gone.pth"), "no weights file 'gone.pth'"),
        (("predict", "gone.jpg", "--weights", "gone.pth"), "gone.pth is not in a run's directory"),
        (("predict", "gone.jpg", "--weights", "gone.pth", "--set", "SEED", "1"), "--config names"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    run: Callable[..., Any], arguments: tuple[str, ...], message: str
) -> None:
    code, _, error = run(*arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
