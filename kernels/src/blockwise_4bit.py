"""NF4 and FP4: blocks of 4-bit codes, one program for a tile of whole words of codes.

Products, sums and quotients are rounded one by one, as the format has them: no multiplication is
fused with an addition.
"""

import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor

from lora_engine.quantization.blockwise_4bit import TINY
from lora_engine.quantization.format import BlockScales
from lora_engine.quantization.nested_absmax import NESTED_BLOCK


@triton.jit
def _scales(
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    block,
    mask,
    NESTED_BLOCK: tl.constexpr,
):
    """The scales of blocks; with double quantisation, what their own codes stand for."""
    scale = tl.load(absmax_ptr + block, mask=mask, other=0)
    if nested_absmax_ptr is not None:
        nested = tl.load(nested_absmax_ptr + block // NESTED_BLOCK, mask=mask, other=0.0)
        scale = tl.load(nested_code_ptr + scale.to(tl.int32)) * nested + tl.load(offset_ptr)
    return scale


@triton.jit
def _looked_up(table, places, SIZE: tl.constexpr):
    """table[places] of places [.., .., ..], SIZE of them: from shared memory, free of conflicts."""
    return tl.gather(table, places.reshape([SIZE]), 0).reshape(places.shape)


@Relaunched
@triton.jit
def _dequantize_4bit_kernel(
    codes_ptr,  # [values / 2]
    absmax_ptr,  # [blocks]
    nested_absmax_ptr,  # [blocks / NESTED_BLOCK] or None
    nested_code_ptr,  # [256] or None
    offset_ptr,  # [] or None
    values_ptr,  # [16]
    w_ptr,  # [rows, cols]
    rows,
    groups,  # cols / GROUP
    stride,  # in groups
    first,  # w[0, 0] is this group of the weight's
    QUANT_BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """w = values[code] * scale. A group is GROUP values, in one word of codes and one block."""
    chunks = tl.cdiv(groups, BLOCK_N)
    row = (tl.program_id(0) // chunks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    col = (tl.program_id(0) % chunks * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (row < rows) & (col < groups)
    group = first + row * groups + col
    place = tl.arange(0, GROUP)[None, None, :]
    if GROUP == 1:
        words = tl.load(codes_ptr + group // 2, mask=mask, other=0).to(tl.int32)
        shift = ((group & 1 ^ 1) * 4).to(tl.int32)[:, :, None]
    else:
        word: tl.constexpr = tl.int32 if GROUP == 8 else tl.int16
        words_ptr = codes_ptr.to(tl.pointer_type(word))
        words = tl.load(words_ptr + group, mask=mask, other=0).to(tl.int32)
        shift = (place ^ 1) * 4  # the first of two codes is the upper half of their byte
    codes = words[:, :, None] >> shift & 15
    scale = _scales(
        absmax_ptr,
        nested_absmax_ptr,
        nested_code_ptr,
        offset_ptr,
        group * GROUP // QUANT_BLOCK,
        mask,
        NESTED_BLOCK,
    )
    values = tl.load(values_ptr + tl.arange(0, 16))
    w = _looked_up(values, codes, BLOCK_M * BLOCK_N * GROUP) * scale[:, :, None]
    w_ptrs = w_ptr + row[:, :, None] * (stride * GROUP) + col[:, :, None] * GROUP + place
    tl.store(w_ptrs, w.to(w_ptr.dtype.element_ty), mask=mask[:, :, None])


@triton.jit
def _places(x, bounds_ptr, SIZE: tl.constexpr):
    """How many of 15 ascending bounds are below x: by halves, a comparison for each bit."""
    upper = x > tl.load(bounds_ptr + 7)
    quarter = x > tl.where(upper, tl.load(bounds_ptr + 11), tl.load(bounds_ptr + 3))
    low = tl.where(quarter, tl.load(bounds_ptr + 5), tl.load(bounds_ptr + 1))
    high = tl.where(quarter, tl.load(bounds_ptr + 13), tl.load(bounds_ptr + 9))
    eighth = x > tl.where(upper, high, low)
    places = upper.to(tl.int32) * 8 + quarter.to(tl.int32) * 4 + eighth.to(tl.int32) * 2
    index = tl.arange(0, 16)
    bounds = tl.load(bounds_ptr + index, mask=index < 15, other=0.0)
    return places + (x > _looked_up(bounds, places, SIZE)).to(tl.int32)


@Relaunched
@triton.jit
def _quantize_4bit_kernel(
    w_ptr,  # [size]
    bounds_ptr,  # [15]
    ascending_ptr,  # [16]
    codes_ptr,  # [size / 2]
    absmax_ptr,  # [size / QUANT_BLOCK]
    size,
    TINY: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """absmax = max |w| over a block, code = that of the value nearest to w / absmax.

    A program takes BLOCK values, whole blocks of them, and packs GROUP codes into a word.
    """
    BLOCKS: tl.constexpr = BLOCK // QUANT_BLOCK
    WORDS: tl.constexpr = QUANT_BLOCK // GROUP
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    word = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    place = tl.arange(0, GROUP)[None, None, :]
    at = word[:, :, None] * GROUP + place
    x = tl.load(w_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    # As integers magnitudes are ordered as they are, those of NaN above all.
    bits = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2), axis=1)
    absmax = bits.to(tl.float32, bitcast=True)
    divisor = tl.where(absmax < TINY, TINY, absmax)
    scaled = x * tl.div_rn(1.0, divisor)[:, None, None]
    if (tl.program_id(0) + 1).to(tl.int64) * BLOCK > size:
        # A last block that is not full is divided, and has no scale of zero.
        full = (block + 1) * QUANT_BLOCK <= size
        absmax = tl.where(full, absmax, divisor)
        scaled = tl.where(full[:, None, None], scaled, tl.div_rn(x, divisor[:, None, None]))
    codes = _looked_up(
        tl.load(ascending_ptr + tl.arange(0, 16)), _places(scaled, bounds_ptr, BLOCK), BLOCK
    )
    packed = tl.sum(codes.to(tl.int32) << (place ^ 1) * 4, axis=2)
    word_type: tl.constexpr = tl.int32 if GROUP == 8 else tl.uint8
    words_ptr = codes_ptr.to(tl.pointer_type(word_type))
    tl.store(words_ptr + word, packed.to(word_type), mask=word * GROUP < size)
    tl.store(absmax_ptr + block, absmax, mask=block * QUANT_BLOCK < size)


def dequantize_4bit(
    codes: Tensor,  # [ceil(N K / 2)] uint8
    scales: BlockScales,
    values: Tensor,  # [16] float32
    w: Tensor,  # [rows, K]
    first: int,
    block: int,
) -> None:
    """Writes w. Launch size: K."""
    rows, cols = w.shape
    group = launch.vector(w.dtype, cols, w.stride(0), first)
    group = group if codes.data_ptr() % 4 == 0 else 1
    config = launch.config("dequantize_4bit", w.device, w.dtype, cols)
    tiles = launch.cdiv(rows, config["BLOCK_M"]) * launch.cdiv(cols // group, config["BLOCK_N"])
    _dequantize_4bit_kernel[(tiles,)](
        codes,
        *scales,
        values,
        w,
        rows,
        cols // group,
        w.stride(0) // group,
        first // group,
        QUANT_BLOCK=block,
        NESTED_BLOCK=NESTED_BLOCK,
        GROUP=group,
        **{**config, "enable_fp_fusion": False},
    )


def quantize_4bit(
    w: Tensor,  # [N, K], contiguous
    bounds: Tensor,  # [15] float32
    ascending: Tensor,  # [16] uint8
    codes: Tensor,  # [ceil(N K / 2)] uint8
    absmax: Tensor,  # [ceil(N K / block)] float32
    block: int,
) -> None:
    """Writes codes and absmax. Launch size: block."""
    size = w.numel()
    config = launch.config("quantize_4bit", w.device, w.dtype, block)
    _quantize_4bit_kernel[(launch.cdiv(size, config["BLOCK"]),)](
        w,
        bounds,
        ascending,
        codes,
        absmax,
        size,
        TINY=TINY,
        QUANT_BLOCK=block,
        GROUP=8 if size % 8 == 0 and codes.data_ptr() % 4 == 0 else 2,
        **{**config, "enable_fp_fusion": False},
    )
