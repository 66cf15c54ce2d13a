"""Linears with LoRA for few rows: the weights and the adapters are read where they are."""

from collections.abc import Sequence

from torch import Tensor

from lora_engine.backends.cpu.launch import dtype_code, kernels, pointer
from lora_engine.backends.cpu.lora_structs import FewRowsArgs, LoraAdapter, LoraBase
from lora_engine.backends.lora_parts import GroupAdapter, GroupLinear


def lora_linear_few_rows(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    linears: Sequence[GroupLinear],
    adapters: Sequence[GroupAdapter],
    y: Tensor,  # [M, N]
    residual: Tensor | None = None,  # [M, N]
) -> None:
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
                LoraBase(rows=part.rows, bias=pointer(part.bias), adapters=part.adapters)
                for part in linears
            ],
            adapters=[
                LoraAdapter(
                    lora_a=part.lora_a.data_ptr(),
                    lora_b=part.lora_b.data_ptr(),
                    dtype=dtype_code(part.lora_a.dtype),
                    ranks=part.lora_a.shape[0],
                    a_stride=part.lora_a.stride(0),
                    b_stride=part.lora_b.stride(0),
                    scaling=part.scaling,
                )
                for part in adapters
            ],
        ),
    )
