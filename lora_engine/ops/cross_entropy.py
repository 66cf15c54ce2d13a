"""Softmax cross-entropy of rows of logits, with its gradient."""

import math
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import contracts, launchers
from lora_engine.ops.context import Context
from lora_engine.ops.once_differentiable import once_differentiable
from lora_engine.ops.tensors import accumulate_dtype, as_rows, check, shape_of


class LossKeywords(TypedDict):
    """`LossOptions` as keyword arguments."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    z_loss: float


@dataclass(frozen=True)
class LossOptions:
    """What a row's loss is made of; the defaults are plain cross-entropy."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    z_loss: float = 0.0

    def check(self, operation: str) -> None:
        """ValueError where a number makes no sense."""
        check(
            0 <= self.label_smoothing <= 1,
            f"{operation}: label_smoothing={self.label_smoothing} is not in [0, 1]",
        )
        check(
            self.softcap is None or 0 < self.softcap < math.inf,
            f"{operation}: softcap={self.softcap} is not a positive number",
        )
        check(
            0 <= self.z_loss < math.inf,
            f"{operation}: z_loss={self.z_loss} is not a number >= 0",
        )

    def keywords(self) -> LossKeywords:
        """As the kernels and the reference take them."""
        return {
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "softcap": self.softcap,
            "z_loss": self.z_loss,
        }


def cross_entropy(
    logits: Tensor,  # [U, V]
    target: Tensor,  # [U] int64
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """Each row's cross-entropy, [U] float32; 0 for ignored rows.

    With z = softcap * tanh(logits / softcap), or the logits themselves, and lse = logsumexp(z):
    `lse - (1 - label_smoothing) * z[target] - label_smoothing * mean(z) + z_loss * lse**2`
    (arXiv:1512.00567, arXiv:2408.00118, arXiv:2204.02311). A column of -inf is no class: the
    result is that of the row without it, also with label smoothing. A soft-cap makes -softcap of
    -inf, a class like others.

    For a linear head use `linear_cross_entropy`, which never holds all logits.

    Raises ValueError where shapes do not fit, a target is not a column, or an option is no
    sensible number.
    """
    options = LossOptions(
        ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=softcap, z_loss=z_loss
    )
    options.check("cross_entropy")
    check(logits.dim() == 2, f"cross_entropy: logits {shape_of(logits)} are not [U, V]")
    check_targets(logits.shape[0], logits.shape[1], target, ignore_index, "cross_entropy")
    impl = backends.select("cross_entropy", logits.device, logits.dtype, impl)
    if impl == "reference":
        return reference.cross_entropy(logits, target, **options.keywords())
    call = _Call(options, launchers.cross_entropy(impl))
    out: Tensor = _CrossEntropy.apply(logits, target.contiguous(), call)
    return out


class _Call(NamedTuple):
    """One call of `cross_entropy`, besides its tensors."""

    options: LossOptions
    kernels: contracts.CrossEntropy


class _Gradients(NamedTuple):
    """The gradients of the function's inputs."""

    logits: Tensor
    target: None = None
    call: None = None


class _Saved(NamedTuple):
    """What the backward pass reads."""

    logits: Tensor  # [U, V]
    target: Tensor  # [U] int64
    lse: Tensor | None  # [U] float32


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context[_Call], logits: Tensor, target: Tensor, call: _Call) -> Tensor:
        logits = as_rows(logits)
        rows = RowResults(logits.shape[0], logits, lse=True)
        rows.compute(call.kernels, slice(None), logits, target, call.options)
        ctx.save_for_backward(*_Saved(logits=logits, target=target, lse=rows.lse))
        ctx.kept = call
        return rows.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[_Call], d_loss: Tensor) -> _Gradients:
        call = ctx.kept
        saved = _Saved(*ctx.saved_tensors)
        assert saved.lse is not None
        d_logits = torch.empty_like(saved.logits)
        call.kernels.cross_entropy_bwd(
            saved.logits,
            saved.target,
            saved.lse,
            d_loss.contiguous(),
            d_logits,
            **call.options.keywords(),
        )
        return _Gradients(d_logits)


class RowResults:
    """The kernel's results for each of `count` rows of logits, filled a span of rows at a time."""

    def __init__(
        self, count: int, like: Tensor, *, entropy: bool = False, lse: bool = False
    ) -> None:
        def empty(dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype, device=like.device)

        number = accumulate_dtype(like.dtype)
        self.loss, self.logprob = empty(number), empty(number)
        self.correct = empty(torch.bool)
        self.entropy = empty(number) if entropy else None
        self.lse = empty(number) if lse else None

    def compute(
        self,
        kernels: contracts.CrossEntropy,
        span: slice,
        logits: Tensor,  # [rows of span, V], unit column stride
        target: Tensor,  # [rows of span] int64
        options: LossOptions,
        grad: Tensor | None = None,  # as logits; may be logits
    ) -> None:
        """Fills the span's rows, and `grad` with d loss / d logits."""
        kernels.cross_entropy(
            logits,
            target,
            self.loss[span],
            self.logprob[span],
            self.correct[span],
            entropy=None if self.entropy is None else self.entropy[span],
            lse=None if self.lse is None else self.lse[span],
            grad=grad,
            **options.keywords(),
        )


def check_targets(
    rows: int, classes: int, target: Tensor, ignore_index: int, operation: str
) -> None:
    """ValueError unless `target` is [rows] int64 with every entry a class or ignored."""
    check(
        target.shape == (rows,) and target.dtype == torch.int64,
        f"{operation}: target {shape_of(target)} is not [{rows}] int64",
    )
    if rows and backends.reads_at_once(target):
        bad = (target != ignore_index) & ((target < 0) | (target >= classes))
        check(
            not bool(bad.any()),
            f"{operation}: a target is outside [0, {classes}) and not ignore_index={ignore_index}",
        )
