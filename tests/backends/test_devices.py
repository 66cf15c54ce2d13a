"""The devices that there are, and their memory."""

import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from host_reads import waits_for_the_gpu

from lora_engine import backends

CPU = torch.device("cpu")


def test_a_device_is_here_or_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert backends.gpu_count() == 2 and backends.preferred_device().type == "cuda"
    assert backends.why_absent(torch.device("cuda")) is None
    assert backends.why_absent(torch.device("cuda:1")) is None
    assert backends.why_absent(torch.device("cuda:2")) == "torch sees 2 GPU(s); use auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.gpu_count() == 0 and backends.preferred_device() == CPU
    assert backends.why_absent(torch.device("cuda")) == "torch sees 0 GPU(s); use auto"
    assert backends.why_absent(torch.device("xla")) == "use auto or cpu"
    assert backends.why_absent(CPU) is None


def test_a_tensor_that_moves_keeps_its_values() -> None:
    x = torch.arange(3)
    assert backends.moved(x, CPU) is x and backends.moved(x, "cpu") is x
    assert backends.moved(x, "meta").device.type == "meta"


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_tensor_that_moves_to_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.arange(1000)
    with waits_for_the_gpu() as waits:
        moved = [backends.moved(x + i, "cuda") for i in range(20)]
    assert not waits
    for i, there in enumerate(moved):
        assert torch.equal(there.cpu(), x + i)


def test_memory_is_the_computers_or_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes, owner = backends.memory(CPU)
    assert nbytes > 1e8 and owner == "this machine"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 80))
    assert backends.memory(torch.device("cuda")) == (80, "the GPU")


def test_peak_memory_is_at_least_what_was_resident():
    array = np.ones(64 << 17)  # 64 MiB, touched
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    del array
    counters_may_lag = 1 << 20
    assert backends.peak_memory_bytes(torch.device("cpu")) >= resident - counters_may_lag
    assert resident > 64 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/clear_refs")
def test_memory_freed_before_the_reset_does_not_count() -> None:
    cpu, size = torch.device("cpu"), 256 * 2**20
    backends.reset_peak_memory(cpu)
    before = backends.peak_memory_bytes(cpu)
    with mmap.mmap(-1, size) as block:  # not from the heap, which may keep what is freed
        block[::4096] = b"x" * (size // 4096)
        assert backends.peak_memory_bytes(cpu) > before + size // 2
    assert backends.peak_memory_bytes(cpu) > before + size // 2
    backends.reset_peak_memory(cpu)
    assert backends.peak_memory_bytes(cpu) < before + size // 2
