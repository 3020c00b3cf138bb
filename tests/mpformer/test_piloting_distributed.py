"""Two gloo processes train one piloted model of transformers, one of them on images without objects."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")

from mpformer.piloting import MaskPiloting
from tests.support.huggingface_models import mask2former


def batch(objects: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(objects)
    masks = torch.rand(objects, 64, 64, generator=generator) > 0.5
    pixels = torch.randn(1, 3, 64, 64, generator=generator)
    return {"pixel_values": pixels, "mask_labels": [masks.float()], "class_labels": [torch.arange(objects)]}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    pilot = MaskPiloting.for_huggingface(mask2former()).train()
    # transformers' Swin has a normalisation that its features do not pass
    distributed = DistributedDataParallel(pilot, find_unused_parameters=True)
    outputs = distributed(batch(3 if rank == 0 else 0))
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in pilot.named_parameters() if p.grad is not None}
    torch.save((outputs.pilot_loss.detach(), gradients), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_a_process_without_objects_takes_part(tmp_path: Path) -> None:
    spawn(worker, (str(tmp_path),), nprocs=2)
    (loss, first), (nothing, second) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert loss > 0
    assert nothing == 0
    assert first.keys() == second.keys()
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items())
    assert first["label_enc.weight"].abs().sum() > 0
