"""Tests of an operation take `backend` and `dtype`, and run on every implementation it has.

A test module names its operation: OPERATION = "rms_norm". An implementation is tested by having
kernels for it (backends.OPERATIONS); the reference is tested like one by tests that are marked
`reference`, which ask for results alone and have another formula to compare them with.
"""

import importlib.util
from collections.abc import Iterator

import pytest
import tile_model
import torch
from emulated_cuda import emulated_kernels
from implementations import Backend, parameters, runnable_isas

from lora_engine import backends


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` becomes each implementation of the module's OPERATION, `dtype` what it takes."""
    if "backend" not in metafunc.fixturenames:
        return
    with_dtype = "dtype" in metafunc.fixturenames
    found = parameters(
        metafunc.module.OPERATION,
        with_dtype=with_dtype,
        with_reference=metafunc.definition.get_closest_marker("reference") is not None,
    )
    names = ("backend", "dtype") if with_dtype else ("backend",)
    metafunc.parametrize(names, found, indirect=["backend"])


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Makes the implementation ready: the instruction set chosen, or skipped with a reason.

    Triton runs in its interpreter where there is no GPU and compiled where there is one. CUDA runs
    on a GPU, and emulated on the CPU. PTX of both is executed on the CPU.
    """
    chosen: Backend = request.param
    if chosen.device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if chosen.impl == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if chosen.impl == "triton" and chosen.device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("the Triton kernels are compiled for the GPU in this process")
    if chosen.impl == "triton" and chosen.capability is not None:
        from triton_ptx import executed_ptx

        with executed_ptx(chosen.capability):
            yield chosen
        return
    if chosen.impl == "cuda" and chosen.capability is not None:
        from cuda_ptx import executed_cuda

        with executed_cuda(chosen.capability) as kernels:
            monkeypatch.setattr(backends.extension, "cuda_emulation", kernels)
            yield chosen
        return
    if chosen.impl == "cuda" and chosen.device.type == "cpu":
        monkeypatch.setattr(backends.extension, "cuda_emulation", emulated_kernels())
    if chosen.isa is None:
        yield chosen
        return
    if chosen.isa == tile_model.NAME:
        with tile_model.tiles_modelled(monkeypatch):
            yield chosen
        return
    native = backends.native()
    best = native.isa()
    assert native.select_isa(chosen.isa)
    yield chosen
    assert native.select_isa(best)


@pytest.fixture(params=runnable_isas() or [pytest.param("", marks=pytest.mark.skip("no _C"))])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set that this processor has."""
    native = backends.native()
    best = native.isa()
    assert native.select_isa(request.param)
    yield request.param
    assert native.select_isa(best)


@pytest.fixture(autouse=True)
def _guarded(poisoned: None) -> None:
    """Every test of an operation runs with poisoned memory and watched products."""
