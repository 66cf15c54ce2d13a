"""Dropout masks, recomputed from their seed inside other kernels."""

import triton
import triton.language as tl

from lora_engine.values import Dropout


@triton.jit
def keep_mask(
    seed_low,
    seed_high,
    threshold,
    substream,  # index of the linear whose mask it is
    rows,  # [BLOCK_M] row numbers
    first_col,  # a multiple of 4
    BLOCK_N: tl.constexpr,
):
    """`reference.dropout_mask` [BLOCK_M, BLOCK_N] of these rows and of columns from first_col.

    One counter gives the words of four consecutive columns.
    """
    groups = (first_col // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.int32)
    zeros = tl.zeros([rows.shape[0], BLOCK_N // 4], dtype=tl.int32)
    seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    w0, w1, w2, w3 = tl.philox(
        seed, zeros + groups[None, :], zeros + rows.to(tl.int32)[:, None], zeros + substream, zeros
    )
    least = threshold.to(tl.uint32, bitcast=True)
    even = tl.join(w0 >= least, w2 >= least)
    odd = tl.join(w1 >= least, w3 >= least)
    return tl.reshape(tl.join(even, odd), [rows.shape[0], BLOCK_N])


def signed_words(dropout: Dropout | None) -> tuple[int, int, int]:
    """The seed's low and high word and the threshold as int32: one kernel for every value."""
    if dropout is None:
        return 0, 0, 0
    words = *dropout.key, dropout.threshold
    low, high, threshold = (word - 2**32 if word >= 2**31 else word for word in words)
    return low, high, threshold
