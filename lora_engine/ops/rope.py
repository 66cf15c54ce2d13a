"""Rotary position embedding with its gradient."""

from typing import Any

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.ops.tensors import accumulate_dtype, check, shape_of


def rope(
    x: Tensor,  # [T, heads, D]
    cos: Tensor,  # [T, D]
    sin: Tensor,  # [T, D]
    *,
    impl: str | None = None,
) -> Tensor:
    """`x cos + rotate_half(x) sin` for each head (arXiv:2104.09864), in x's dtype.

    cos and sin are the model's own, in any float dtype; they get no gradient.

    Raises ValueError where the shapes do not fit.
    """
    check(x.dim() == 3 and x.shape[-1] % 2 == 0, f"rope: x {shape_of(x)} is not [T, heads, even D]")
    for name, table in (("cos", cos), ("sin", sin)):
        check(
            table.shape == (x.shape[0], x.shape[2]),
            f"rope: {name} {shape_of(table)} does not fit x {shape_of(x)}: expected [T, D]",
        )
    impl = backends.select("rope", x.device, x.dtype, impl)
    if impl == "reference":
        return reference.rope(x, cos, sin)
    accumulate = accumulate_dtype(x.dtype)
    out: Tensor = _Rope.apply(
        x,
        cos.to(accumulate).contiguous(),
        sin.to(accumulate).contiguous(),
        backends.kernels("rope", impl),
    )
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, kernels: Any) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return _rotate(kernels, x, cos, sin, inverse=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(ctx.kernels, dy, cos, sin, inverse=True), None, None, None


def _rotate(kernels: Any, x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
    x = token_rows(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels.rope(x, y, cos, sin, inverse=inverse)
    return y


def token_rows(x: Tensor) -> Tensor:
    """`x` [T, heads, D] with each token's heads one behind the other, copied only if needed."""
    dense = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if dense else x.contiguous()
