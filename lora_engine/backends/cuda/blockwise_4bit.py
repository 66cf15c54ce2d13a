"""Codes of four bits with a scale for each block of values."""

from torch import Tensor

from lora_engine.backends.cuda.launch import (
    Dequantize4bitArgs,
    Quantize4bitArgs,
    dtype_code,
    kernels,
    pointer,
    stream_on,
)
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
    with stream_on(w.device) as stream:
        kernels().quantize_4bit(
            Quantize4bitArgs(
                w=w.data_ptr(),
                bounds=bounds.data_ptr(),
                ascending=ascending.data_ptr(),
                codes=codes.data_ptr(),
                absmax=absmax.data_ptr(),
                size=w.numel(),
                block=block,
                dtype=dtype_code(w.dtype),
            ),
            stream,
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
    with stream_on(w.device) as stream:
        kernels().dequantize_4bit(
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
                dtype=dtype_code(w.dtype),
            ),
            stream,
        )
