"""What runs on this machine: `choice.choose`, asked with what is present here, and kept."""

import warnings
from functools import cache, lru_cache
from types import ModuleType

import torch

from lora_engine.backends import devices, extension, hardware, tables
from lora_engine.backends.choice import Choice, choose
from lora_engine.backends.extension import Extension
from lora_engine.backends.plans import DecodingPlan, FactorsPlan, Strategy
from lora_engine.backends.request import (
    Activation,
    Decoding,
    Extent,
    Factors,
    Forward,
    Head,
    Heads,
    Matmul,
    Packed,
    Present,
    Product,
    Queries,
    Request,
    Sizes,
    Update,
)
from lora_engine.errors import EngineWarning, UserError


def present() -> Present:
    """What this machine has."""
    built = extension.loaded()
    return Present(
        isa=None if built.module is None else built.module.isa(),
        problem=built.problem,
        triton=hardware.triton_installed(),
        interpreted=hardware.triton_interpreted(),
        architectures=extension.cuda_architectures(),
        emulated=extension.cuda_emulation is not None,
        gpu=devices.gpu_count() > 0,
        cudnn=hardware.has_cudnn_attention(),
    )


def explain(
    operation: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    impl: str | None = None,
    format: str = "dense",
) -> Choice:
    """Which implementation `operation` runs with on `device` and `dtype`, and why.

    `impl` forces one of IMPLEMENTATIONS; UnavailableError where it cannot run. `format`: of the
    base weight, where the operation has one. Raises TypeError for a dtype that is none of torch's.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}, expected a torch.dtype such as torch.bfloat16")
    request = Request.on(torch.device(device), operation, dtype, impl=impl, format=format)
    return choose(request, present())


def select(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    impl: str | None = None,
    format: str = "dense",
    sizes: Sizes | None = None,
) -> str:
    """What an operation calls: `explain`, with one warning where the reference is not by choice.

    Raises UserError for tensors on another GPU than the current one: Triton launches on that.
    """
    choice = _choose_here(operation, device, dtype, sizes, impl, format)
    if choice.impl == "triton" and not hardware.is_current(device):
        raise UserError(
            f"lora_engine.{operation}: the tensors are on {device}, which is not torch's current "
            f"device: call torch.cuda.set_device({device.index})"
        )
    if choice.impl == "reference" and impl is None:
        _warn_once(operation, choice.reason)
    return choice.impl


def runs_fused(
    block: str,
    device: torch.device,
    dtype: torch.dtype,
    format: str = "dense",
    sizes: Sizes | None = None,
) -> bool:
    """Whether all parts of a block of BLOCKS have kernels, with base weights of this format."""
    return _choose_here(block, device, dtype, sizes, None, format).impl != "reference"


def product_strategy(
    device: torch.device, dtype: torch.dtype, sizes: Product, format: str = "dense"
) -> str:
    """Which of STRATEGIES, for a base weight of this format."""
    return _strategy(_choose_here("lora_linear", device, dtype, sizes, None, format))


def few_rows_impl(
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    impl: str | None = None,
    format: str = "dense",
) -> str | None:
    """Whose kernel for few rows takes a product of so many, without gradients; None: nobody's.

    The answer is for `launchers.few_rows`.
    """
    choice = _choose_here("lora_linear", device, dtype, Forward(rows), impl, format)
    return choice.impl if _strategy(choice) == "few_rows" else None


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of large matrices are our kernel's; else they are PyTorch's."""
    return _strategy(_choose_here("lora_linear", device, dtype, Matmul())) == "tiles"


def takes_one_pass(
    sizes: Activation, device: torch.device, dtype: torch.dtype, impl: str | None = None
) -> bool:
    """Whether a gated activation's pass makes its neighbours' thin products (`launchers.glu_lora`).

    `impl`: as for the operation `glu`.
    """
    return _strategy(_choose_here("glu", device, dtype, sizes, impl)) == "one_pass"


def takes_one_query(
    queries: int, device: torch.device, dtype: torch.dtype, *, dropout: bool
) -> bool:
    """Whether attention of so many new tokens with a cache is that of one query on a CPU."""
    sizes = Queries(queries, dropout)
    return _strategy(_choose_here("attention", device, dtype, sizes)) == "one_query"


def attention_plan(
    device: torch.device, dtype: torch.dtype, heads: Heads, impl: str | None = None
) -> str:
    """What attention within packed sequences runs: "tiles", "hopper" or "cudnn"."""
    return _strategy(_choose_here("attention", device, dtype, heads, impl))


def chunk_rows(device: torch.device, dtype: torch.dtype, rows: int, classes: int) -> int:
    """How many of a head's `rows` of logits are held at a time."""
    plan = _choose_here("linear_cross_entropy", device, dtype, Head(rows, classes)).plan
    assert isinstance(plan, int)
    return plan


def decoded_rows(device: torch.device, dtype: torch.dtype, rows: int) -> int:
    """How many of a packed weight's `rows` are decoded at a time."""
    plan = _choose_here("blockwise_4bit", device, dtype, Packed(rows)).plan
    assert isinstance(plan, int)
    return plan


def decoding_plan(device: torch.device, dtype: torch.dtype) -> DecodingPlan:
    """How a model whose weights are of this dtype goes on with texts."""
    plan = _choose_here("lora_linear", device, dtype, Decoding()).plan
    assert isinstance(plan, DecodingPlan)
    return plan


def factors_plan(device: torch.device, dtype: torch.dtype) -> FactorsPlan:
    """How a LoRA group of this dtype makes the gradients of its factors."""
    plan = _choose_here("lora_linear", device, dtype, Factors()).plan
    assert isinstance(plan, FactorsPlan)
    return plan


def updated_values(device: torch.device) -> int:
    """How many values a temporary tensor of an optimiser's update holds."""
    plan = _choose_here("adamw", device, torch.float32, Update()).plan
    assert isinstance(plan, int)
    return plan


def _strategy(choice: Choice) -> str:
    assert isinstance(choice.plan, Strategy)
    return choice.plan.name


def _choose_here(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes | None = None,
    impl: str | None = None,
    format: str = "dense",
) -> Choice:
    """`choose` for operations, which ask at every call."""
    found = extension.loaded()
    isa = None if found.module is None else found.module.isa()
    here = found, isa, extension.cuda_emulation
    return _choose_once(operation, device, dtype, sizes, impl, format, *here)


@lru_cache(4096, typed=True)  # sizes of different types may be equal as tuples
def _choose_once(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes | None,
    impl: str | None,
    format: str,
    found: Extension,
    isa: str | None,  # select_isa changes it
    emulation: ModuleType | None,
) -> Choice:
    """What else the answer depends on stays the same in a process: Triton, torch, the GPUs."""
    return choose(Request.on(device, operation, dtype, sizes, impl, format), present())


@cache
def _warn_once(operation: str, reason: str) -> None:
    message = f"lora_engine.{operation} runs as the PyTorch reference: {reason}"
    warnings.warn(message, EngineWarning, stacklevel=4)


@cache
def launch_parameters(
    kernel: str, capability: int | None, dtype: torch.dtype, size: int
) -> dict[str, int]:
    """The launch parameters of a Triton kernel, as keyword arguments of its launch."""
    device = "cpu" if capability is None else "cuda"
    request = Request(
        operation=kernel, device=device, capability=capability, dtype=dtype, sizes=Extent(size)
    )
    key = choose(request, present()).launch
    assert key is not None
    return tables.launch_parameters(key)
