"""Codes of four bits with a scale for each block of values."""

from torch import Tensor

from lora_engine.backends.cpu.launch import dtype_code, kernels, pointer
from lora_engine.backends.cpu.structs import Dequantize4bitArgs, Quantize4bitArgs
from lora_engine.quantization.format import BlockScales


def quantize_4bit(
    w: Tensor,  # [N, K], contiguous
    bounds: Tensor,  # [15] float32
    ascending: Tensor,  # [16] uint8
    codes: Tensor,  # [ceil(N K / 2)] uint8
    absmax: Tensor,  # [ceil(N K / block)] float32
    block: int,
) -> None:
    """Writes codes and absmax."""
    kernels().quantize_4bit(
        dtype_code(w.dtype),
        Quantize4bitArgs(
            w=w.data_ptr(),
            bounds=bounds.data_ptr(),
            ascending=ascending.data_ptr(),
            codes=codes.data_ptr(),
            absmax=absmax.data_ptr(),
            size=w.numel(),
            block=block,
        ),
    )


def dequantize_4bit(
    codes: Tensor,  # [ceil(N K / 2)] uint8
    scales: BlockScales,
    values: Tensor,  # [16] float32
    w: Tensor,  # [rows, K]
    first: int,
    block: int,
) -> None:
    """Writes w."""
    kernels().dequantize_4bit(
        dtype_code(w.dtype),
        Dequantize4bitArgs(
            codes=codes.data_ptr(),
            absmax=scales.absmax.data_ptr(),
            nested_absmax=pointer(scales.nested_absmax),
            nested_code=pointer(scales.nested_code),
            offset=pointer(scales.offset),
            values=values.data_ptr(),
            w=w.data_ptr(),
            rows=w.shape[0],
            cols=w.shape[1],
            stride=w.stride(0),
            first=first,
            block=block,
        ),
    )
