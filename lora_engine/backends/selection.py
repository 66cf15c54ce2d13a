"""What runs on this machine: `choice.choose`, asked with what is present here, and kept."""

import warnings
from dataclasses import replace
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch

from lora_engine.backends import extension, hardware, tables
from lora_engine.backends.choice import (
    FEW_ROWS,
    Choice,
    Extent,
    Head,
    Present,
    Product,
    Request,
    Strategy,
    choose,
)
from lora_engine.backends.extension import Extension
from lora_engine.errors import EngineWarning


def present() -> Present:
    """What this machine has."""
    found = extension.loaded()
    return Present(
        isa=None if found.module is None else found.module.isa(),
        problem=found.problem,
        triton=hardware.triton_installed(),
        interpreted=hardware.triton_interpreted(),
        architectures=extension.cuda_architectures(),
        emulated=extension.cuda_emulation is not None,
        gpu=torch.cuda.is_available(),
    )


def explain(
    operation: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> Choice:
    """Which implementation `operation` runs with on `device` and `dtype`, and why.

    `impl` forces one of IMPLEMENTATIONS; UnavailableError where it cannot run.
    """
    return choose(Request.on(torch.device(device), operation, dtype, impl=impl), present())


def select(
    operation: str, device: torch.device, dtype: torch.dtype, impl: str | None = None
) -> str:
    """What an operation calls: `explain`, with one warning where the reference is not by choice."""
    found = extension.loaded(), extension.cuda_emulation
    choice = _explain_once(operation, device, dtype, impl, *found)
    if choice.impl == "reference" and impl is None:
        _warn_once(operation, choice.reason)
    return choice.impl


def runs_fused(block: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all parts of a block of BLOCKS have kernels."""
    found = extension.loaded(), extension.cuda_emulation
    return _explain_once(block, device, dtype, None, *found).impl != "reference"


@cache
def _explain_once(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    impl: str | None,
    found: Extension,
    emulation: ModuleType | None,
) -> Choice:
    """`explain` for operations, which ask at every call: the answer depends on nothing else."""
    return explain(operation, device, dtype, impl)


@cache
def _warn_once(operation: str, reason: str) -> None:
    message = f"lora_engine.{operation} runs as the PyTorch reference: {reason}"
    warnings.warn(message, EngineWarning, stacklevel=4)


@lru_cache(4096)
def product_strategy(
    device: torch.device, dtype: torch.dtype, sizes: Product, format: str = "dense"
) -> str:
    """The strategy's name for a base weight of this format."""
    request = Request.on(device, "lora_linear", dtype, sizes)
    plan = choose(replace(request, format=format), present()).plan
    assert isinstance(plan, Strategy)
    return plan.name


def takes_few_rows(
    rows: int, device: torch.device, dtype: torch.dtype, impl: str | None = None
) -> bool:
    """Whether a product of so many rows, without gradients, is one for few rows: see FEW_ROWS."""
    return 0 < rows <= FEW_ROWS and select("lora_linear", device, dtype, impl) == "cpu"


def chunk_rows(device: torch.device, dtype: torch.dtype, rows: int, classes: int) -> int:
    """How many of a head's `rows` of logits are held at a time."""
    request = Request.on(device, "linear_cross_entropy", dtype, Head(rows, classes))
    plan = choose(request, present()).plan
    assert isinstance(plan, int)
    return plan


@cache
def launch_parameters(
    kernel: str, capability: int | None, dtype: torch.dtype, size: int
) -> dict[str, Any]:
    """The launch parameters of a Triton kernel, as keyword arguments of its launch."""
    device = "cpu" if capability is None else "cuda"
    request = Request(kernel, device, capability, dtype, Extent(size))
    key = choose(request, present()).launch
    assert key is not None
    return tables.launch_parameters(key)
