"""Linears with LoRA for few rows: the weights and the adapters are read where they are."""

from collections.abc import Sequence

from torch import Tensor

from lora_engine.backends import choice
from lora_engine.backends.cpu.launch import dtype_code, kernels, pointer
from lora_engine.backends.cpu.lora_structs import FewRowsArgs, LoraAdapter, LoraBase

DTYPES = choice.DTYPES["cpu"]  # of weights and adapters
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
    kernels().lora_linear_few_rows(
        dtype_code(x.dtype),
        FewRowsArgs(
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            residual=pointer(residual),
            y=y.data_ptr(),
            rows=x.shape[0],
            cols=x.shape[1],
            x_stride=x.stride(0),
            w_stride=weight.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
            y_stride=y.stride(0),
            linears=[
                LoraBase(rows=rows, bias=pointer(bias), adapters=count)
                for rows, bias, count in linears
            ],
            adapters=[
                LoraAdapter(
                    lora_a=a.data_ptr(),
                    lora_b=b.data_ptr(),
                    dtype=dtype_code(a.dtype),
                    ranks=a.shape[0],
                    a_stride=a.stride(0),
                    b_stride=b.stride(0),
                    scaling=scaling,
                )
                for a, b, scaling in adapters
            ],
        ),
    )
