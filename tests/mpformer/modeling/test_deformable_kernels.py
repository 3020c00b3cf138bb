"""Which kernel deformable attention runs in, and that each gives ``grid_sample``'s numbers and gradients."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpformer.modeling import deformable_attention as deformable
from mpformer.modeling.sparse_sampling import Sizes, sparse_kernel
from mpformer.runtime.errors import UserError

SIZES = ((3, 4), (6, 8), (5, 7))
needs_deformops = pytest.mark.skipif(
    find_spec("deformops") is None, reason="deformops is for Python 3.12 and 3.13: make setup PYTHON=python3.12"
)


def made() -> tuple[Tensor, Tensor, Tensor]:
    """Values, places outside the image, on its edges and between cells, weights; heads and levels that differ."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(2, 37, 2, 3, 4, 2, generator=generator) * 1.6 - 0.3
    places[:, 0], places[:, 1] = torch.tensor([0.0, 1.0]), torch.tensor([50.0, -50.0])
    value = torch.randn(2, 95, 2, 16, generator=generator)
    return value, places, torch.rand(2, 37, 2, 3, 4, generator=generator)


def outputs_and_gradients(kernel: Callable[..., Tensor]) -> list[Tensor]:
    """The output, and the gradients of values, places and weights under a gradient of sines."""
    value, places, weights = (x.requires_grad_() for x in made())
    out = kernel(value, SIZES, places, weights)
    return [out.detach(), *torch.autograd.grad(out, (value, places, weights), upstream(out))]


def upstream(out: Tensor) -> Tensor:
    return torch.arange(out.numel(), dtype=torch.float32).view_as(out).sin()


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    for ours, plain in zip(one, other, strict=True):
        torch.testing.assert_close(ours, plain, atol=2e-4, rtol=1e-4)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the packages serve these devices and no others."""

    def serve(deformops: str = "", package: str = "") -> None:
        monkeypatch.setattr(deformable, "_deformops_serves", lambda device: device == deformops)
        monkeypatch.setattr(deformable, "_package_serves", lambda device: device == package)

    return serve


def test_deformops_comes_first_on_gpus_then_the_compiled_package(installed: Callable[..., None]) -> None:
    installed(deformops="cuda", package="cuda")
    assert deformable.kernel_of("cuda") is deformable.deformops_kernel
    assert deformable.kernel_name("cuda").startswith("deformops")
    assert deformable.kernel_of("cpu") is sparse_kernel
    assert deformable.kernel_name("cpu") == "sparse matrix"
    installed(package="cuda")
    assert deformable.kernel_of("cuda") is deformable.package_kernel
    assert deformable.kernel_name("cuda").startswith("torch-ms-deform-attn")
    installed()
    assert deformable.kernel_name("cuda") == "grid_sample"


def test_a_gpu_without_a_kernel_is_refused_unless_that_is_wanted(installed: Callable[..., None]) -> None:
    installed()
    with pytest.raises(UserError, match=r"PYTHON=python3\.12.*KERNEL=yes.*runtime\.slow_attention=true"):
        deformable.require_kernel(torch.device("cuda"), slow=False)
    deformable.require_kernel(torch.device("cuda"), slow=True)
    deformable.require_kernel(torch.device("cpu"), slow=False)
    installed(deformops="cuda")
    deformable.require_kernel(torch.device("cuda"), slow=False)


def test_a_package_built_for_cpus_is_not_used_on_gpus() -> None:
    """As after a set-up on a login node without a GPU."""
    pytest.importorskip("torch_ms_deform_attn", reason="compiled by make setup KERNEL=yes")
    assert deformable._package_serves("cpu")
    if not torch.cuda.is_available():
        assert not deformable._package_serves("cuda")


def test_the_compiled_packages_kernel_is_grid_sample() -> None:
    pytest.importorskip("torch_ms_deform_attn", reason="compiled by make setup KERNEL=yes")
    assert_same(outputs_and_gradients(deformable.package_kernel), outputs_and_gradients(deformable.grid_sample_kernel))


@needs_deformops
def test_deformops_reference_is_grid_sample() -> None:
    from deformops.backends.reference import msda

    def reference(value: Tensor, sizes: Sizes, places: Tensor, weights: Tensor) -> Tensor:
        return msda.reference(value, deformable._level_table(sizes, value.device)[0], places, weights)

    plain = outputs_and_gradients(deformable.grid_sample_kernel)
    assert_same(outputs_and_gradients(reference), plain)
    assert_same(outputs_and_gradients(sparse_kernel), plain)


INTERPRETED = """
import sys, torch
# the interpreter takes kernels as they are; torch's wrapper takes compiled ones alone
torch.library.wrap_triton = lambda kernel: kernel
from deformops.backends.triton._kernels.msda_query_tiled import float32_backward_launch
from deformops.backends.triton._launch import query_tiled_forward_launch
value, shapes, starts, places, weights, gradient = torch.load(sys.argv[1])
out = query_tiled_forward_launch(value, shapes, starts, places, weights, 0)
found = float32_backward_launch(gradient.view_as(out), value, shapes, starts, places, weights)
torch.save([out.flatten(2), *found], sys.argv[2])
"""


@needs_deformops
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")
def test_deformops_kernels_are_grid_sample_where_triton_interprets_them(tmp_path: Path) -> None:
    """The kernels that :func:`deformops_kernel` runs on a GPU, the ones with sums in float32, forward and backward."""
    plain = outputs_and_gradients(deformable.grid_sample_kernel)
    value, places, weights = made()
    table = deformable._level_table(SIZES, value.device)
    torch.save([value, *table, places, weights, upstream(plain[0])], tmp_path / "given.pt")
    command = [sys.executable, "-c", INTERPRETED, str(tmp_path / "given.pt"), str(tmp_path / "found.pt")]
    subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
    assert_same(torch.load(tmp_path / "found.pt"), plain)
