"""Tensors and dtypes as lora_engine._C takes them."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_engine.backends.extension import native


@cache
def dtype_code(dtype: torch.dtype) -> Any:
    """The extension's name for `dtype`."""
    return getattr(native().DType, str(dtype).removeprefix("torch."))


def pointer(x: Tensor | None) -> int:
    """The address of `x`; 0 for None."""
    return 0 if x is None else x.data_ptr()
