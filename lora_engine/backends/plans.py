"""How a chosen implementation carries an operation out, by sizes, and the limits it goes by."""

from typing import NamedTuple, TypeAlias

import torch

from lora_engine.backends import tables
from lora_engine.backends.request import (
    Activation,
    Decoding,
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
    Update,
)

# Kernels that do in one pass what several operations do. Where there are none, or they are not
# planned, the operations run one after the other.
PASSES: dict[str, tuple[str, ...]] = {"glu_lora": ("triton",), "few_rows": ("cpu",)}

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
# once, where they are: the vendor's product packs the weight at every call. The second: on a matrix
# unit, in what it multiplies.
FEW_ROWS = 32
UNIT_FEW_ROWS = 64

# Texts that a model goes on with at once.
TEXTS_AT_ONCE = {"cpu": 32, "cuda": 128}
# Tokens of a prompt up to which passes of few rows read it faster than one packed sequence.
PROMPT_BY_ROWS = 64
# Tokens of longer prompts that are read in one pass, on a matrix unit: what a pass costs beside its
# products is little then, and its temporary tensors are small.
PROMPT_TOKENS = 4096

# Values that temporary tensors of an optimiser's update hold: in a CPU's cache; of a GPU, as many
# as a launch is worth.
UPDATED_VALUES = {"cpu": 2**18, "cuda": 2**24}

# Instruction sets with a matrix unit, and what it multiplies: products of large matrices are a
# kernel of our own there. PyTorch's compiles one for every number of rows that it has not seen,
# which takes up to 70 ms, and packed batches differ in theirs.
MATRIX_UNITS = {"amx_bf16": (torch.bfloat16,)}

# Ranks of a linear up to which the pass of a gated activation makes its neighbours' thin products
# too: their sums stay in registers. 0: it never does.
FORWARD_PASS_RANKS = 16
BACKWARD_PASS_RANKS = 16
# Its rows are of whole vectors, of what Triton finds aligned.
ALIGNED_COLUMNS = 16

# What other attentions than an implementation's own take.
HALF_DTYPES = (torch.bfloat16, torch.float16)
# Head sizes [least, most] that cuDNN's attention takes on GPUs of a capability before our kernels,
# for sequences of one length: a multiple of CUDNN_LENGTH, since every new length has to be planned.
# Measured on an H100, bfloat16, 32 heads of 128 and 8 of keys, forward and backward: 4 sequences of
# 2048 tokens 1.20 ms, ours 2.06; one of 8192 3.56, ours 7.34. Heads of 64: 0.80, ours 1.28.
CUDNN_HEADS: dict[int, tuple[int, int]] = {90: (64, 128)}
CUDNN_LENGTH = 128
# Head sizes at which our kernels in CUDA C++ for 9.0 alone run, the two that they know. Measured on
# an H200, bfloat16, causal, 32 heads of 128 and 8 of keys, in µs for both passes: 8 sequences of
# 1024 tokens 689, cuDNN 734; one of 8192 3255, cuDNN 3511; four of unequal lengths 1238, Triton
# 2134. Heads of 64: 419, cuDNN 494; 1860, cuDNN 2306; 736, Triton 1317.
HOPPER_HEADS: tuple[int, ...] = (64, 128)
HOPPER, HOPPER_BUILD = 90, "90a"


class Strategy(NamedTuple):
    """How it is carried out, and why.

    Of a Product one of STRATEGIES; of a Forward "few_rows" or "many_rows"; of a Matmul "tiles" or
    "vendor", PyTorch's; of Queries "one_query"
    or "sdpa", PyTorch's; of an Activation "one_pass" or "one_by_one"; of Heads "tiles", the
    implementation's own, "hopper", in CUDA C++ for 9.0 alone, or "cudnn", PyTorch's.
    """

    name: str
    reason: str


class DecodingPlan(NamedTuple):
    """How a model goes on with texts.

    texts: the most at once. rows: of a pass of prepared calls; 0: there are none.
    prompt_by_rows: tokens of a prompt up to which such passes read it.
    prompt_tokens: the most tokens of longer prompts that are read in one pass, each row's sums
    being the same beside any others; 0: such a prompt is read by itself.
    """

    texts: int
    rows: int
    prompt_by_rows: int
    prompt_tokens: int


class FactorsPlan(NamedTuple):
    """How the gradients of factors are made.

    adds: the backward pass adds them to totals of float32, at no launch of its own, where it is
    given such. scales_rows: behind a norm, dA is made of dS / rms(x) and x, else of dS and the
    norm, made again.
    """

    adds: bool
    scales_rows: bool


Plan: TypeAlias = Strategy | DecodingPlan | FactorsPlan | int


def plan(request: Request, present: Present, impl: str) -> Plan | None:
    """How `impl` does what is asked; None where only the implementation is.

    Raises ValueError where no rule of lora_strategy.json fits.
    """
    sizes = request.sizes
    if isinstance(sizes, Product):
        return _product(request, sizes)
    if isinstance(sizes, Forward):
        return _forward(impl, request, present, sizes)
    if isinstance(sizes, Factors):
        return _factors(request)
    if isinstance(sizes, Matmul):
        return _matmul(request, present)
    if isinstance(sizes, Queries):
        return _queries(request, sizes)
    if isinstance(sizes, Activation):
        return _activation(impl, sizes)
    if isinstance(sizes, Decoding):
        return _decoding(impl, request, present)
    if isinstance(sizes, Update):
        return UPDATED_VALUES[_kind(request)]
    if isinstance(sizes, Heads):
        return _heads(request, present, sizes)
    if isinstance(sizes, Packed):
        return _decoded_rows(request, sizes)
    if isinstance(sizes, Head):
        return _chunk_rows(request, sizes)
    return None


