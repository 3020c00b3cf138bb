"""The trainer: bit-exact resume, equal accumulation, clean stops, named failures."""

import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpformer.config.schema import (
    Config,
    DatasetConfig,
    EvaluationConfig,
    ModelConfig,
    ResNetConfig,
    RuntimeConfig,
    ScheduleConfig,
    ShapesConfig,
    Toggles,
)
from mpformer.modeling.criterion import Criterion
from mpformer.runtime.callbacks import Interrupted, TrainCallbacks
from mpformer.runtime.errors import RunFailure, UserError
from mpformer.runtime.rank import Rank
from mpformer.training import trainer as training
from mpformer.training.checkpoints import Checkpoints
from mpformer.training.probes import Prober
from mpformer.training.trainer import train

SHAPES = ShapesConfig(side=64, train_images=12, val_images=6)  # those of the shared fixture
CONFIG = Config(
    dataset=DatasetConfig(name="shapes", task="panoptic", shapes=SHAPES),
    model=ModelConfig(
        backbone=ResNetConfig(depth=18, stem_channels=8, res2_channels=8, norm="GN"),
        hidden_dim=16,
        conv_dim=16,
        mask_dim=16,
        heads=2,
        encoder_layers=1,
        encoder_ffn=16,
        decoder_layers=2,
        decoder_ffn=16,
        queries=20,
        attention_strides=(16, 8),
        size_divisibility=16,
        train_points=64,
    ),
    toggles=Toggles(mp_queries=True, point_noise=0.2, flip_noise=0.2),
    schedule=ScheduleConfig(max_iter=12, batch_size=4, base_lr=1e-3, steps=(8,), warmup_iters=4, warmup_factor=0.1),
    evaluation=EvaluationConfig(panoptic=True, semantic=True),
    runtime=RuntimeConfig(checkpoint_period=3, eval_period=5, probe_images=4, log_period=4),
)


@pytest.fixture(scope="module")
def data_root(shapes_root: Path) -> Path:
    return shapes_root


