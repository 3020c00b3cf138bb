"""Two gloo processes give the single process's losses and gradients on the same global batch."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from mpformer.modeling.points import PointDraw, PointSettings, draw_points
from tests.support.present import present
from tests.support.small_models import SIDE, batch, rng, small_model

PILOTED = {"toggles__mp_queries": True, "toggles__mp_groups": 2}


def part_of(points: PointDraw, images: slice) -> PointDraw:
    return PointDraw(
        None if points.matching is None else points.matching[:, images],
        points.candidates[images],
        points.uniform[images],
    )


def inputs(counts: tuple[int, ...]) -> tuple[list[dict[str, Any]], PointDraw]:
    points = draw_points(PointSettings(64), len(counts), (SIDE // 4, SIDE // 4), rng(3), torch.device("cpu"))
    return batch(counts), points


def step(model: torch.nn.Module, items: list[dict[str, Any]], points: PointDraw) -> dict[str, Tensor]:
    losses = model(items, noise=rng(), points=points)
    sum(losses.values()).backward()
    return {name: loss.detach() for name, loss in losses.items()}


CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "uneven": ((3, 1, 2, 0), PILOTED),
    "a process without objects": ((2, 1, 0, 0), PILOTED),
    "class mean per process": ((4, 0), {"schedule__class_mean": "per-rank"}),
}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name, (counts, changes) in CASES.items():
        model = small_model(**changes)
        items, points = inputs(counts)
        half = slice(rank * len(counts) // 2, (rank + 1) * len(counts) // 2)
        # No search for unused parameters: every parameter takes part, whatever a process's targets are.
        losses = step(DistributedDataParallel(model), items[half], part_of(points, half))
        results[name] = (losses, {n: p.grad for n, p in model.named_parameters()})
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of both processes for every case; they are started once, since imports dominate."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", ["uneven", "a process without objects"])
def test_two_processes_equal_one(ranks: list[dict[str, Any]], case: str) -> None:
    counts, changes = CASES[case]
    model = small_model(**changes)
    losses = step(model, *inputs(counts))
    (first, gradients), (second, other_gradients) = (rank[case] for rank in ranks)
    for name, loss in losses.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, loss, atol=1e-5, rtol=1e-4)
    for name, parameter in model.named_parameters():
        scale = present(parameter.grad).abs().max().item()
        for found in (gradients[name], other_gradients[name]):
            torch.testing.assert_close(found, parameter.grad, atol=2e-4 * scale + 1e-6, rtol=2e-3)


def test_class_mean_per_process_differs_from_the_global_one(ranks: list[dict[str, Any]]) -> None:
    counts, _ = CASES["class mean per process"]
    found = [rank["class mean per process"][0]["loss_ce"] for rank in ranks]
    model = small_model()
    items, points = inputs(counts)
    alone = [step(model, items[i : i + 1], part_of(points, slice(i, i + 1))) for i in range(2)]
    for ours, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(ours, expected["loss_ce"], atol=1e-5, rtol=1e-4)
    together = step(model, items, points)
    assert abs((found[0] + found[1]) / 2 - together["loss_ce"]) > 1e-3


@pytest.mark.parametrize("counts", [(2, 1), (0, 0)])
@pytest.mark.parametrize(
    "toggles",
    [{}, {"query_position": False}, {"mp_queries": True}, {"mp_queries": True, "layer0_supervision": False},
     {"mp_queries": True, "class_embedding": "learnt"}, {"mp_queries": True, "guided_layers": "first"}],
)  # fmt: skip
def test_every_parameter_gets_a_gradient(toggles: dict[str, Any], counts: tuple[int, ...]) -> None:
    """Distributed training relies on it: nothing looks for parameters that took no part."""
    model = small_model(**{f"toggles__{name}": value for name, value in toggles.items()})
    torch.stack(list(model(batch(counts), noise=rng(), points=rng()).values())).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
