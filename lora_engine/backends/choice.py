"""Which implementation of an operation runs, how it is carried out, and why.

`choose` is a pure function of what is asked (`Request`) and of what the machine has (`Present`).
selection.py asks it for tensors of this machine.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch

from lora_engine.backends import hardware, tables
from lora_engine.errors import UnavailableError
from lora_engine.quantization.formats import NAMES

IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")

# Which kernels each operation has. On a GPU the first that can run is taken.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("cpu", "triton"),
    "layer_norm": ("cpu", "triton"),
    "rope": ("cpu", "triton"),
    "glu": ("cpu", "triton"),
    "lora_linear": ("cpu", "triton"),
    "linear_cross_entropy": ("cpu", "triton"),
    "cross_entropy": ("cpu", "triton"),
    "attention": ("cpu", "triton"),
    "attention_decode": ("cpu", "triton"),
    "adamw": ("cpu", "triton", "cuda"),
    "adamw_8bit": ("cpu", "triton", "cuda"),
    "blockwise_4bit": ("cpu", "triton", "cuda"),
}
# Kernels that do in one pass what several operations do. Where there are none, or `choose` does not
# plan it, the operations run one after the other.
PASSES: dict[str, tuple[str, ...]] = {"glu_lora": ("triton",)}
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
# How a base weight may be stored that an implementation's products read.
FORMATS = {
    "cpu": ("dense", *NAMES),
    "triton": ("dense", *NAMES),
}

# How the wide products of a LoRA group are taken.
# augmented    one product of the vendor library over [X | S] (in the backward pass [dY | dS]) and
#              the base weight lent with the factors; see ops/lora/product.py
# two_segment  our kernel: one accumulator over two stretches of the inner dimension, the second
#              masked where there is dropout
# base_add     the base product, then each linear's share masked and added
STRATEGIES = ("augmented", "two_segment", "base_add")

# Bytes of a chunk's logits. A CPU wants them near its cache. A GPU reads the whole head for every
# chunk, twice, and writes and reads the chunk besides. Measured on an H100, 8192 rows of 4096 with
# 128256 classes, bfloat16, forward and backward: 24.4 ms with 256 MiB, 24.6 with 128, 25.2 with 512
# and with 2048.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
CHUNK_ROW_STEP = 64

# Rows of a packed weight that a CPU decodes at a time, where a product takes the weight in pieces.
# A GPU decodes all: a piece's product would leave most of it idle.
DECODED_ROWS = 1024

# Rows of a product without gradients up to which a kernel of our own reads weight and adapters
# once, where they are: the vendor's product packs the weight at every call.
FEW_ROWS = 16


# Ranks of a linear up to which the pass of a gated activation makes its neighbours' thin products
# too: their sums stay in registers. 0: it never does.
FORWARD_PASS_RANKS = 16
BACKWARD_PASS_RANKS = 16
# Its rows are of whole vectors, of what Triton finds aligned.
ALIGNED_COLUMNS = 16

# Head sizes up to which the Triton kernels of attention fit a program's registers; of float32 and
# of other dtypes.
WIDEST_HEADS = {torch.float32: 128}
WIDEST_HEAD = 256

# Head sizes [least, most] that PyTorch's FlashAttention takes on GPUs of a capability, or of any
# other (None), before our kernels.
FLASH_HEADS: dict[int | None, tuple[int, int]] = {None: (0, 0)}
FLASH_DTYPES = (torch.bfloat16, torch.float16)
# The same of cuDNN's attention, for sequences of one length: a multiple of CUDNN_LENGTH, since
# every new length has to be planned. Measured on an H100, bfloat16, 32 heads of 128 and 8 of keys,
# forward and backward: 4 sequences of 2048 tokens 1.20 ms, ours 2.06, FlashAttention 1.99; one of
# 8192 3.56, ours 7.34, FlashAttention 6.52. Heads of 64: 0.80, ours 1.28, FlashAttention 1.15.
CUDNN_HEADS: dict[int | None, tuple[int, int]] = {90: (64, 128), None: (0, 0)}
CUDNN_LENGTH = 128
# Head sizes at which our kernels in CUDA C++ for 9.0 alone run, the two that they know. Measured on
# an H200, bfloat16, causal, 32 heads of 128 and 8 of keys, in µs for both passes: 8 sequences of
# 1024 tokens 689, cuDNN 734; one of 8192 3255, cuDNN 3511; four of unequal lengths 1238, Triton
# 2134. Heads of 64: 419, cuDNN 494; 1860, cuDNN 2306; 736, Triton 1317.
HOPPER_HEADS: tuple[int, ...] = (64, 128)
HOPPER, HOPPER_BUILD = 90, "90a"


class Product(NamedTuple):
    """A product Y [m, n] = X [m, k] Wᵀ with r adapter columns, or dX of the same kind.

    dropout: the product itself is masked: that of dX with p > 0. The forward product never is,
        since there only S changes.
    augmentable: the base weight can be lent together with the adapters' factors, as one operand.
    """

    m: int
    n: int
    k: int
    r: int
    dropout: bool = False
    augmentable: bool = True


class Forward(NamedTuple):
    """A product of so many rows that no gradient follows."""

    rows: int


class Head(NamedTuple):
    """A linear head: so many rows of so many logits."""

    rows: int
    classes: int


class Packed(NamedTuple):
    """A packed weight of so many rows, which a product takes in pieces."""

    rows: int


class Queries(NamedTuple):
    """Attention of new tokens, so many in each sequence, with all keys of a cache."""

    queries: int
    dropout: bool


class Activation(NamedTuple):
    """A gated activation of so many columns between adapted linears, in a pass of that kind.

    rank: the largest of a linear whose thin product could be made of the pass's results.
    apart: something else has to happen to them first: dropout, or DoRA's scale.
    """

    cols: int
    rank: int
    backward: bool
    apart: bool


class Heads(NamedTuple):
    """Attention within packed sequences, with heads of this size.

    length: of all sequences alike, where the host knows it; else 0.
    repeatable: whether two runs have to give the same bits.
    """

    head_dim: int
    parents: bool = False
    window: bool = False
    length: int = 0
    repeatable: bool = False


class Extent(NamedTuple):
    """What the launch of a Triton kernel is chosen by; what `size` is, its launcher says."""

    size: int


Sizes: TypeAlias = Product | Forward | Head | Packed | Queries | Activation | Heads | Extent


@dataclass(frozen=True)
class Request:
    """What is to be computed, and on what.

    operation: of OPERATIONS or BLOCKS; with an Extent a kernel of launch_table.json.
    device: a torch device's type. capability: of a GPU. dtype: of the operands.
    sizes: where more than the implementation is asked for.
    format: how the base weight of a `lora_linear`, alone or in a block, is stored.
    impl: the implementation that a caller forces.
    """

    operation: str
    device: str
    capability: int | None
    dtype: torch.dtype
    sizes: Sizes | None = None
    format: str = "dense"
    impl: str | None = None

    @staticmethod
    def on(
        device: torch.device,
        operation: str,
        dtype: torch.dtype,
        sizes: Sizes | None = None,
        impl: str | None = None,
        format: str = "dense",
    ) -> "Request":
        """A request for tensors on `device`, which need not be here."""
        absent = device.type == "cuda" and not torch.cuda.is_available()
        capability = None if absent else hardware.capability(device)
        return Request(operation, device.type, capability, dtype, sizes, format, impl)


@dataclass(frozen=True)
class Present:
    """What the machine has.

    isa: the instruction set of the C++ kernels; None: they cannot run. problem: why, if so.
    triton, interpreted: whether it is installed, and interprets its kernels in this process.
    architectures: that the CUDA kernels were built for. emulated: they take CPU tensors.
    gpu: whether torch finds a CUDA device. flash: whether it has FlashAttention.
    cudnn: whether PyTorch has cuDNN's attention.
    """

    isa: str | None
    problem: str | None
    triton: bool
    interpreted: bool
    architectures: tuple[str, ...]
    emulated: bool
    gpu: bool
    flash: bool = False
    cudnn: bool = False


class Strategy(NamedTuple):
    """How it is carried out, and why.

    Of a Product one of STRATEGIES; of a Forward "few_rows" or "many_rows"; of Queries "one_query"
    or "sdpa", PyTorch's; of an Activation "one_pass" or "one_by_one"; of Heads "tiles", the
    implementation's own, "hopper", in CUDA C++ for 9.0 alone, "flash" or "cudnn", PyTorch's.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """What runs.

    impl: the implementation. reason: why that, and why not another one.
    plan: for a Product, a Forward, Queries, an Activation or Heads the strategy; for a Head the
        rows of logits that are held at a time, of a Packed the rows that are decoded at a time.
    launch: for an Extent the line of launch_table.json.
    """

    operation: str
    impl: str
    reason: str
    plan: Strategy | int | None = None
    launch: tables.LaunchKey | None = None


