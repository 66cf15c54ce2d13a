"""Rotary position embedding of queries and keys, with its gradient."""

from dataclasses import dataclass, replace
from typing import NamedTuple, overload

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import contracts, launchers
from lora_engine.ops.context import Context
from lora_engine.ops.tensors import check, shape_of

POSITION_DTYPES = (torch.int64, torch.int32)


@overload
def rope(
    q: Tensor,
    k: None,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    impl: str | None = None,
) -> Tensor: ...


@overload
def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def rope(
    q: Tensor,  # [T, Hq, D]
    k: Tensor | None,  # [T, Hkv, D]
    cos: Tensor,  # [T, R]; with position_ids [P, R]
    sin: Tensor,  # as cos
    *,
    position_ids: Tensor | None = None,  # [T] int64 or int32
    interleaved: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """q and k with their heads rotated (arXiv:2104.09864), in their dtype; q alone if k is None.

    cos and sin are the model's own tables, in any float dtype; they get no gradient. Token t is
    rotated by row t, or by row `position_ids[t]` (positions of packed sequences restart). Scaled
    variants (linear, dynamic, YaRN, Llama 3, an attention factor) are in the tables already and
    need nothing else. R <= D, even: of each head the first R elements are rotated, `x cos +
    turned(x) sin`, and the rest copied.

    The layout says which elements pair, and it is that of the tables' columns as well:

    - half-rotated (Llama, GPT-NeoX): i and i + R / 2; `turned` is (-x[R/2:], x[:R/2]). Columns i
      and i + R / 2 hold the same angle, as in `cat((freqs, freqs))`.
    - interleaved (GPT-J, Cohere): 2i and 2i + 1; `turned` is (-x[1], x[0], -x[3], x[2], ...).
      Columns 2i and 2i + 1 hold the same angle, as in `repeat_interleave(freqs, 2)`. Where a model
      keeps such heads with tables in halves (GLM), give
      `cos[:, : R // 2].repeat_interleave(2, -1)`.

    Raises ValueError where shapes or dtypes do not fit, and on the CPU for a position outside the
    tables; a GPU is not made to wait for that, there the token's rotated elements become NaN.
    """
    tables = _check(q, k, cos, sin, position_ids)
    impl = backends.select("rope", q.device, q.dtype, impl)
    if impl == "reference":
        return reference.rope(q, k, cos, sin, position_ids=position_ids, interleaved=interleaved)
    rotation = _Rotation(interleaved, launchers.rope(impl))
    if k is None:
        return rotation.of_one(q, *tables, position_ids)
    return rotation.of_both(q, k, *tables, position_ids)


@dataclass(frozen=True)
class _Rotation:
    """What is done to q and k besides their tables."""

    interleaved: bool
    kernels: contracts.Rope
    inverse: bool = False

    def of_one(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> Tensor:
        """q or k rotated."""
        rotated: Tensor = _Rope.apply(x, None, cos, sin, position_ids, self)
        return rotated

    def of_both(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """q and k rotated in one launch."""
        rotated: tuple[Tensor, Tensor] = _Rope.apply(q, k, cos, sin, position_ids, self)
        return rotated

    def run(
        self,
        q: Tensor,
        k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """q rotated, and k if there is one, without autograd."""
        q, k = _heads(q), None if k is None else _heads(k)
        q_out, k_out = _empty(q), None if k is None else _empty(k)
        self.kernels.rope(
            q,
            k,
            q_out,
            k_out,
            cos,
            sin,
            position_ids,
            interleaved=self.interleaved,
            inverse=self.inverse,
        )
        return q_out, k_out


class _Needs(NamedTuple):
    """Which of the function's inputs need a gradient."""

    q: bool
    k: bool
    cos: bool
    sin: bool
    position_ids: bool
    rotation: bool


class _Gradients(NamedTuple):
    """The gradients of the function's inputs."""

    q: Tensor | None = None
    k: Tensor | None = None
    cos: None = None
    sin: None = None
    position_ids: None = None
    rotation: None = None


class _Saved(NamedTuple):
    """What the backward pass reads."""

    cos: Tensor  # [T, R], or [P, R] with position_ids
    sin: Tensor  # as cos
    position_ids: Tensor | None  # [T]


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[_Rotation],
        q: Tensor,
        k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
        rotation: _Rotation,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*_Saved(cos=cos, sin=sin, position_ids=position_ids))
        ctx.kept = rotation
        q_out, k_out = rotation.run(q, k, cos, sin, position_ids)
        return q_out if k_out is None else (q_out, k_out)

    @staticmethod
    def backward(
        ctx: Context[_Rotation], dq: Tensor | None, dk: Tensor | None = None
    ) -> _Gradients:
        needs = _Needs(*ctx.needs_input_grad)
        tables = _Saved(*ctx.saved_tensors)
        back = replace(ctx.kept, inverse=not ctx.kept.inverse)
        dq, dk = dq if needs.q else None, dk if needs.k else None
        if dq is not None and dk is not None:
            return _Gradients(*back.of_both(dq, dk, *tables))
        return _Gradients(
            q=None if dq is None else back.of_one(dq, *tables),
            k=None if dk is None else back.of_one(dk, *tables),
        )


def _heads(x: Tensor) -> Tensor:
    return x if _is_heads(x) else x.contiguous()


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _check(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """ValueError where something does not fit; the tables with columns one apart."""
    check(q.dim() == 3, lambda: f"rope: q {shape_of(q)} is not [T, heads, D]")
    if k is not None:
        check(
            k.dim() == 3 and k.shape[0] == q.shape[0] and k.shape[2] == q.shape[2],
            lambda: f"rope: k {shape_of(k)} does not fit q {shape_of(q)}: expected [T, heads, D]",
        )
        check(
            k.dtype == q.dtype,
            lambda: f"rope: q {shape_of(q)} and k {shape_of(k)} differ in dtype",
        )
    check(
        cos.dim() == 2 and cos.shape == sin.shape,
        lambda: f"rope: cos {shape_of(cos)} and sin {shape_of(sin)} are not two tables [T, R]",
    )
    rows, rotary = cos.shape
    check(
        0 < rotary <= q.shape[2] and rotary % 2 == 0,
        lambda: (
            f"rope: cos {shape_of(cos)} does not fit q {shape_of(q)}: expected even R of at most D"
        ),
    )
    if position_ids is None:
        check(
            rows == q.shape[0],
            lambda: (
                f"rope: cos {shape_of(cos)} does not fit q {shape_of(q)}: expected [T, R], "
                "or give position_ids"
            ),
        )
    else:
        check(
            position_ids.shape == q.shape[:1] and position_ids.dtype in POSITION_DTYPES,
            lambda: (
                f"rope: position_ids {shape_of(position_ids)} is not [T] int64 or int32 "
                f"for q {shape_of(q)}"
            ),
        )
        if position_ids.numel() and backends.reads_at_once(position_ids):
            low, high = int(position_ids.min()), int(position_ids.max())
            check(
                low >= 0 and high < rows,
                f"rope: positions {low} to {high} are not all in tables of {rows} rows",
            )
    cos, sin = (x.detach() if x.stride(1) == 1 else x.detach().contiguous() for x in (cos, sin))
    return cos, sin


def _is_heads(x: Tensor) -> bool:
    """Whether x [T, heads, D] has columns one apart, and no element in two places."""
    tokens, heads, dim = x.shape
    if x.stride(2) != 1 and dim > 1:
        return False
    extent = dim
    for stride, size in sorted(((x.stride(0), tokens), (x.stride(1), heads))):
        if size > 1:
            if stride < extent:
                return False
            extent = stride * (size - 1) + extent
    return True
