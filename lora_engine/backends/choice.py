"""Which implementation of an operation runs, how it is carried out, and why.

`choose` is a pure function of what is asked and of what the machine has (request.py); how the
implementation goes about it is in plans.py. selection.py asks for tensors of this machine.
"""

from dataclasses import dataclass, replace

import torch

from lora_engine.backends import hardware, tables
from lora_engine.backends.plans import Plan, plan
from lora_engine.backends.request import Extent, Heads, Present, Request, dtype_name
from lora_engine.errors import UnavailableError
from lora_engine.quantization.formats import NAMES

IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")

# Which kernels each operation has. On a GPU CUDA C++ is taken before Triton where both can run, but
# for FORCED_ONLY.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("cpu", "triton"),
    "layer_norm": ("cpu", "triton"),
    "rope": ("cpu", "triton"),
    "glu": ("cpu", "triton"),
    "lora_linear": ("cpu", "triton"),
    "linear_cross_entropy": ("cpu", "triton"),
    "cross_entropy": ("cpu", "triton"),
    "attention": ("cpu", "triton", "cuda"),
    "attention_decode": ("cpu", "triton"),
    "adamw": ("cpu", "triton", "cuda"),
    "adamw_8bit": ("cpu", "triton", "cuda"),
    "blockwise_4bit": ("cpu", "triton", "cuda"),
    "packed_weight": ("cpu",),
    "k_quants": ("cpu",),
}
# Those that run where a caller forces them: no GPU has shown them faster.
FORCED_ONLY = (("attention", "cuda"),)
# Functions made of several operations: they run where all of these have kernels.
BLOCKS: dict[str, tuple[str, ...]] = {
    "attention_block": ("rms_norm", "attention", "lora_linear"),
    "mlp_block": ("rms_norm", "glu", "lora_linear"),
    "decode_stack": ("rms_norm", "attention_decode", "glu", "lora_linear"),
}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
# Where an operation's kernels take less.
FEWER_DTYPES = {("attention", "cuda"): (torch.bfloat16, torch.float16)}
# How a base weight may be stored that an implementation's products read.
FORMATS = {
    "cpu": ("dense", *NAMES),
    "triton": ("dense", *NAMES),
}

# Head sizes up to which the Triton kernels of attention fit a program's registers; of float32 and
# of other dtypes.
WIDEST_HEADS = {torch.float32: 128}
WIDEST_HEAD = 256
# Of those in CUDA C++, whose heads are a multiple of HEAD_STEP.
WIDEST_CUDA_HEAD, HEAD_STEP = 128, 8


@dataclass(frozen=True)
class Choice:
    """What runs.

    impl: the implementation. reason: why that, and why not another one.
    plan: for a Product, a Forward, a Matmul, Queries, an Activation or Heads the strategy; for a
        Head the rows of logits that are held at a time, of a Packed those decoded at a time; for
        Decoding a DecodingPlan; for Factors a FactorsPlan; for an Update the values that a
        temporary tensor holds.
    launch: for an Extent the line of launch_table.json.
    """

    operation: str
    impl: str
    reason: str
    plan: Plan | None = None
    launch: tables.LaunchKey | None = None


def choose(request: Request, present: Present) -> Choice:
    """What runs where the machine has what `present` says.

    Raises UnavailableError where a forced implementation cannot run, ValueError for names that do
    not exist and sizes that no line of a table fits. Nothing but force chooses Triton's
    interpreter.
    """
    operation, sizes = request.operation, request.sizes
    if isinstance(sizes, Extent):
        dtype = request.dtype_name
        key = tables.launch_key(operation, request.capability, dtype, sizes.size)
        return Choice(operation, "triton", f"the line {tuple(key)} of its launch table", launch=key)
    if operation in BLOCKS:
        return _choose_block(request, present)
    choice = _choose_implementation(request, present)
    return replace(choice, plan=plan(request, present, choice.impl))


