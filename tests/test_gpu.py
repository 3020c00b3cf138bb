"""For a machine with GPUs (`make test-gpu`): the CUDA attention kernel, mixed precision, NCCL.

MPFORMER_TEST_DEVICE=cpu runs the same bodies on CPU (gloo), to check these tests where there is no GPU.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mpformer.config.schema import Config
from mpformer.data.sets.shapes_set import prepare_shapes
from mpformer.modeling import deformable_attention as deformable
from mpformer.runtime.callbacks import TrainCallbacks

DEVICE = os.environ.get("MPFORMER_TEST_DEVICE", "cuda")
GPUS = torch.cuda.device_count() if DEVICE == "cuda" else 2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch sees no GPU"),
]

TINY: dict[str, Any] = {
    "dataset.shapes.side": 64, "dataset.shapes.train_images": 8, "dataset.shapes.val_images": 2, "model.queries": 10,
    "schedule.max_iter": 6, "schedule.batch_size": 4, "schedule.warmup_iters": 0, "runtime.eval_period": 0,
    "runtime.log_period": 1, "toggles.mp_queries": True, "toggles.point_noise": 0.2, "toggles.flip_noise": 0.2,
    "runtime.device": DEVICE, "runtime.slow_attention": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    shapes = tiny().dataset.shapes
    assert shapes is not None
    prepare_shapes(shapes, root, workers=1)
    return root


def tiny(**changes: Any) -> Config:
    from experiments.suites import scales

    return scales.base("mini", "shapes").replace(TINY | changes)


@pytest.mark.parametrize("package", ["deformops", "package"])
def test_the_packages_kernels_give_the_same_numbers_and_gradients(package: str) -> None:
    if not getattr(deformable, f"_{package}_serves")(DEVICE):
        pytest.skip(f"not installed for {DEVICE}")
    kernel_of_package = getattr(deformable, f"{package}_kernel")
    generator = torch.Generator(DEVICE).manual_seed(0)
    sizes = ((16, 16), (8, 8), (4, 4))
    tokens = sum(h * w for h, w in sizes)
    shapes = ((2, tokens, 4, 16), (2, 50, 4, 3, 4, 2), (2, 50, 4, 3, 4))
    made = [torch.rand(shape, device=DEVICE, generator=generator) for shape in shapes]
    results = []
    for kernel in (deformable.grid_sample_kernel, kernel_of_package):
        value, locations, weights = (tensor.clone().requires_grad_() for tensor in made)
        output = kernel(value, sizes, locations, weights)
        output.square().sum().backward()
        results.append([output, value.grad, locations.grad, weights.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_batches_come_pinned_and_are_copied_to_the_device(data_root: Path) -> None:
    from mpformer.data.loader import train_batches
    from mpformer.training.accumulation import micro_batches
    from mpformer.training.prefetch import prefetched

    on_gpu = DEVICE == "cuda"
    batches = train_batches(tiny(), data_root, pinned=on_gpu)
    seen: list[bool] = []

    def noted(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        seen.append(batch[0]["instances"].gt_masks.is_pinned())
        return batch

    watched = map(noted, batches)
    parts = prefetched(micro_batches(watched, tiny()), torch.device(DEVICE))
    for _ in range(3):
        item = next(parts).batch[0]
        assert {item["image"].device.type, item["instances"].gt_masks.device.type} == {DEVICE}
    assert seen == [on_gpu] * (4 if on_gpu else 3)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_in_every_precision(amp: str, data_root: Path, tmp_path: Path) -> None:
    from mpformer.training.trainer import train

    if DEVICE == "cpu" and amp == "fp16":
        pytest.skip("half precision is for GPUs")
    losses: list[float] = []
    callbacks = TrainCallbacks(log=lambda line: losses.append(line["loss"]))
    trained = train(tiny(**{"schedule.amp": amp}), tmp_path, data_root, callbacks)
    assert trained["iterations"] == 6
    assert all(math.isfinite(loss) for loss in losses)
    assert trained["peak_memory_bytes"] > 0


def test_layers_are_analysed_where_the_model_is(data_root: Path, tmp_path: Path) -> None:
    """Evaluation with its layer analysis runs on the device; the recorder's lines are those of the CPU."""
    import numpy as np

    from analysis.recorder import LayerRecorder
    from mpformer.evaluation.evaluate import evaluate
    from mpformer.modeling.meta_arch import build_model

    torch.save({"model": build_model(tiny()).state_dict()}, tmp_path / "weights.pth")
    result = evaluate(tiny(), tmp_path / "weights.pth", tmp_path / "evaluation", data_root)
    assert len(result["layers"]["Util"]) == 7
    assert len(result["layers"]["gradient_cosine"]) == 7
    g = torch.Generator().manual_seed(0)
    shapes = ((4, 10, 16), (16, 20, 24), (4, 10, 6))
    embed, features, classes = (torch.randn(shape, generator=g) for shape in shapes)
    masks = torch.rand(3, 77, 95, generator=g) > 0.5
    rows = []
    for device in ("cpu", DEVICE):
        recorder = LayerRecorder()
        on = [value.to(device) for value in (embed, features, classes)]
        recorder.add_embeddings(0, on[0], on[1], on[2], masks, torch.tensor([0, 1, 2]), image_size=(77, 95))
        rows.append(recorder.rows())
    for name, column in rows[0].items():
        np.testing.assert_allclose(column, rows[1][name], rtol=1e-2, err_msg=name)


PROGRAM = """
import json, sys
from pathlib import Path
from mpformer.config.schema import validate
from mpformer.runtime.callbacks import TrainCallbacks
from mpformer.training.trainer import train
folder, losses = Path(sys.argv[1]), []
callbacks = TrainCallbacks(log=lambda line: losses.append(line["loss"]))
config = validate(json.loads((folder / "config.json").read_text()))
trained = train(config, folder / "run", Path(sys.argv[2]), callbacks)
(folder / f"trained{sys.argv[3]}.json").write_text(json.dumps({**trained, "losses": losses}))
"""


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_two_gpus_train_one_run(data_root: Path, tmp_path: Path) -> None:
    """As tasks of a Slurm step do: they meet through a file; the losses are those of one GPU with two micro-batches."""
    from mpformer.training.trainer import train

    config = tiny(**{"schedule.batch_size": 2})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "run").mkdir()
    shared = os.environ | {"SLURM_STEP_NUM_TASKS": "2", "MPFORMER_RENDEZVOUS": str(tmp_path / "rendezvous.json")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(data_root)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(240) for process in processes] == [0, 0]
    together = json.loads((tmp_path / "trained0.json").read_text())
    assert together["world_size"] == 2
    losses: list[float] = []
    callbacks = TrainCallbacks(log=lambda line: losses.append(line["loss"]))
    train(config.replace({"runtime.accumulation": 2}), tmp_path / "alone", data_root, callbacks)
    assert together["losses"] == pytest.approx(losses, rel=1e-2)
