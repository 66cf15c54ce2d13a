"""Rotary position embedding of queries and keys, with its gradient."""

from typing import Any, overload

import torch
from torch import Tensor

from lora_engine import backends, reference
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
      keeps such heads with tables in halves (GLM), give `cos[:, : R // 2].repeat_interleave(2, -1)`.

    Raises ValueError where shapes or dtypes do not fit, and on the CPU for a position outside the
    tables; a GPU is not made to wait for that, there the token's rotated elements become NaN.
    """
    tables = _check(q, k, cos, sin, position_ids)
    impl = backends.select("rope", q.device, q.dtype, impl)
    if impl == "reference":
        return reference.rope(q, k, cos, sin, position_ids=position_ids, interleaved=interleaved)
    rotation = _Rotation(tables, position_ids, interleaved, backends.kernels("rope", impl))
    if k is None:
        return rotation.apply(q)[0]
    q_out, k_out = rotation.apply(q, k)
    return q_out, k_out


def rope_(
    q: Tensor,  # [T, Hq, D]
    k: Tensor | None,  # [T, Hkv, D]
    cos: Tensor,  # [T, R]; with position_ids [P, R]
    sin: Tensor,  # as cos
    *,
    position_ids: Tensor | None = None,  # [T] int64 or int32
    interleaved: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rope` in place: writes over q and k, which may be columns of one buffer, and returns them.

    Autograd knows of the change. The backward pass makes new gradients, because whose those are
    that arrive cannot be known. Views that require a gradient are rotated one by one: autograd
    takes no function that changes several.

    Raises ValueError as `rope` does, and where columns are not one apart or elements overlap.
    """
    for name, x in (("q", q), ("k", k)):
        check(
            x is None or _is_heads(x),
            f"rope_: {name}'s columns are not one apart, or its elements overlap; use rope",
        )
    tables = _check(q, k, cos, sin, position_ids)
    impl = backends.select("rope", q.device, q.dtype, impl)
    given = (q,) if k is None else (q, k)
    if impl == "reference":
        for x in given:
            x.copy_(
                reference.rope(
                    x, None, cos, sin, position_ids=position_ids, interleaved=interleaved
                )
            )
        return q if k is None else (q, k)
    kernels = backends.kernels("rope", impl)
    rotation = _Rotation(tables, position_ids, interleaved, kernels, in_place=True)
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if tracked and any(x._is_view() for x in given):
        outputs = tuple(rotation.apply(x)[0] for x in given)
    else:
        outputs = rotation.apply(*given)
    return outputs[0] if k is None else (outputs[0], outputs[1])


class _Rotation:
    """What is done to each of q and k, forward or back."""

    def __init__(
        self,
        tables: tuple[Tensor, Tensor],
        position_ids: Tensor | None,
        interleaved: bool,
        kernels: Any,
        *,
        inverse: bool = False,
        in_place: bool = False,
    ) -> None:
        self.tables, self.position_ids, self.kernels = tables, position_ids, kernels
        self.interleaved, self.inverse, self.in_place = interleaved, inverse, in_place

    def apply(self, *given: Tensor | None) -> tuple[Tensor, ...]:
        """The given tensors rotated, differentiably; None for None."""
        outputs: tuple[Tensor, ...] = _Rope.apply(self, *self.tables, self.position_ids, *given)
        return outputs

    def run(self, given: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The given one or two tensors rotated, in one launch."""
        if self.in_place:
            outputs = given
        else:
            given = tuple(x if x is None or _is_heads(x) else x.contiguous() for x in given)
            outputs = tuple(
                None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
                for x in given
            )
        pad = (None,) * (2 - len(given))
        self.kernels.rope(
            *given,
            *pad,
            *outputs,
            *pad,
            *self.tables,
            self.position_ids,
            interleaved=self.interleaved,
            inverse=self.inverse,
        )
        return outputs

    def transposed(self, tables: tuple[Tensor, Tensor], position_ids: Tensor | None) -> "_Rotation":
        return _Rotation(
            tables, position_ids, self.interleaved, self.kernels, inverse=not self.inverse
        )


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rotation: _Rotation,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
        *given: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.rotation = rotation
        if rotation.in_place:
            ctx.mark_dirty(*given)
        return rotation.run(given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin, position_ids = ctx.saved_tensors
        needed = tuple(g if ctx.needs_input_grad[4 + i] else None for i, g in enumerate(grads))
        nothing = (None, None, None, None)
        if all(grad is None for grad in needed):
            return (*nothing, *needed)
        return (*nothing, *ctx.rotation.transposed((cos, sin), position_ids).apply(*needed))


def _check(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """ValueError where something does not fit; the tables with columns one apart."""
    check(q.dim() == 3, f"rope: q {shape_of(q)} is not [T, heads, D]")
    if k is not None:
        check(
            k.dim() == 3 and k.shape[0] == q.shape[0] and k.shape[2] == q.shape[2],
            f"rope: k {shape_of(k)} does not fit q {shape_of(q)}: expected [T, heads, D]",
        )
        check(k.dtype == q.dtype, f"rope: q {shape_of(q)} and k {shape_of(k)} differ in dtype")
    check(
        cos.dim() == 2 and cos.shape == sin.shape,
        f"rope: cos {shape_of(cos)} and sin {shape_of(sin)} are not two tables [T, R]",
    )
    rows, rotary = cos.shape
    check(
        0 < rotary <= q.shape[2] and rotary % 2 == 0,
        f"rope: cos {shape_of(cos)} does not fit q {shape_of(q)}: expected even R of at most D",
    )
    if position_ids is None:
        check(
            rows == q.shape[0],
            f"rope: cos {shape_of(cos)} does not fit q {shape_of(q)}: expected [T, R], "
            "or give position_ids",
        )
    else:
        check(
            position_ids.shape == q.shape[:1] and position_ids.dtype in POSITION_DTYPES,
            f"rope: position_ids {shape_of(position_ids)} is not [T] int64 or int32 "
            f"for q {shape_of(q)}",
        )
        if position_ids.device.type == "cpu" and position_ids.numel():
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
