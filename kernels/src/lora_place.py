"""The adapters' factors of a group, cast and scaled into the buffers that products read."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor
from torch.nn import Parameter

from lora_engine.backends.lora_parts import Placing

SLOTS = 8  # factors that one launch places
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _place(
    source_ptr,
    out_ptr,
    pid,
    scale,
    TABLE: tl.constexpr,
    SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A chunk of a factor's elements, in the order of its rows."""
    COLS: tl.constexpr = TABLE[SLOT][3]
    offs = (pid - TABLE[SLOT][0]) * BLOCK + tl.arange(0, BLOCK)
    rows, cols = (offs // COLS).to(tl.int64), offs % COLS
    mask = offs < TABLE[SLOT][2] * COLS
    source_ptrs = source_ptr + rows * TABLE[SLOT][4] + cols * TABLE[SLOT][5]
    x = tl.load(source_ptrs, mask=mask, other=0.0).to(tl.float32)
    if TABLE[SLOT][8]:
        x *= scale
    out_ptrs = out_ptr + TABLE[SLOT][6] + rows * TABLE[SLOT][7] + cols
    tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty), mask=mask)


@Relaunched
@triton.jit
def _place_factors_kernel(
    source_0,
    source_1,
    source_2,
    source_3,
    source_4,
    source_5,
    source_6,
    source_7,
    a_ptr,  # [R, K]
    b_ptr,  # [N, R]
    scale,
    # Of each source: first program, end program, rows, columns, strides of both, its place in a or
    # b and that one's stride, whether it is a B.
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """a = A, b = scale * B, each at its place, rounded once."""
    sources = (
        source_0,
        source_1,
        source_2,
        source_3,
        source_4,
        source_5,
        source_6,
        source_7,
    )
    pid = tl.program_id(0)
    for i in tl.static_range(len(TABLE)):
        if (pid >= TABLE[i][0]) & (pid < TABLE[i][1]):
            if TABLE[i][8]:
                _place(sources[i], b_ptr, pid, scale, TABLE, i, BLOCK)
            else:
                _place(sources[i], a_ptr, pid, scale, TABLE, i, BLOCK)


def place_factors(
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    placings: Sequence[Placing],
) -> None:
    """Writes A and scaling * B of each adapter to its place, rounded once.

    One launch for up to four adapters of the same scaling.
    """
    for scale, members in _by_scale(placings).items():
        for first in range(0, len(members), SLOTS // 2):
            _launch(lora_a, lora_b, scale, members[first : first + SLOTS // 2])


def _by_scale(placings: Sequence[Placing]) -> dict[float, list[Placing]]:
    """Those that the kernel can place; places the others."""
    found: dict[float, list[Placing]] = {}
    for placing in placings:
        (a, b), scale = (placing.factors.lora_a, placing.factors.lora_b), placing.factors.scaling
        if (
            isinstance(scale, float | int)
            and _is_readable(a, placing.lora_a)
            and _is_readable(b, placing.lora_b)
        ):
            found.setdefault(float(scale), []).append(placing)
        else:
            placing.by_torch()
    return found


def _is_readable(source: Tensor, place: Tensor) -> bool:
    """Whether the kernel can read the elements where they are, and there are as many as in place.

    A parameter's data may have been exchanged for data of another shape, type or device.
    """
    return (
        type(source) in (Tensor, Parameter)
        and source.shape == place.shape
        and source.device == place.device
        and source.dtype in DTYPES
        and source.layout == torch.strided
        and source.numel() > 0
        and not source.is_neg()
    )


def _launch(lora_a: Tensor, lora_b: Tensor, scale: float, members: Sequence[Placing]) -> None:
    config = launch.config("lora_place", lora_a.device, lora_a.dtype, lora_a.shape[1])
    block, programs = config["BLOCK"], 0
    starts = lora_a.storage_offset(), lora_b.storage_offset()
    sources, table = [], []
    for factors, *places in members:
        for is_b, (source, place) in enumerate(
            zip((factors.lora_a, factors.lora_b), places, strict=True)
        ):
            rows, cols = source.shape
            end = programs + launch.cdiv(rows * cols, block)
            offset = place.storage_offset() - starts[is_b]
            strides = *source.stride(), offset, place.stride(0)
            table.append((programs, end, rows, cols, *strides, is_b))
            sources.append(source)
            programs = end
    unused = [sources[0]] * (SLOTS - len(sources))
    _place_factors_kernel[(programs,)](
        *sources, *unused, lora_a, lora_b, scale, TABLE=tuple(table), **config
    )