def _choose_implementation(request: Request, present: Present) -> Choice:
    operation, impl = request.operation, request.impl
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation!r}: expected one of {', '.join(OPERATIONS)}")
    if impl == "reference":
        return Choice(operation, "reference", "asked for")
    if impl is not None:
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
        problem = _why_not(request, impl, present)
        if problem is not None:
            raise UnavailableError(f"{operation}: impl={impl!r} is not available: {problem}")
        return Choice(operation, impl, _how(request, impl, present))
    problems = []
    for candidate in ("cpu",) if request.device == "cpu" else ("cuda", "triton"):
        if (operation, candidate) in FORCED_ONLY:
            continue
        problem = _why_not(request, candidate, present)
        if problem is None:
            return Choice(operation, candidate, _how(request, candidate, present))
        problems.append(problem)
    return Choice(operation, "reference", problems[-1])


def _choose_block(request: Request, present: Present) -> Choice:
    """A block's parts are chosen each by itself; it has no reference."""
    name = request.operation
    parts = [
        _choose_implementation(replace(request, operation=part), present) for part in BLOCKS[name]
    ]
    for part in parts:
        if part.impl == "reference":
            return Choice(name, "reference", f"{part.operation}: {part.reason}")
    return replace(parts[-1], operation=name)


def dtypes_of(operation: str, impl: str) -> tuple[torch.dtype, ...]:
    """What an implementation's kernels of an operation take; nothing where there are none."""
    return FEWER_DTYPES.get((operation, impl), DTYPES.get(impl, ()))


def _how(request: Request, impl: str, present: Present) -> str:
    if impl == "cpu":
        return f"C++ kernel, {present.isa}"
    if request.device == "cpu":
        return "Triton kernel, interpreted" if impl == "triton" else "CUDA C++ kernel, emulated"
    name = "CUDA C++" if impl == "cuda" else "Triton"
    assert request.capability is not None
    return f"{name} kernel, capability {hardware.capability_text(request.capability)}"


def _why_not(request: Request, impl: str, present: Present) -> str | None:
    """Why `impl` cannot run the operation; None if it can."""
    if impl not in OPERATIONS[request.operation]:
        return f"there is no {impl} kernel for it"
    known_dtypes = dtypes_of(request.operation, impl)
    if request.dtype not in known_dtypes:
        names = ", ".join(map(dtype_name, known_dtypes))
        return f"the {impl} kernels take {names}, not {request.dtype}"
    if request.operation == "lora_linear" and request.format not in FORMATS[impl]:
        known = ", ".join(FORMATS[impl])
        return f"the {impl} kernels take weights that are {known}, not {request.format}"
    if request.operation == "attention" and isinstance(request.sizes, Heads):
        problem = _why_not_heads(request, impl, request.sizes.head_dim)
        if problem is not None:
            return problem
    elsewhere = f"the tensors are on {request.device}"
    if impl == "cpu":
        return present.problem if request.device == "cpu" else elsewhere
    if impl == "triton" and not present.triton:
        return "triton is not installed"
    if (request.operation, impl) == ("attention", "cuda") and not present.triton:
        return "triton, which rotates for the cuda kernels, is not installed"
    if impl == "triton" and request.device == "cpu" and present.interpreted:
        return None
    if impl == "cuda" and request.device == "cpu" and present.emulated:
        return None
    if impl == "cuda" and not present.architectures:
        return present.problem or "the extension was built without nvcc"
    if request.device != "cuda":
        return elsewhere
    if not present.gpu or request.capability is None:
        return "torch finds no CUDA device"
    own = hardware.capability_text(request.capability)
    if request.capability < hardware.OLDEST_CAPABILITY:
        least = hardware.capability_text(hardware.OLDEST_CAPABILITY)
        return f"the GPU has capability {own}, the kernels need {least}"
    if impl == "cuda" and not any(
        hardware.runs_on(a, request.capability) for a in present.architectures
    ):
        return f"built for {', '.join(present.architectures)}, the GPU has capability {own}"
    return None


def _why_not_heads(request: Request, impl: str, head_dim: int) -> str | None:
    """Why `impl` has no attention with heads of this size; None if it has."""
    if impl == "triton":
        most = WIDEST_HEADS.get(request.dtype, WIDEST_HEAD)
        if head_dim > most:
            return f"the triton kernels take heads of up to {most} in {request.dtype_name}"
    if impl == "cuda" and (head_dim > WIDEST_CUDA_HEAD or head_dim % HEAD_STEP):
        return (
            f"the cuda kernels take heads of up to {WIDEST_CUDA_HEAD}, multiples of {HEAD_STEP}, "
            f"not {head_dim}"
        )
    return None
