"""One model by hand, with the YAML and the overrides of a Mask2Former user: train, evaluate, predict, take up again."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from experiments.cli import main
from experiments.runs.single import read_config
from experiments.store.files import read_json
from experiments.store.identity import run_id
from experiments.store.run_dir import Store
from mpformer.modeling import weights_outline

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

    code, out, _ = run("export", directory.run_id, "plain.pkl", "--to", "mask2former")
    assert (code, out.strip()) == (0, "plain.pkl")
    code, out, _ = run("eval", "mine.yaml", *SHORT, "--weights", "plain.pkl", "--out", "of plain", "--json")
    assert json.loads(out)["metrics"] == pytest.approx(scored["metrics"]), "without the piloted part, the same scores"

    image = str(min((data / "coco/val2017").glob("*.jpg")))
    for arguments in ((), ("--config", "mine.yaml", "--set", "TEST.DETECTIONS_PER_IMAGE", "5")):
        code, out, _ = run("predict", image, "--weights", weights, "--out", "seen", *arguments)
        assert code == 0
        with Image.open(out.strip()) as overlay, Image.open(image) as original:
            assert overlay.size == original.size
            assert np.asarray(overlay).ndim == 3
    others = sorted(str(path) for path in (data / "coco/val2017").glob("*.jpg"))[:2]
    code, out, error = run("predict", *others, "--weights", weights, "--threshold", "1", "--json", "--masks", "masks")
    assert code == 0
    assert [(one["image"], one["regions"]) for one in json.loads(out)] == [(name, []) for name in others]
    assert error.count("nothing was found; a lower --threshold") == 2
    assert "images: 2/2" in error


def test_the_habits_of_train_net_are_understood(
    run: Callable[..., Any], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``--config-file``, ``--num-gpus``, ``--resume``, ``MODEL.WEIGHTS``, ``--eval-only``; and fine-tuning."""
    caplog.set_level("INFO")
    habit = ("--config-file", "mine.yaml", "--num-gpus", "0", "--resume", *SHORT)
    code, out, _ = run("train", *habit)
    assert (code, "done" in out) == (0, True)
    (directory,) = Store(Path("store")).runs()
    assert directory.run_id == run_id(directory.config()), "the same run as without these options"
    assert directory.config().runtime.device == "cpu"
    whole = str(directory.path / "checkpoints" / "final.pth")
    code, out, _ = run(
        "train", "--config-file", "mine.yaml", "--eval-only", "--out", "scored", *SHORT, "MODEL.WEIGHTS", whole
    )
    assert (code, "all numbers: scored/result.json" in out) == (0, True)
    assert read_json(tmp_path / "scored" / "result.json")["metrics"]
    assert len(list(Store(Path("store")).runs())) == 1, "nothing was trained"

    weights = torch.load(whole, weights_only=True)["model"]
    for name in ("class_embed.weight", "class_embed.bias", "label_enc.weight"):
        key = f"sem_seg_head.predictor.{name}"
        weights[key] = torch.full((134 if "class" in name else 133, *weights[key].shape[1:]), 3.0)
    torch.save(weights, tmp_path / "panoptic.pth")
    fine = ("train", "mine.yaml", *SHORT, "SOLVER.BASE_LR", "1e-9")
    code, _, error = run(*fine, "--weights", "panoptic.pth")
    print(error)
    assert (code, "--reinit-class-head to fine-tune these" in error) == (2, True)
    code, _, _ = run(*fine, "--weights", "panoptic.pth", "--reinit-class-head")
    assert code == 0
    (tuned,) = (one for one in Store(Path("store")).runs() if one.run_id != directory.run_id)
    model = tuned.config().model
    assert (model.reinit_class_head, model.init_classes, len(model.init_checksum)) == (True, "coco/panoptic", 64)
    bias = torch.load(tuned.path / "checkpoints" / "final.pth", weights_only=True)["model"][
        "sem_seg_head.predictor.class_embed.bias"
    ]
    assert bias.tolist() == pytest.approx([3.0] * 81), "80 things, and no object, from the file"
    assert "class head: 80 classes taken by name from panoptic.pth: person, bicycle" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--num-gpus", "2", "mine.yaml"), "--num-gpus is 2 but there are 0 here; 0 is the CPU"),
        (("train", "--eval-only", "mine.yaml"), "give --weights FILE or MODEL.WEIGHTS FILE"),
        (("train", "--num-gpus", "0"), "train what? give a Mask2Former-style YAML file"),
        (("train", "mine.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", "80"), "nothing here reads MODEL.ROI_HEADS.NUM_CLASSES"),
        (("train", "mine.yaml", "--reinit-class-head"), "give model.init_weights too (--weights FILE)"),
    ],
)
def test_habits_that_cannot_be_are_refused_in_a_line(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("experiments.launch.machine.cuda_devices", lambda: 0)
    code, _, error = run(*arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_train_fetches_initial_weights_that_have_an_address(
    run: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    """As `launch` does, into the data root; what does not fit is refused before a run directory is made."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "coco").symlink_to(data / "coco")
    torch.save({"sem_seg_head.predictor.class_embed.weight": torch.zeros(4, 16)}, tmp_path / "three.pth")
    train = ("train", "mine.yaml", "--data-root", "own", "MODEL.WEIGHTS")
    code, _, error = run(*train, (tmp_path / "three.pth").as_uri())
    assert (code, "three.pth has 3 classes, coco (instance) has 80" in error) == (2, True)
    assert (own / "weights" / "three.pth").is_file()
    code, _, error = run(*train, (tmp_path / "gone.pth").as_uri())
    assert (code, "cannot fetch file:" in error, error.count("\n")) == (2, True, 1)
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_several_processes_train_one_run(data: Path, tmp_path: Path) -> None:
    """``--num-gpus 2`` starts two processes; here, on the CPU."""
    (tmp_path / "mine.yaml").write_text(YAML)
    command = ["train", "--config-file", "mine.yaml", "--num-gpus", "2", *SHORT, "MODEL.DEVICE", "cpu"]
    environment = os.environ | {"DETECTRON2_DATASETS": str(data)}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli.main", *command], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (directory,) = Store(tmp_path / "store").runs()
    trained = directory.trained()
    assert trained is not None
    assert trained.world_size == 2
    assert len(directory.attempts()) == 1


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


MISTAKES = """
import sys
from experiments.cli import main
for config, weights, device in (
    ("coco/instance/r50-12ep", "", ""), ("mine.yaml", "garbage.pth", "cpu"), ("mine.yaml", "classes.pth", "cpu"),
    ("mine.yaml", "width.pkl", "cpu"), ("mine.yaml", "", "cuda"),
):
    sys.argv[1:] = ["train", config] + (["MODEL.WEIGHTS", weights, "MODEL.DEVICE", device] if device else [])
    try:
        main.main()
    except SystemExit as end:
        print(end.code, sorted({"torch", "mpformer.modeling.meta_arch"} & sys.modules.keys()))
"""


def test_train_refuses_wrong_weights_class_lists_and_devices_at_once_and_leaves_nothing(
    data: Path, tmp_path: Path
) -> None:
    """Issue 12, 5.7: a line each, exit code 2, no warning of torch, no run directory, and no model is imported.

    Torch itself only comes with detectron2's configuration, which a YAML file or an override needs.
    """
    (tmp_path / "mine.yaml").write_text(YAML)
    (tmp_path / "garbage.pth").write_bytes(b"<html>not found</html>")
    head = "sem_seg_head.predictor."
    torch.save({f"{head}class_embed.weight": torch.zeros(4, 16)}, tmp_path / "classes.pth")
    queries = {f"{head}query_feat.weight": np.zeros((8, 32))}
    (tmp_path / "width.pkl").write_bytes(pickle.dumps({"model": queries}))
    where = tmp_path / "data"
    shutil.copytree(data, where)
    (where / "weights").mkdir()
    (where / "weights" / "R-50.pkl").write_bytes(b"<html>not found</html>")
    environment = os.environ | {"DETECTRON2_DATASETS": str(where), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", MISTAKES], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["2 []", *["2 ['torch']"] * 4]
    lines = done.stderr.splitlines()
    assert len(lines) == 5, done.stderr
    assert "cannot read R-50.pkl: damaged or not a weights file" in lines.pop(0)
    assert "cannot read garbage.pth: damaged or not a weights file" in lines[0]
    assert "classes.pth has 3 classes, coco (instance) has 80" in lines[1]
    assert "width.pkl has 8 queries of width 32, the model 8 of width 16" in lines[2]
    assert "runtime.device is 'cuda' but there is no CUDA here; valid: auto, cpu" in lines[3]
    assert not (tmp_path / "store").exists()


def test_train_refuses_weights_that_do_not_fit_before_it_writes(run: Callable[..., Any], tmp_path: Path) -> None:
    """Issue 12, 5.7: what only the model itself can tell takes torch, but leaves no run directory either."""
    torch.save({"sem_seg_head.predictor.class_embed.weight": torch.zeros(81, 16)}, tmp_path / "part.pth")
    code, _, error = run("train", "mine.yaml", "MODEL.WEIGHTS", "part.pth")
    assert code == 2
    assert "part.pth does not fit the model: " in error
    assert error.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_the_outline_of_own_weights_names_every_shape(tmp_path: Path) -> None:
    values = {"a": torch.zeros(2, 3), "b": torch.nn.Parameter(torch.zeros(4)), "c": torch.zeros(())}
    torch.save({"model": values, "iteration": 3}, tmp_path / "own.pth")
    assert weights_outline.outline(tmp_path / "own.pth") == {"a": (2, 3), "b": (4,), "c": ()}
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "module.pth")
    assert weights_outline.outline(tmp_path / "module.pth") == {"weight": (2, 3), "bias": (2,)}
    save_file(module.state_dict(), tmp_path / "module.safetensors")
    assert weights_outline.outline(tmp_path / "module.safetensors") == {"weight": (2, 3), "bias": (2,)}
    torch.save(values, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert weights_outline.outline(tmp_path / "old.pth") == {}