def choose(request: Request, present: Present) -> Choice:
    """What runs where the machine has what `present` says.

    Raises UnavailableError where a forced implementation cannot run, ValueError for names that do
    not exist and sizes that no line of a table fits. Nothing but force chooses Triton's
    interpreter.
    """
    operation, sizes = request.operation, request.sizes
    if isinstance(sizes, Extent):
        dtype = _name(request.dtype)
        key = tables.launch_key(operation, request.capability, dtype, sizes.size)
        return Choice(operation, "triton", f"the line {tuple(key)} of its launch table", launch=key)
    if operation in BLOCKS:
        return _choose_block(request, present)
    choice = _choose_implementation(request, present)
    if isinstance(sizes, Product):
        return replace(choice, plan=_strategy(request, sizes))
    if isinstance(sizes, Forward):
        return replace(choice, plan=_by_rows(choice, sizes))
    if isinstance(sizes, Queries):
        return replace(choice, plan=_by_queries(request, sizes))
    if isinstance(sizes, Activation):
        return replace(choice, plan=_by_ranks(choice, sizes))
    if isinstance(sizes, Heads):
        return replace(choice, plan=_by_heads(request, present, sizes))
    if isinstance(sizes, Packed):
        most = DECODED_ROWS if request.device == "cpu" else sizes.rows
        return replace(choice, plan=max(1, min(most, sizes.rows)))
    if isinstance(sizes, Head):
        return replace(choice, plan=_chunk_rows(request, sizes))
    return choice


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
    if request.dtype not in DTYPES[impl]:
        names = ", ".join(map(_name, DTYPES[impl]))
        return f"the {impl} kernels take {names}, not {request.dtype}"
    if request.operation == "lora_linear" and request.format not in FORMATS[impl]:
        known = ", ".join(FORMATS[impl])
        return f"the {impl} kernels take weights that are {known}, not {request.format}"
    if impl == "triton" and isinstance(request.sizes, Heads):
        most = WIDEST_HEADS.get(request.dtype, WIDEST_HEAD)
        if request.operation == "attention" and request.sizes.head_dim > most:
            return f"the {impl} kernels take heads of up to {most} in {_name(request.dtype)}"
    elsewhere = f"the tensors are on {request.device}"
    if impl == "cpu":
        return present.problem if request.device == "cpu" else elsewhere
    if impl == "triton" and not present.triton:
        return "triton is not installed"
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


