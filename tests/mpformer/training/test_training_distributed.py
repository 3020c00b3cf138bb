"""Several processes train one run: who is who, and that the main one alone writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpformer.runtime import distributed
from mpformer.runtime.errors import UserError
from mpformer.runtime.rank import Rank, current_rank

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_the_default() -> None:
    assert current_rank() == Rank(0, 1, 0)
    assert current_rank().main
    assert distributed.agree("why") == "why"


def test_torchrun_and_slurm_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert current_rank() == Rank(3, 4, 1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert current_rank() == Rank(1, 2, 0)


def test_an_allocation_without_a_step_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "8")  # salloc: the shell is not one of eight tasks
    assert current_rank() == Rank()


def test_processes_without_a_rendezvous_get_one_line_that_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MPFORMER_RENDEZVOUS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="MASTER_ADDR"), distributed.process_group(torch.device("cpu")):
        pass


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_gpus_talk_by_nccl_and_the_counts_on_the_cpu_by_gloo(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **_: asked.append(name))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with distributed.process_group(torch.device(device)):
        pass
    assert asked == [backend]


MEET = """
import os, sys, torch
from mpformer.runtime.distributed import process_group, total
from mpformer.runtime.errors import RunFailure
try:
    with process_group(torch.device("cpu")) as rank:
        print(int(total(torch.tensor(rank.number + 1))), flush=True)
        if rank.number == 1:
            os._exit(9)
        total(torch.tensor(1))
except RunFailure as failure:
    print(failure.failure_class, flush=True)
"""


def test_processes_meet_through_a_file_and_notice_the_death_of_another(tmp_path: Path) -> None:
    """Slurm's variables, a port that the system picks; rank 0 says where it listens, whoever comes first."""
    file = tmp_path / "rendezvous.json"
    shared = os.environ | {"SLURM_STEP_NUM_TASKS": "2", "MPFORMER_RENDEZVOUS": str(file)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEET], env=shared | {"SLURM_PROCID": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in (1, 0)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in processes]
    assert said == [["3"], ["3", "node"]]
    assert json.loads(file.read_text())["port"] > 1024


PROGRAM = """
import json, sys
from pathlib import Path
from mpformer.config.schema import validate
from mpformer.runtime.callbacks import TrainCallbacks
from mpformer.training.trainer import train
config = validate(json.loads(Path(sys.argv[1]).read_text()))
directory = Path(sys.argv[2])
log = lambda line: (directory / "metrics.jsonl").open("a").write(json.dumps(line) + "\\n")
(directory / f"trained{sys.argv[4]}.json").write_text(json.dumps(train(config, directory, Path(sys.argv[3]), TrainCallbacks(log=log))))
"""  # noqa: E501


@pytest.mark.slow
def test_two_processes_train_one_run(shapes_root: Path, shapes_config: object, tmp_path: Path) -> None:
    small = {"hidden_dim": 16, "conv_dim": 16, "mask_dim": 16, "heads": 2, "encoder_layers": 1, "encoder_ffn": 16,
             "decoder_layers": 2, "decoder_ffn": 16, "queries": 20, "attention_strides": (16, 8), "train_points": 64,
             "backbone": {"kind": "resnet", "depth": 18, "stem_channels": 8, "res2_channels": 8,
                          "norm": "GN"}}  # fmt: skip
    config = shapes_config.replace({f"model.{k}": v for k, v in small.items()})  # type: ignore[attr-defined]
    (tmp_path / "config.json").write_text(config.model_dump_json())
    environment = os.environ | {"WORLD_SIZE": "2", "MPFORMER_RENDEZVOUS": str(tmp_path / "rendezvous.json")}
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path / "config.json"), str(tmp_path), str(shapes_root)]
    processes = [
        subprocess.Popen([*arguments, str(rank)], env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(300) for process in processes] == [0, 0]
    record = json.loads((tmp_path / "trained0.json").read_text())
    assert record["world_size"] == 2
    assert (tmp_path / record["weights"]).exists()
    assert json.loads((tmp_path / "trained1.json").read_text())["weights_sha256"] == ""
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [4]


TWO_STEPS = """
import sys, torch
from pathlib import Path
from mpformer.runtime.callbacks import TrainCallbacks
from mpformer.runtime.distributed import process_group
from mpformer.training import accumulation
from mpformer.training.trainer import Trainer
from tests.support.small_models import batch, small_config
device = torch.device("cpu")
config = small_config(schedule__batch_size=2, toggles__mp_queries=True, runtime__accumulation=2)
with process_group(device) as rank:
    trainer = Trainer(config, Path(sys.argv[1]) / str(rank.number), Path(), TrainCallbacks(), device, rank)
    counts = [(2, 1), (0, 0)][rank.number]
    trainer.parts = accumulation.micro_batches([batch(counts), batch(counts, seed=1)], config)
    for trainer.iter in range(2):
        trainer.run_step()
    torch.save(trainer.core.state_dict(), Path(sys.argv[1]) / f"{rank.number}.pth")
"""


def test_a_process_without_objects_uses_every_parameter(tmp_path: Path) -> None:
    """Else the second step would raise, since nobody looks for parameters without a gradient; both end up the same."""
    shared = os.environ | {"WORLD_SIZE": "2", "MPFORMER_RENDEZVOUS": str(tmp_path / "rendezvous.json")}
    processes = [
        subprocess.Popen([sys.executable, "-c", TWO_STEPS, str(tmp_path)], env=shared | {"RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(240) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