@pytest.fixture(scope="module")
def whole(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 iterations."""
    directory = tmp_path_factory.mktemp("whole")
    (directory / "trained.json").write_text(json.dumps(train(CONFIG, directory, data_root, logging_to(directory))))
    return directory


def logging_to(directory: Path, **others: Any) -> TrainCallbacks:
    def log(line: dict[str, Any]) -> None:
        with (directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    return TrainCallbacks(log=log, **others)


def stop_at(iteration: int) -> Callable[[], str | None]:
    """Asks to stop when polled for the `iteration`-th time."""
    polls = iter(range(1, 10**6))
    return lambda: "test" if next(polls) == iteration else None


def lines(directory: Path) -> list[dict[str, Any]]:
    """Metrics without what measures time."""
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "time")} for line in found]


def trained(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "trained.json").read_text())


def test_lines_and_files_of_a_run(whole: Path) -> None:
    record = trained(whole)
    assert record["iterations"] == 12
    assert record["weights"] == "checkpoints/final.pth"
    assert (whole / record["weights"]).exists()
    assert record["numerics"] == {
        "resume": "bit-exact", "deterministic kernels": True, "deformable attention": "sparse matrix",
        "precision": "float32", "channels last": False, "compiled": False,
        "fused optimiser": record["numerics"]["fused optimiser"],
    }  # fmt: skip
    found = lines(whole)
    assert [(line["kind"], line["iteration"]) for line in found] == [
        ("train", 4),
        ("evaluation", 5),
        ("train", 8),
        ("evaluation", 10),
        ("train", 12),
        ("evaluation", 12),
    ]
    kinds = {f"loss_{kind}{part}" for kind in ("ce", "mask", "dice") for part in ("", "_pilot")}
    assert set(found[0]) == {"kind", "iteration", "loss", "lr"} | kinds
    assert found[0]["loss"] == pytest.approx(sum(found[0][kind] for kind in kinds))
    assert {"AP", "PQ", "mIoU", "Util", "mIoU-L"} <= set(found[1]["metrics"])
    probes = pd.read_parquet(whole / "probes.parquet")
    assert probes["iteration"].unique().tolist() == [5, 10, 12]
    assert probes["layer"].tolist() == [0, 1, 2] * 3
    assert probes["stability"].isna().tolist() == [True] * 3 + [False] * 6


@pytest.mark.parametrize("at", [7, 9])
def test_resume_is_bit_exact(at: int, whole: Path, data_root: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=f"stopped at iteration {at}: test"):
        train(CONFIG, tmp_path, data_root, logging_to(tmp_path, stop=stop_at(at)))
    record = train(CONFIG, tmp_path, data_root, logging_to(tmp_path))
    assert record["weights_sha256"] == trained(whole)["weights_sha256"]
    assert lines(tmp_path) == lines(whole)
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "probes.parquet"), pd.read_parquet(whole / "probes.parquet")
    )


def test_kill_between_checkpoints_redoes_the_lost_iterations(whole: Path, data_root: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(beat: dict[str, Any]) -> None:
        if beat["iteration"] == 8:
            raise Killed

    with pytest.raises(Killed):
        train(CONFIG, tmp_path, data_root, logging_to(tmp_path, progress=kill))
    assert lines(tmp_path)[-1]["iteration"] == 8  # newer than the last checkpoint, that of iteration 6
    newest = tmp_path / "checkpoints" / "iteration_0000006.pth"
    newest.write_bytes(newest.read_bytes()[:1000])  # and that one was cut short
    record = train(CONFIG, tmp_path, data_root, logging_to(tmp_path))
    assert record["weights_sha256"] == trained(whole)["weights_sha256"]
    assert lines(tmp_path) == lines(whole)


def test_other_seed_gives_other_weights(whole: Path, data_root: Path, tmp_path: Path) -> None:
    config = CONFIG.replace({"seed": 1, "runtime.eval_period": 0})
    assert train(config, tmp_path, data_root)["weights_sha256"] != trained(whole)["weights_sha256"]
    assert not (tmp_path / "probes.parquet").exists()


def test_damaged_probes_are_named_with_what_to_do(data_root: Path, tmp_path: Path) -> None:
    """Issue 12, 5.10: half a file, as a full disk or a broken copy leaves it."""
    prober = Prober(CONFIG, tmp_path, data_root)
    prober.path.write_bytes(b"PAR1 half a file")
    with pytest.raises(RunFailure, match=r"probes.parquet is damaged .*: move it away and launch again") as error:
        prober.cut_back(5)
    assert error.value.failure_class == "disk"
    assert str(prober.path) in str(error.value)


def test_probes_and_logging_do_not_touch_the_weights(whole: Path, data_root: Path, tmp_path: Path) -> None:
    config = CONFIG.replace({"runtime.eval_period": 0, "runtime.log_period": 1, "runtime.checkpoint_period": 100})
    assert train(config, tmp_path, data_root)["weights_sha256"] == trained(whole)["weights_sha256"]


def gradients(config: Config, data_root: Path, tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients and losses of the first iteration, with points that do not depend on the cut of the batch."""
    trainer = training.Trainer(config, tmp_path, data_root, TrainCallbacks(), torch.device("cpu"), Rank())
    trainer.resume()
    trainer.iter = 0
    seen: dict[str, float] = {}
    trainer._finite = lambda losses: seen.update(losses) or losses  # type: ignore[method-assign, func-returns-value]
    trainer.run_step()
    return {name: p.grad.clone() for name, p in trainer.core.named_parameters() if p.grad is not None}, seen


@pytest.mark.parametrize(
    ("norm", "accumulation", "processes", "said"),
    [("BN", 2, 1, "in 2 parts"), ("BN", 1, 2, "in 2 parts"), ("SyncBN", 2, 4, "in 2 parts"), ("SyncBN", 1, 4, ""),
     ("GN", 4, 4, ""), ("FrozenBN", 4, 4, ""), ("BN", 1, 1, "")],
)  # fmt: skip
def test_a_divided_batch_normalisation_is_said(
    norm: str, accumulation: int, processes: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIG.replace({"model.backbone.norm": norm, "runtime.accumulation": accumulation})
    training._check_normalisation(config, training.initial_model(config).train(), processes)
    assert said in caplog.text
    assert bool(caplog.records) is bool(said)


@pytest.mark.parametrize("parts", [2, 4, 3])
def test_accumulation_equals_the_whole_batch(
    parts: int, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # no noise is drawn, and every image gets the same points however the batch is cut
    from mpformer.modeling import criterion, points

    places = torch.rand(2, 1, 128, 2, generator=torch.Generator().manual_seed(0))

    def fixed(settings: Any, images: int, *_: Any) -> points.PointDraw:
        return points.PointDraw(None, places[0].expand(images, -1, -1), places[1, :, :16].expand(images, -1, -1))

    monkeypatch.setattr(criterion, "draw_points", fixed)
    config = CONFIG.replace(
        {"toggles.point_noise": 0.0, "toggles.flip_noise": 0.0, "schedule.clip_norm": 0.0, "runtime.eval_period": 0}
    )
    whole_grad, whole_losses = gradients(config, data_root, tmp_path / "a")
    part_grad, part_losses = gradients(config.replace({"runtime.accumulation": parts}), data_root, tmp_path / "b")
    assert part_losses == pytest.approx(whole_losses, rel=1e-4)
    for name, expected in whole_grad.items():
        scale = expected.abs().max().clamp(min=1e-3)
        assert (part_grad[name] - expected).abs().max() <= 2e-3 * scale, name


def break_loss(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Make the last head's dice loss no number in one call of the criterion."""
    real, calls = Criterion.weighted, itertools.count(1)

    def weighted(self: Criterion, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = real(self, losses)
        return found | {"loss_dice": found["loss_dice"] * math.nan} if next(calls) == call else found

    monkeypatch.setattr(Criterion, "weighted", weighted)


def test_non_finite_loss_names_iteration_and_losses(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_loss(monkeypatch, 5)
    with pytest.raises(RunFailure, match=r"iteration 5: loss_dice = nan") as failure:
        train(CONFIG, tmp_path, data_root)
    assert failure.value.failure_class == "nan"
    kept = Checkpoints(tmp_path / "checkpoints").load()
    assert kept is not None
    assert kept[0] == 3


@pytest.mark.parametrize(
    "error", [MemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")]
)
def test_out_of_memory_is_named(
    error: Exception, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(training.Trainer, "run_step", fail)
    with pytest.raises(RunFailure, match=r"runtime\.accumulation") as failure:
        train(CONFIG, tmp_path, data_root)
    assert failure.value.failure_class == "oom"


def test_read_only_run_directory_is_named(data_root: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises((RunFailure, UserError, NotADirectoryError, FileExistsError)):
        train(CONFIG, tmp_path, data_root)


def test_lost_claim_stops_before_the_rename(data_root: Path, tmp_path: Path) -> None:
    def confirm() -> None:
        raise RuntimeError("the claim is lost")

    with pytest.raises(RuntimeError, match="claim is lost"):
        train(CONFIG, tmp_path, data_root, TrainCallbacks(confirm=confirm))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_ctrl_c_finishes_the_iteration_and_checkpoints(data_root: Path, tmp_path: Path) -> None:
    import signal

    def interrupt(beat: dict[str, Any]) -> None:
        if beat["iteration"] == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"iteration 2: Ctrl-C"):
        train(CONFIG, tmp_path, data_root, TrainCallbacks(progress=interrupt))
    assert signal.getsignal(signal.SIGINT) is before
    kept = Checkpoints(tmp_path / "checkpoints").load()
    assert kept is not None
    assert kept[0] == 2


def test_training_in_another_thread(data_root: Path, tmp_path: Path) -> None:
    found: list[Any] = []
    config = CONFIG.replace({"schedule.max_iter": 1, "runtime.eval_period": 0})
    thread = threading.Thread(target=lambda: found.append(train(config, tmp_path, data_root)))
    thread.start()
    thread.join()
    assert found[0]["iterations"] == 1


def test_mixed_precision_trains_and_resumes(data_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In bfloat16 on every processor, said where that is slow; the id says bf16, so nothing falls back to float32."""
    config = CONFIG.replace({"schedule.amp": "bf16", "runtime.eval_period": 0, "schedule.max_iter": 4})
    with dtypes_of_products() as seen:
        whole = train(config, tmp_path / "a", data_root)
    backward_too = {"aten.convolution.default", "aten.convolution_backward.default", "aten.addmm.default"}
    for name in backward_too:
        assert seen[name] == {torch.bfloat16}, name
    assert ("slower than float32" in caplog.text) is not torch.cpu.get_capabilities()["amx_bf16"]
    assert whole["numerics"]["precision"] == "bfloat16"
    assert whole["numerics"]["channels last"] is True
    with pytest.raises(Interrupted):
        train(config, tmp_path / "b", data_root, TrainCallbacks(stop=stop_at(2)))
    assert train(config, tmp_path / "b", data_root)["weights_sha256"] == whole["weights_sha256"]


@contextmanager
def dtypes_of_products() -> Iterator[dict[str, set[torch.dtype]]]:
    """By operator, the types of its tensors in the body."""
    seen: dict[str, set[torch.dtype]] = {}

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.setdefault(str(func), set()).update(x.dtype for x in args if isinstance(x, torch.Tensor))
            return func(*args, **kwargs or {})

    with Noting():
        yield seen


def test_swin_with_stochastic_depth_resumes_exactly(data_root: Path, tmp_path: Path) -> None:
    swin = {"kind": "swin", "embed_dim": 8, "depths": (1, 1, 2, 1), "heads": (1, 2, 2, 4), "window": 4}
    config = CONFIG.replace(
        {"model.backbone": swin, "runtime.eval_period": 0, "schedule.max_iter": 4, "model.attention_strides": (32, 16)}
    ).replace({"model.size_divisibility": 32})
    whole = train(config, tmp_path / "a", data_root)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "b", data_root, TrainCallbacks(stop=stop_at(3)))
    assert train(config, tmp_path / "b", data_root)["weights_sha256"] == whole["weights_sha256"]


def test_a_gpu_without_a_kernel_of_deformable_attention_is_refused_before_anything_is_written(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "prepare_process", lambda *_, **__: torch.device("cuda"))
    for serves in ("_deformops_serves", "_package_serves"):
        monkeypatch.setattr(f"mpformer.modeling.deformable_attention.{serves}", lambda device: False)
    with pytest.raises(UserError, match=r"runtime\.slow_attention=true"):
        train(CONFIG, tmp_path / "run", data_root)
    assert not (tmp_path / "run").exists()


def test_initial_weights_must_be_those_that_were_planned(whole: Path, data_root: Path, tmp_path: Path) -> None:
    path = whole / trained(whole)["weights"]
    start = {"model.init_weights": str(path), "runtime.eval_period": 0, "schedule.max_iter": 1}
    with pytest.raises(UserError, match="another file was planned"):
        train(CONFIG.replace(start | {"model.init_checksum": "0" * 64}), tmp_path, data_root)
    good = CONFIG.replace(start | {"model.init_checksum": trained(whole)["weights_sha256"]})
    model = training.initial_model(good)
    saved = torch.load(path, weights_only=True)["model"]
    name = "sem_seg_head.predictor.query_feat.weight"
    assert torch.equal(model.state_dict()[name], saved[name])