def _strategy(request: Request, product: Product) -> Strategy:
    values = {
        "device": request.device,
        "capability": request.capability,
        "format": request.format,
        **product._asdict(),
    }
    rule = tables.find_rule(values, _name(request.dtype))
    if rule is None:
        raise ValueError(f"lora_strategy: no rule fits a {request.device} device")
    return Strategy(rule["strategy"], rule["reason"])


def _by_rows(choice: Choice, sizes: Forward) -> Strategy:
    if choice.impl == "cpu" and 0 < sizes.rows <= FEW_ROWS:
        return Strategy("few_rows", "the weight is read once, where it is")
    return Strategy("many_rows", f"not the C++ kernel of up to {FEW_ROWS} rows")


def _by_queries(request: Request, sizes: Queries) -> Strategy:
    if request.device == "cpu" and sizes.queries == 1 and not sizes.dropout:
        return Strategy("one_query", "PyTorch's kernel for a CPU takes five times as long for one")
    return Strategy("sdpa", "PyTorch's kernels")


def _by_ranks(choice: Choice, sizes: Activation) -> Strategy:
    most = BACKWARD_PASS_RANKS if sizes.backward else FORWARD_PASS_RANKS
    if choice.impl not in PASSES["glu_lora"]:
        reason = f"there is no {choice.impl} kernel of one pass"
    elif sizes.apart:
        reason = "dropout or DoRA comes between the pass and the products"
    elif not 0 < sizes.rank <= most:
        reason = f"the sums of 1 to {most} ranks fit the registers, not those of {sizes.rank}"
    elif sizes.cols % ALIGNED_COLUMNS:
        reason = f"rows of {sizes.cols} columns are not aligned"
    else:
        return Strategy("one_pass", "the products' operands are not read again")
    return Strategy("one_by_one", reason)


def _by_heads(request: Request, present: Present, sizes: Heads) -> Strategy:
    own = "the implementation's own kernels: "
    if request.device != "cuda" or request.impl is not None:
        return Strategy("tiles", own + "there are no others")
    if sizes.parents or sizes.head_dim % 8 or request.dtype not in FLASH_DTYPES:
        return Strategy("tiles", own + "the others do not take the case")
    if sizes.repeatable:
        return Strategy("tiles", own + "the others do not give the same bits twice")

    def is_faster(table: dict[int | None, tuple[int, int]]) -> bool:
        least, most = table.get(request.capability, table[None])
        return least <= sizes.head_dim <= most

    built = request.capability == HOPPER and HOPPER_BUILD in present.architectures
    if built and sizes.head_dim in HOPPER_HEADS and not sizes.window:
        return Strategy(
            "hopper", "CUDA C++ kernels for capability 9.0 are faster at this head size"
        )
    alike = sizes.length > 0 and sizes.length % CUDNN_LENGTH == 0 and not sizes.window
    if present.cudnn and alike and is_faster(CUDNN_HEADS):
        return Strategy("cudnn", "cuDNN's attention is faster where all sequences are alike")
    if not present.flash:
        return Strategy("tiles", own + "this PyTorch has no FlashAttention")
    if not is_faster(FLASH_HEADS):
        return Strategy("tiles", own + "FlashAttention is not faster at this head size")
    return Strategy("flash", "PyTorch's FlashAttention is faster at this head size")


def _chunk_rows(request: Request, head: Head) -> int:
    """Rows of a chunk of logits: chunks of equal size, within the bytes for this device."""
    limit = CHUNK_BYTES["cpu" if request.device == "cpu" else "cuda"]
    most = max(1, limit // max(1, head.classes * request.dtype.itemsize))
    even = -(-head.rows // max(1, -(-head.rows // most)))
    return max(1, min(most, -(-even // CHUNK_ROW_STEP) * CHUNK_ROW_STEP))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
