"""Rows of packed weights, decoded."""

from torch import Tensor

from lora_engine.backends.cpu.launch import dtype_code, kernels
from lora_engine.backends.cpu.structs import DecodeBlocksArgs, DecodeScaledArgs
from lora_engine.quantization.format import Blocks, Scaled

# PackedElement and GgufType of csrc/cpu/kernels.hpp.
_ELEMENTS = {"int8": 0, "uint8": 1, "e4m3": 2, "e2m1": 3, "uint4": 4}
_TYPES = {"q4_0": 0, "q4_1": 1, "q5_0": 2, "q5_1": 3, "q8_0": 4, "q4_k": 5, "q5_k": 6, "q6_k": 7}


def decode_scaled(
    packed: Scaled,  # codes [R, bytes], contiguous rows
    w: Tensor,  # [R, K]
) -> None:
    """Writes w."""
    rows, cols = w.shape
    scale = packed.scale.contiguous()
    zero = packed.zero.contiguous() if isinstance(packed.zero, Tensor) else None
    kernels().decode_scaled(
        dtype_code(w.dtype),
        DecodeScaledArgs(
            codes=packed.codes.data_ptr(),
            scale=scale.data_ptr(),
            zero=0 if zero is None else zero.data_ptr(),
            w=w.data_ptr(),
            rows=rows,
            cols=cols,
            group=packed.group or cols,
            codes_stride=packed.codes.stride(0),
            scale_stride=0 if scale.shape[0] == 1 else scale.stride(0),
            zero_stride=0 if zero is None else zero.stride(0),
            stride=w.stride(0),
            element=_ELEMENTS[packed.element],
            zero_of_all=0.0 if isinstance(packed.zero, Tensor) else packed.zero,
            factor=packed.factor,
        ),
    )


def decode_blocks(
    packed: Blocks,  # codes [R, bytes], contiguous rows
    w: Tensor,  # [R, K]
) -> None:
    """Writes w."""
    kernels().decode_blocks(
        dtype_code(w.dtype),
        DecodeBlocksArgs(
            codes=packed.codes.data_ptr(),
            w=w.data_ptr(),
            rows=w.shape[0],
            cols=w.shape[1],
            codes_stride=packed.codes.stride(0),
            stride=w.stride(0),
            type=_TYPES[packed.type],
        ),
    )
