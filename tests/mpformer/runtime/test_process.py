"""What a process sets for its kernels: on CPUs always the same, on GPUs as the run's options say."""

import os
import platform
import resource
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mpformer.runtime.errors import UserError
from mpformer.runtime.process import kernel_settings, prepare_process, triton_cache


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """A machine that says it has a GPU; the devices that were chosen. What is set is put back."""
    chosen: list[int] = []
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield chosen
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[:2]
    torch.set_float32_matmul_precision(before[2])
    torch.use_deterministic_algorithms(True, warn_only=True)


def test_cpus_are_deterministic_whatever_is_asked() -> None:
    assert prepare_process("cpu", 1, deterministic=False, tf32=True) == torch.device("cpu")
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == 1
    assert kernel_settings(torch.device("cpu")) == {"resume": "bit-exact", "deterministic kernels": True}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="freed memory is kept by glibc alone")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    prepare_process("cpu", 1)

    def step() -> None:
        tensors = [torch.ones(5 << 20) for _ in range(4)]  # 80 MiB: by itself the C library keeps half of it
        assert len(tensors) == 4

    for _ in range(3):  # until it has enough
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000  # of 20,480 pages


def test_a_gpu_that_need_not_repeat_itself_searches_the_fastest_kernels(cuda: list[int], tmp_path: Path) -> None:
    device = prepare_process("auto", 1, deterministic=False, tf32=True)
    assert device == torch.device("cuda")
    assert cuda == [0]
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert Path(os.environ["TRITON_CACHE_DIR"]).parent == tmp_path
    assert kernel_settings(device) == {
        "resume": "not bit-exact: runtime.deterministic is off", "deterministic kernels": False, "GPU": "a GPU",
        "TF32 products": True, "TF32 convolutions": True, "search for the fastest convolutions": True,
    }  # fmt: skip


def test_a_gpu_that_shall_repeat_itself_searches_nothing_and_says_what_remains(cuda: list[int]) -> None:
    device = prepare_process("cuda:3", 1, deterministic=True, tf32=False)
    assert cuda == []
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    found = kernel_settings(device)
    assert str(found.pop("resume")).startswith("not bit-exact: the gradient of deformable attention")
    assert found == {
        "deterministic kernels": True, "GPU": "a GPU", "TF32 products": False, "TF32 convolutions": False,
        "search for the fastest convolutions": False,
    }  # fmt: skip


def test_tritons_cache_is_the_nodes_and_nobody_elses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    ours = triton_cache()
    assert ours.name.endswith("-node7")
    assert ours.stat().st_mode & 0o777 == 0o700
    assert triton_cache() == ours
    ours.chmod(0o777)  # others may have put something there
    other = triton_cache()
    assert other != ours
    assert other.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["cuda", "gpu"])
def test_devices_that_are_not_there(name: str) -> None:
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="valid: auto, cpu"):
        prepare_process(name, 1)