def _product(request: Request, product: Product) -> Strategy:
    values = {
        "device": request.device,
        "capability": request.capability,
        "format": request.format,
        **product._asdict(),
    }
    rule = tables.find_rule(values, request.dtype_name)
    if rule is None:
        raise ValueError(f"lora_strategy: no rule fits a {request.device} device")
    return Strategy(rule["strategy"], rule["reason"])


def _forward(impl: str, request: Request, present: Present, sizes: Forward) -> Strategy:
    most = _few_rows(request, present)
    if impl not in PASSES["few_rows"]:
        return Strategy("many_rows", f"there is no {impl} kernel of few rows")
    if not 0 < sizes.rows <= most:
        return Strategy("many_rows", f"not the kernel of up to {most} rows")
    return Strategy("few_rows", "the weight is read once, where it is")


def _few_rows(request: Request, present: Present) -> int:
    return UNIT_FEW_ROWS if _has_unit(request, present) else FEW_ROWS


def _decoding(impl: str, request: Request, present: Present) -> DecodingPlan:
    texts = TEXTS_AT_ONCE[_kind(request)]
    if impl not in PASSES["few_rows"]:
        return DecodingPlan(texts=texts, rows=0, prompt_by_rows=0, prompt_tokens=0)
    tokens = PROMPT_TOKENS if _has_unit(request, present) else 0
    return DecodingPlan(
        texts=texts,
        rows=_few_rows(request, present),
        prompt_by_rows=PROMPT_BY_ROWS,
        prompt_tokens=tokens,
    )


def _factors(request: Request) -> FactorsPlan:
    # Gradients of double precision are not for totals of single precision.
    adds = request.device == "cpu" and request.dtype != torch.float64
    # dS / rms(x) may be too small for float16.
    return FactorsPlan(adds=adds, scales_rows=request.dtype != torch.float16)


def _kind(request: Request) -> str:
    return "cpu" if request.device == "cpu" else "cuda"


def _matmul(request: Request, present: Present) -> Strategy:
    if not _has_unit(request, present):
        return Strategy("vendor", "there is no matrix unit that a kernel of ours runs on")
    return Strategy("tiles", f"C++ kernel, {present.isa}: nothing is compiled for a new size")


def _has_unit(request: Request, present: Present) -> bool:
    unit = MATRIX_UNITS.get(present.isa or "", ())
    return request.device == "cpu" and request.dtype in unit


def _queries(request: Request, sizes: Queries) -> Strategy:
    if request.device == "cpu" and sizes.queries == 1 and not sizes.dropout:
        return Strategy("one_query", "PyTorch's kernel for a CPU takes five times as long for one")
    return Strategy("sdpa", "PyTorch's kernels")


def _activation(impl: str, sizes: Activation) -> Strategy:
    most = BACKWARD_PASS_RANKS if sizes.backward else FORWARD_PASS_RANKS
    if impl not in PASSES["glu_lora"]:
        reason = f"there is no {impl} kernel of one pass"
    elif sizes.apart:
        reason = "dropout or DoRA comes between the pass and the products"
    elif not 0 < sizes.rank <= most:
        reason = f"the sums of 1 to {most} ranks fit the registers, not those of {sizes.rank}"
    elif sizes.cols % ALIGNED_COLUMNS:
        reason = f"rows of {sizes.cols} columns are not aligned"
    else:
        return Strategy("one_pass", "the products' operands are not read again")
    return Strategy("one_by_one", reason)


def _heads(request: Request, present: Present, sizes: Heads) -> Strategy:
    own = "the implementation's own kernels: "
    if request.device != "cuda" or request.impl is not None:
        return Strategy("tiles", own + "there are no others")
    if sizes.parents or sizes.head_dim % 8 or request.dtype not in HALF_DTYPES:
        return Strategy("tiles", own + "the others do not take the case")
    if sizes.repeatable:
        return Strategy("tiles", own + "the others do not give the same bits twice")

    built = request.capability == HOPPER and HOPPER_BUILD in present.architectures
    if built and sizes.head_dim in HOPPER_HEADS and not sizes.window:
        return Strategy(
            "hopper", "CUDA C++ kernels for capability 9.0 are faster at this head size"
        )
    alike = sizes.length > 0 and sizes.length % CUDNN_LENGTH == 0 and not sizes.window
    if not (present.cudnn and alike and request.capability in CUDNN_HEADS):
        return Strategy("tiles", own + "the others do not take the case")
    least, most = CUDNN_HEADS[request.capability]
    if not least <= sizes.head_dim <= most:
        return Strategy("tiles", own + "cuDNN's attention is not faster at this head size")
    return Strategy("cudnn", "cuDNN's attention is faster where all sequences are alike")


def _decoded_rows(request: Request, weight: Packed) -> int:
    most = DECODED_ROWS if request.device == "cpu" else weight.rows
    return max(1, min(most, weight.rows))


def _chunk_rows(request: Request, head: Head) -> int:
    """Rows of a chunk of logits: chunks of equal size, within the bytes for this device."""
    limit = CHUNK_BYTES[_kind(request)]
    most = max(1, limit // max(1, head.classes * request.dtype.itemsize))
    even = -(-head.rows // max(1, -(-head.rows // most)))
    return max(1, min(most, -(-even // CHUNK_ROW_STEP) * CHUNK_ROW_STEP))
