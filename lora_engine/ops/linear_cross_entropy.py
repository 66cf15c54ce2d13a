"""Cross-entropy of a linear head without the logits of all rows.

Rows are worked in chunks: logits of a chunk, softmax and gradient in place over them, then the
products of that gradient with the head and with the hidden rows. A reduced loss has one factor for
all rows, so every gradient is ready, but for that factor, when the forward pass ends. Without a
reduction the backward pass brings a factor for each row: the hidden rows' gradient is still ready
but for it, and a head that is trained gets its own from logits made again.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_engine import backends, reference
from lora_engine.backends import contracts
from lora_engine.ops import launchers
from lora_engine.ops.adapter_set import LoraFactors
from lora_engine.ops.augmented import operand
from lora_engine.ops.cross_entropy import LossOptions, RowResults, check_targets
from lora_engine.ops.head_gradients import HeadGradients, scaled
from lora_engine.ops.tensors import check, front_columns, shape_of, without_autocast

ROW_ALIGNMENT = 16  # elements: what Triton wants of a stride to load 16 bytes at once


class LinearCrossEntropy(NamedTuple):
    """What `linear_cross_entropy` returns."""

    loss: Tensor  # float32: a scalar, or [U] for reduction="none"
    logprobs: Tensor  # [U] float32, detached: log-probability of each target, 0 where ignored
    correct: Tensor  # [U] bool: whether the target has the largest logit
    entropy: Tensor | None = None  # [U] float32, detached: of the softmax, in nats; if asked for


@without_autocast
def linear_cross_entropy(
    hidden: Tensor,  # [U, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [U] int64
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    entropy: bool = False,
    lora: LoraFactors | None = None,
    bias: Tensor | None = None,  # [V]
    chunk_rows: int | None = None,
    impl: str | None = None,
) -> LinearCrossEntropy:
    """Softmax cross-entropy of `hidden @ weightᵀ + bias` against `target`.

    `lora` (lora_a [r, H], lora_b [V, r], any float dtype, cast to hidden's) adds
    `scaling * (hidden @ lora_aᵀ) @ lora_bᵀ` to the logits. `label_smoothing`, `softcap` and
    `z_loss` as in `cross_entropy`. `reduction` is "mean" over the rows that are not ignored (0 if
    there are none), "sum", or "none". Logits have hidden's dtype, everything after float32.

    Differentiable once, in hidden, weight, bias and the adapter; only what requires a gradient
    gets one. With "none" and no extras the loss is -log p(target), for objectives made of log-
    probabilities. Extra memory is one chunk of logits, `chunk_rows` x V (not given: as
    `backends.chunk_rows` chooses), the gradients, and a float32 copy of a trained half-precision
    head's while they are summed.

    Raises ValueError where shapes or dtypes do not fit, a target is not a row of weight, or an
    option is no sensible number.
    """
    options = LossOptions(ignore_index, label_smoothing, softcap, z_loss)
    options.check("linear_cross_entropy")
    _check_head(hidden, weight, bias, lora)
    check(
        reduction in ("mean", "sum", "none"),
        f"linear_cross_entropy: reduction={reduction!r}: expected mean, sum or none",
    )
    check(
        chunk_rows is None or chunk_rows > 0,
        f"linear_cross_entropy: chunk_rows={chunk_rows} is not positive",
    )
    check_targets(hidden.shape[0], weight.shape[0], target, ignore_index, "linear_cross_entropy")
    impl = backends.select("linear_cross_entropy", hidden.device, hidden.dtype, impl)
    hidden, weight = operand(hidden), operand(weight)
    lora_a, lora_b, scaling = None, None, 0.0
    if lora is not None:
        lora_a, lora_b = operand(lora.lora_a), operand(lora.lora_b)
        scaling = lora.scaling
    if impl == "reference":
        adapter = None if lora_a is None or lora_b is None else (lora_a, lora_b, scaling)
        found = reference.linear_cross_entropy(
            hidden, weight, target, bias=bias, lora=adapter, **options.keywords()
        )
        loss = _reduce(found.loss, target, reduction, ignore_index)
        spread = found.entropy if entropy else None
        return LinearCrossEntropy(loss, found.logprob.detach(), found.correct, spread)
    inputs = (hidden, weight, bias, lora_a, lora_b)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    extents = hidden.shape[0], weight.shape[0]
    rows = chunk_rows or backends.chunk_rows(hidden.device, hidden.dtype, *extents)
    job = _Job(options, reduction, entropy, rows, scaling, wanted, impl)
    return LinearCrossEntropy(*_LinearCrossEntropy.apply(*inputs, target.contiguous(), job))


def _check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: LoraFactors | None
) -> None:
    name = "linear_cross_entropy"
    check(
        hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1],
        f"{name}: hidden {shape_of(hidden)} does not fit weight {shape_of(weight)}",
    )
    check(
        hidden.dtype == weight.dtype,
        f"{name}: hidden {shape_of(hidden)} and weight {shape_of(weight)} differ in dtype",
    )
    classes, width = weight.shape
    if bias is not None:
        check(
            bias.shape == (classes,) and bias.dtype == weight.dtype,
            f"{name}: bias {shape_of(bias)} does not fit weight {shape_of(weight)}",
        )
    if lora is not None:
        a, b = lora.lora_a, lora.lora_b
        check(
            a.dim() == b.dim() == 2
            and a.shape[1] == width
            and b.shape == (classes, a.shape[0])
            and a.is_floating_point()
            and b.is_floating_point(),
            f"{name}: lora_a {shape_of(a)} and lora_b {shape_of(b)} do not fit weight "
            f"{shape_of(weight)}",
        )


def _reduce(losses: Tensor, target: Tensor, reduction: str, ignore_index: int) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total * _one_over_count(target, ignore_index, total)


def _one_over_count(target: Tensor, ignore_index: int, like: Tensor) -> Tensor:
    """1 / the number of rows that count, without asking the device for it."""
    return (target != ignore_index).sum().clamp(min=1).to(like.dtype).reciprocal()


@dataclass(frozen=True)
class _Job:
    options: LossOptions
    reduction: str
    entropy: bool
    chunk_rows: int
    scaling: float
    wanted: tuple[bool, ...]  # gradients of hidden, weight, bias, lora_a, lora_b
    impl: str

    @property
    def kernels(self) -> contracts.CrossEntropy:
        return launchers.cross_entropy(self.impl)

    def chunks(self, rows: int) -> list[slice]:
        step = self.chunk_rows
        return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


@dataclass(frozen=True)
class _Head:
    """The head's parameters in the dtype of its products; makes logits chunk by chunk."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, H]
    lora_b: Tensor | None  # [V, r]
    scaling: float

    @staticmethod
    def of(
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
    ) -> "_Head":
        cast = [None if x is None else x.to(weight.dtype) for x in (lora_a, lora_b)]
        return _Head(weight, bias, cast[0], cast[1], scaling)

    def buffer(self, rows: int) -> Tensor:
        """An uninitialised [rows, V] with aligned rows."""
        classes = self.weight.shape[0]
        padded = -(-classes // ROW_ALIGNMENT) * ROW_ALIGNMENT
        return front_columns(self.weight.new_empty(rows, padded), classes)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor | None:
        """Writes the logits of `hidden` [c, H] into `out` [c, V]; returns hidden lora_aᵀ [c, r]."""
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)
        if self.lora_a is None or self.lora_b is None:
            return None
        s = torch.mm(hidden, self.lora_a.t())
        out.addmm_(s, self.lora_b.t(), alpha=self.scaling)
        return s

    def rank_gradient(self, dz: Tensor) -> Tensor | None:
        """The gradient of `hidden lora_aᵀ` [c, r] from that of the logits."""
        return None if self.lora_b is None else torch.mm(dz, self.lora_b).mul_(self.scaling)

    def hidden_gradient(self, dz: Tensor, ds: Tensor | None, out: Tensor) -> None:
        """Writes the gradient of hidden [c, H] into `out`."""
        torch.mm(dz, self.weight, out=out)
        if ds is not None and self.lora_a is not None:
            out.addmm_(ds, self.lora_a)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        target: Tensor,
        job: _Job,
    ) -> tuple[Tensor | None, ...]:
        rows, per_row, trains_head = hidden.shape[0], job.reduction == "none", any(job.wanted[1:])
        head = _Head.of(weight, bias, lora_a, lora_b, job.scaling)
        chunks = job.chunks(rows)
        results = RowResults(rows, hidden, entropy=job.entropy, lse=per_row and trains_head)
        d_hidden = torch.empty_like(hidden) if job.wanted[0] else None
        sums = None
        if trains_head and not per_row:
            sums = HeadGradients(
                (weight, bias, lora_a, lora_b), job.wanted[1:], hidden.dtype, len(chunks)
            )
        buffer = head.buffer(min(rows, job.chunk_rows))
        for span in chunks:
            h, z = hidden[span], buffer[: span.stop - span.start]
            s = head.logits(h, z)
            grad = None if d_hidden is None and sums is None else z
            results.compute(job.kernels, span, z, target[span], job.options, grad)
            ds = None if grad is None else head.rank_gradient(z)
            if d_hidden is not None:
                head.hidden_gradient(z, ds, d_hidden[span])
            if sums is not None:
                sums.add(z, h, s, ds, job.scaling)
        ctx.job = job
        factor = None
        if job.reduction == "mean":
            factor = _one_over_count(target, job.options.ignore_index, results.loss)
        # A sum in float32 takes the factor before it is rounded; half precision keeps its range.
        ctx.folded = sums is not None and sums.exact
        d_head = (None,) * 4 if sums is None else sums.finish(factor if ctx.folded else None)
        again = (hidden, weight, bias, lora_a, lora_b, target, results.lse)
        ctx.save_for_backward(
            d_hidden, factor, *d_head, *(again if results.lse is not None else (None,) * 7)
        )
        loss = _reduce(results.loss, target, job.reduction, job.options.ignore_index)
        others = (results.logprob, results.correct, results.entropy)
        ctx.mark_non_differentiable(*(x for x in others if x is not None))
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, factor, *rest = ctx.saved_tensors
        d_head, again = rest[:4], rest[4:]
        whole = d_loss if factor is None else d_loss * factor
        if ctx.job.reduction == "none" and any(ctx.job.wanted[1:]):
            d_head = _head_gradients(ctx.job, d_loss.contiguous(), *again)
        else:
            d_head = [scaled(x, d_loss if ctx.folded else whole) for x in d_head]
        return scaled(d_hidden, whole), *d_head, None, None


def _head_gradients(
    job: _Job,
    d_losses: Tensor,  # [U]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    lse: Tensor,  # [U]
) -> tuple[Tensor | None, ...]:
    """The head's gradients from logits made again, each row's times its `d_losses`."""
    rows = hidden.shape[0]
    head = _Head.of(weight, bias, lora_a, lora_b, job.scaling)
    chunks = job.chunks(rows)
    sums = HeadGradients((weight, bias, lora_a, lora_b), job.wanted[1:], hidden.dtype, len(chunks))
    buffer = head.buffer(min(rows, job.chunk_rows))
    for span in chunks:
        h, z = hidden[span], buffer[: span.stop - span.start]
        s = head.logits(h, z)
        job.kernels.cross_entropy_bwd(
            z, target[span], lse[span], d_losses[span], z, **job.options.keywords()
        )
        sums.add(z, h, s, head.rank_gradient(z), job.scaling)
    return sums.finish()
