"""Cross-entropy of a linear head without the logits of all rows.

Rows are worked in chunks: logits of a chunk, softmax and gradient in place over them, and the
gradient of the chunk's hidden rows by a second product. So the gradients of a frozen head's loss
are ready when the forward pass ends, and only they are kept. A head that is trained gets its
gradient in the backward pass, where the scale of each row is known, from logits made again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.ops.cross_entropy import check_targets, cross_entropy_rows_
from lora_engine.ops.tensors import accumulate_dtype, check, shape_of

CHUNK_BYTES = 64 * 2**20


class LinearCrossEntropy(NamedTuple):
    """What `linear_cross_entropy` returns."""

    loss: Tensor  # float32: a scalar, or [U] for reduction="none"
    logprobs: Tensor  # [U] float32, detached: log-probability of each target, 0 where ignored
    correct: Tensor  # [U] bool: whether the target has the largest logit


def linear_cross_entropy(
    hidden: Tensor,  # [U, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [U] int64
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    impl: str | None = None,
) -> LinearCrossEntropy:
    """Softmax cross-entropy of `hidden @ weightᵀ` against `target`.

    `reduction` is "mean" over the rows that are not ignored (0 if there are none), "sum", or
    "none". Extra memory is one chunk of logits, `chunk_rows` x V (64 MiB if not given), and the
    gradient of hidden. Logits have hidden's dtype, everything after float32.

    Raises ValueError where shapes or dtypes do not fit or a target is not a row of weight.
    """
    check(
        hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1],
        f"linear_cross_entropy: hidden {shape_of(hidden)} does not fit weight {shape_of(weight)}",
    )
    check(
        hidden.dtype == weight.dtype,
        f"linear_cross_entropy: hidden {shape_of(hidden)} and weight {shape_of(weight)} "
        "differ in dtype",
    )
    check(
        reduction in ("mean", "sum", "none"),
        f"linear_cross_entropy: reduction={reduction!r}: expected mean, sum or none",
    )
    check_targets(hidden.shape[0], weight.shape[0], target, ignore_index, "linear_cross_entropy")
    impl = backends.select("linear_cross_entropy", hidden.device, hidden.dtype, impl)
    if impl == "reference":
        losses, correct = reference.linear_cross_entropy(hidden, weight, target, ignore_index)
    else:
        rows = chunk_rows or max(1, CHUNK_BYTES // (weight.shape[0] * hidden.element_size()))
        needs_grad = torch.is_grad_enabled()
        losses, correct = _LinearCrossEntropy.apply(
            hidden,
            weight,
            target.contiguous(),
            ignore_index,
            rows,
            needs_grad and hidden.requires_grad,
            backends.kernels("cross_entropy", impl),
        )
    return LinearCrossEntropy(
        _reduce(losses, target, reduction, ignore_index), -losses.detach(), correct
    )


def _reduce(losses: Tensor, target: Tensor, reduction: str, ignore_index: int) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (target != ignore_index).sum().clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        ignore_index: int,
        chunk_rows: int,
        needs_d_hidden: bool,
        kernels: Any,
    ) -> tuple[Tensor, Tensor]:
        rows = hidden.shape[0]
        losses = torch.empty(rows, dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
        correct = torch.empty(rows, dtype=torch.bool, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_d_hidden else None
        logits = hidden.new_empty(min(rows, chunk_rows), weight.shape[0])
        for begin in range(0, rows, chunk_rows):
            chunk = slice(begin, begin + chunk_rows)
            z = logits[: hidden[chunk].shape[0]]
            torch.mm(hidden[chunk], weight.t(), out=z)
            losses[chunk], correct[chunk] = cross_entropy_rows_(
                kernels, z, target[chunk], ignore_index, gradient=needs_d_hidden
            )
            if d_hidden is not None:
                torch.mm(z, weight, out=d_hidden[chunk])
        keep_for_head = (hidden, weight, target) if ctx.needs_input_grad[1] else (None, None, None)
        ctx.save_for_backward(d_hidden, *keep_for_head)
        ctx.ignore_index, ctx.chunk_rows, ctx.kernels = ignore_index, chunk_rows, kernels
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        unscaled, hidden, weight, target = ctx.saved_tensors
        d_hidden = None
        if ctx.needs_input_grad[0]:
            d_hidden = unscaled * d_losses[:, None].to(unscaled.dtype)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = _head_gradient(ctx, hidden, weight, target, d_losses)
        return d_hidden, d_weight, None, None, None, None, None


def _head_gradient(
    ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, d_losses: Tensor
) -> Tensor:
    d_weight = torch.zeros_like(weight, dtype=accumulate_dtype(weight.dtype))
    for begin in range(0, hidden.shape[0], ctx.chunk_rows):
        chunk = slice(begin, begin + ctx.chunk_rows)
        z = hidden[chunk] @ weight.t()
        cross_entropy_rows_(ctx.kernels, z, target[chunk], ctx.ignore_index, gradient=True)
        z *= d_losses[chunk, None].to(z.dtype)
        d_weight += z.t() @ hidden[chunk]
    return d_weight.to(weight.dtype)
