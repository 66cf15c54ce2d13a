"""What every call of a CPU kernel needs: the extension, its codes of dtypes, addresses."""

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor

from lora_engine.backends import extension
from lora_engine.backends.cpu.kernels import Kernels
from lora_engine.backends.cpu.structs import ActivationCode, Address, DTypeCode

kernels = cast(Callable[[], Kernels], extension.native)


@cache
def dtype_code(dtype: torch.dtype) -> DTypeCode:
    """The extension's name for `dtype`."""
    names = kernels().DType
    codes = {
        torch.float32: names.float32,
        torch.bfloat16: names.bfloat16,
        torch.float64: names.float64,
    }
    return codes[dtype]


@cache
def activation_code(activation: str) -> ActivationCode:
    """The extension's name for one of `values.ACTIVATIONS`."""
    names = kernels().Activation
    codes = {"silu": names.silu, "gelu": names.gelu, "gelu_tanh": names.gelu_tanh}
    return codes[activation]


def pointer(x: Tensor | None) -> Address:
    """The address of `x`; 0 for None."""
    return 0 if x is None else x.data_ptr()
