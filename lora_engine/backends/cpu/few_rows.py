"""Linears with LoRA for few rows: the weights and the adapters are read where they are."""

from collections.abc import Sequence

from torch import Tensor

from lora_engine.backends.cpu.address import dtype_code, pointer
from lora_engine.backends.extension import native

# A linear's outputs, its bias [N_i] and how many of the adapters are its own.
Linear = tuple[int, Tensor | None, int]
# lora_a [r, K] and lora_b [N_i, r], of one dtype and with rows of their own, and scaling.
Adapter = tuple[Tensor, Tensor, float]


def lora_linear_few_rows(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    linears: Sequence[Linear],
    adapters: Sequence[Adapter],
    y: Tensor,  # [M, N]
    residual: Tensor | None = None,  # [M, N]
) -> None:
    """Writes y = x weightᵀ + scaling (x lora_aᵀ) lora_bᵀ + bias + residual, rounded once.

    Biases and the residual are of x's dtype, and the factors are rounded to it, as x lora_aᵀ is.
    Adapters stand in the order of their linears.
    """
    native().lora_linear_few_rows(
        dtype_code(x.dtype),
        x.data_ptr(),
        weight.data_ptr(),
        pointer(residual),
        y.data_ptr(),
        *x.shape,
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        y.stride(0),
        [(rows, pointer(bias), count) for rows, bias, count in linears],
        [
            (
                a.data_ptr(),
                b.data_ptr(),
                dtype_code(a.dtype),
                a.shape[0],
                a.stride(0),
                b.stride(0),
                scaling,
            )
            for a, b, scaling in adapters
        ],
    )
