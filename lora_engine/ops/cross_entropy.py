"""Softmax cross-entropy of rows of logits, with its gradient."""

from typing import Any

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.ops.tensors import accumulate_dtype, as_rows, check, shape_of


def cross_entropy(
    logits: Tensor,  # [U, V]
    target: Tensor,  # [U] int64
    *,
    ignore_index: int = -100,
    impl: str | None = None,
) -> Tensor:
    """`logsumexp(logits) - logits[target]` for each row, [U] float32; 0 for ignored rows.

    For a linear head use `linear_cross_entropy`, which never holds all logits.

    Raises ValueError where shapes do not fit or a target is not a column.
    """
    check_targets(logits.shape[0], logits.shape[1], target, ignore_index, "cross_entropy")
    impl = backends.select("cross_entropy", logits.device, logits.dtype, impl)
    if impl == "reference":
        return reference.cross_entropy(logits, target, ignore_index)
    gradient = torch.is_grad_enabled() and logits.requires_grad
    out: Tensor = _CrossEntropy.apply(
        logits, target, ignore_index, gradient, backends.kernels("cross_entropy", impl)
    )
    return out


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        gradient: bool,
        kernels: Any,
    ) -> Tensor:
        work = logits.clone(memory_format=torch.contiguous_format) if gradient else logits
        loss, _ = cross_entropy_rows_(
            kernels, as_rows(work), target.contiguous(), ignore_index, gradient=gradient
        )
        ctx.save_for_backward(work)
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        (d_logits,) = ctx.saved_tensors
        return d_logits * d_loss[:, None].to(d_logits.dtype), None, None, None, None


def cross_entropy_rows_(
    kernels: Any, logits: Tensor, target: Tensor, ignore_index: int, *, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Loss [U] and correctness [U] bool of rows of logits [U, V] with unit column stride.

    With `gradient` the logits become `softmax - onehot`.
    """
    rows = logits.shape[0]
    loss = torch.empty(rows, dtype=accumulate_dtype(logits.dtype), device=logits.device)
    correct = torch.empty(rows, dtype=torch.bool, device=logits.device)
    kernels.cross_entropy(logits, target, loss, correct, ignore_index, gradient=gradient)
    return loss, correct


def check_targets(
    rows: int, classes: int, target: Tensor, ignore_index: int, operation: str
) -> None:
    """ValueError unless `target` is [rows] int64 with every entry a class or ignored."""
    check(
        target.shape == (rows,) and target.dtype == torch.int64,
        f"{operation}: target {shape_of(target)} is not [{rows}] int64",
    )
    if target.device.type == "cpu" and rows:
        bad = (target != ignore_index) & ((target < 0) | (target >= classes))
        check(
            not bool(bad.any()),
            f"{operation}: a target is outside [0, {classes}) and not ignore_index={ignore_index}",
        )
