"""Cross-entropy of a linear head without the logits of all rows.

Rows are worked in chunks: logits of a chunk, softmax and gradient in place over them, then the
products of that gradient with the head and with the hidden rows. A reduced loss has one factor for
all rows, so every gradient is ready, but for that factor, when the forward pass ends. Without a
reduction the backward pass brings a factor for each row: the hidden rows' gradient is still ready
but for it, and a head that is trained gets its own from logits made again. So does a gradient that
arrives at the entropy, which is rare.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import contracts, launchers
from lora_engine.ops.augmented import operand
from lora_engine.ops.context import Context
from lora_engine.ops.cross_entropy import LossOptions, RowResults, check_targets
from lora_engine.ops.head.head_gradients import HeadGradients, scaled
from lora_engine.ops.head.linear_head import (
    HeadParameters,
    LinearHead,
    ParameterGradients,
    WantedHeadGradients,
)
from lora_engine.ops.head.logits_again import LogitsAgain
from lora_engine.ops.once_differentiable import once_differentiable
from lora_engine.ops.tensors import accumulate_dtype, check, shape_of, without_autocast
from lora_engine.values import LoraFactors


class LinearCrossEntropy(NamedTuple):
    """What `linear_cross_entropy` returns."""

    loss: Tensor  # float32: a scalar, or [U] for reduction="none"
    logprobs: Tensor  # [U] float32, detached: log-probability of each target, 0 where ignored
    correct: Tensor  # [U] bool: whether the target has the largest logit
    entropy: Tensor | None = None  # [U] float32: of the softmax, in nats; if asked for
    mean_logit: Tensor | None = None  # [U] float32, detached: over the classes; if asked for


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
    temperature: float = 1.0,
    entropy: bool = False,
    mean_logit: bool = False,
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
    `temperature` divides the logits, by way of hidden and bias; it does not go with a soft-cap.

    Loss and entropy are differentiable once, in hidden, weight, bias and the adapter; only what
    requires a gradient gets one. With "none" and no extras the loss is -log p(target), for
    objectives made of log-probabilities. Extra memory is one chunk of logits, `chunk_rows` x V
    (not given: as `backends.chunk_rows` chooses), the gradients, and a float32 copy of a trained
    half-precision head's while they are summed.

    Raises ValueError where shapes or dtypes do not fit, a target is not a row of weight, or an
    option is no sensible number.
    """
    options = LossOptions(
        ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=softcap, z_loss=z_loss
    )
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
    check(
        0 < temperature < math.inf and (temperature == 1 or softcap is None),
        f"linear_cross_entropy: temperature={temperature} is not positive, or there is a softcap",
    )
    check_targets(hidden.shape[0], weight.shape[0], target, ignore_index, "linear_cross_entropy")
    impl = backends.select("linear_cross_entropy", hidden.device, hidden.dtype, impl)
    hidden, weight = operand(hidden), operand(weight)
    if lora is not None:
        lora = replace(lora, lora_a=operand(lora.lora_a), lora_b=operand(lora.lora_b))
    if impl == "reference":
        by_row = reference.linear_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias,
            lora=lora,
            temperature=temperature,
            **options.keywords(),
        )
        loss = _reduce(by_row.loss, target, reduction, ignore_index)
        return LinearCrossEntropy(
            loss=loss,
            logprobs=by_row.logprob.detach(),
            correct=by_row.correct,
            entropy=by_row.entropy if entropy else None,
            mean_logit=by_row.mean_logit if mean_logit else None,
        )
    if temperature != 1:
        hidden, bias = hidden / temperature, None if bias is None else bias / temperature
    lora_a, lora_b, scaling = None, None, 0.0
    if lora is not None:
        lora_a, lora_b, scaling = lora.lora_a, lora.lora_b, lora.scaling
    inputs = (hidden, weight, bias, lora_a, lora_b)
    wanted = WantedHeadGradients(
        hidden=_requires_grad(hidden),
        weight=_requires_grad(weight),
        bias=_requires_grad(bias),
        lora_a=_requires_grad(lora_a),
        lora_b=_requires_grad(lora_b),
    )
    extents = hidden.shape[0], weight.shape[0]
    rows = chunk_rows or backends.chunk_rows(hidden.device, hidden.dtype, *extents)
    kernels = launchers.cross_entropy(impl)
    job = _Job(
        options=options,
        reduction=reduction,
        entropy=entropy,
        mean_logit=mean_logit,
        chunk_rows=rows,
        scaling=scaling,
        wanted=wanted,
        kernels=kernels,
    )
    return LinearCrossEntropy(*_LinearCrossEntropy.apply(*inputs, target.contiguous(), job))


def _requires_grad(x: Tensor | None) -> bool:
    return torch.is_grad_enabled() and x is not None and x.requires_grad


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
        check(
            lora.magnitude is None and lora.bias is None,
            f"{name}: an adapter with a magnitude or a bias; add scaling * lora.bias to bias",
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
    mean_logit: bool
    chunk_rows: int
    scaling: float
    wanted: WantedHeadGradients
    kernels: contracts.CrossEntropy

    def chunks(self, rows: int) -> list[slice]:
        step = self.chunk_rows
        return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


class _Gradients(NamedTuple):
    """The gradients of the function's inputs."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    target: None = None
    job: None = None


class _Kept(NamedTuple):
    job: _Job
    folded: bool  # whether the head's gradients hold the factor of a mean already


class _Saved(NamedTuple):
    """What the backward pass reads."""

    # The gradients of the sum of the losses, but for a factor that is still to come.
    d_hidden: Tensor | None = None  # [U, H]
    d_weight: Tensor | None = None  # [V, H]
    d_bias: Tensor | None = None  # [V]
    d_lora_a: Tensor | None = None  # [r, H]
    d_lora_b: Tensor | None = None  # [V, r]
    factor: Tensor | None = None  # []: 1 / the rows that count, for a mean
    # What logits are made of again; None where they are not.
    hidden: Tensor | None = None  # [U, H]
    weight: Tensor | None = None  # [V, H]
    bias: Tensor | None = None  # [V]
    lora_a: Tensor | None = None  # [r, H]
    lora_b: Tensor | None = None  # [V, r]
    target: Tensor | None = None  # [U] int64
    lse: Tensor | None = None  # [U] float32
    entropy: Tensor | None = None  # [U] float32

    def head_gradients(self) -> ParameterGradients:
        return ParameterGradients(
            weight=self.d_weight, bias=self.d_bias, lora_a=self.d_lora_a, lora_b=self.d_lora_b
        )

    def logits_again(self, job: _Job) -> LogitsAgain:
        hidden, weight, target, lse = self.hidden, self.weight, self.target, self.lse
        assert hidden is not None and weight is not None
        assert target is not None and lse is not None
        return LogitsAgain(
            parameters=HeadParameters(
                weight=weight, bias=self.bias, lora_a=self.lora_a, lora_b=self.lora_b
            ),
            wanted=job.wanted,
            scaling=job.scaling,
            chunks=job.chunks(hidden.shape[0]),
            hidden=hidden,
            target=target,
            lse=lse,
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[_Kept],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        target: Tensor,
        job: _Job,
    ) -> tuple[Tensor | None, ...]:
        rows, per_row, trains_head = (
            hidden.shape[0],
            job.reduction == "none",
            job.wanted.trains_head,
        )
        parameters = HeadParameters(weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b)
        head = LinearHead.of(parameters, job.scaling)
        chunks = job.chunks(rows)
        # The backward pass may need logits again: for the head's gradients, or the entropy's.
        again = any(job.wanted) and (job.entropy or (per_row and trains_head))
        results = RowResults(rows, hidden, entropy=job.entropy, lse=again)
        means = results.loss.new_empty(rows) if job.mean_logit else None
        d_hidden = torch.empty_like(hidden) if job.wanted.hidden else None
        sums = None
        if trains_head and not per_row:
            sums = HeadGradients(parameters, job.wanted, hidden.dtype, len(chunks))
        buffer = head.buffer(min(rows, job.chunk_rows))
        for span in chunks:
            h, z = hidden[span], buffer[: span.stop - span.start]
            s = head.logits(h, z)
            if means is not None:
                means[span] = _mean(z, job.options.softcap)
            grad = None if d_hidden is None and sums is None else z
            results.compute(job.kernels, span, z, target[span], job.options, grad)
            ds = None if grad is None else head.rank_gradient(z)
            if d_hidden is not None:
                head.hidden_gradient(z, ds, d_hidden[span])
            if sums is not None:
                sums.add(z, h, s, ds, job.scaling)
        factor = None
        if job.reduction == "mean":
            factor = _one_over_count(target, job.options.ignore_index, results.loss)
        # Sums in float32 are multiplied by the mean's factor here, before they are rounded. Sums in
        # half precision are left as they are: the factor could take small ones out of its range.
        folded = sums is not None and sums.exact
        d_head = ParameterGradients()
        if sums is not None:
            d_head = sums.finish(factor if folded else None)
        ctx.kept = _Kept(job, folded)
        saved = _Saved(
            d_hidden=d_hidden,
            d_weight=d_head.weight,
            d_bias=d_head.bias,
            d_lora_a=d_head.lora_a,
            d_lora_b=d_head.lora_b,
            factor=factor,
        )
        if again:
            saved = saved._replace(
                hidden=hidden,
                weight=weight,
                bias=bias,
                lora_a=lora_a,
                lora_b=lora_b,
                target=target,
                lse=results.lse,
                entropy=results.entropy,
            )
        ctx.save_for_backward(*saved)
        loss = _reduce(results.loss, target, job.reduction, job.options.ignore_index)
        if means is not None:
            means.masked_fill_(target == job.options.ignore_index, 0)
        others = (results.logprob, results.correct, means)
        ctx.mark_non_differentiable(*(x for x in others if x is not None))
        ctx.set_materialize_grads(False)
        return loss, results.logprob, results.correct, results.entropy, means

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Context[_Kept],
        d_loss: Tensor | None,
        _logprob: None,
        _correct: None,
        d_entropy: Tensor | None,
        _mean_logit: None,
    ) -> _Gradients:
        job, folded = ctx.kept
        saved = _Saved(*ctx.saved_tensors)
        d_hidden: Tensor | None = None
        d_head = ParameterGradients()
        if d_loss is not None:
            whole = d_loss if saved.factor is None else d_loss * saved.factor
            d_hidden = scaled(saved.d_hidden, whole)
            if job.reduction == "none" and job.wanted.trains_head:
                logits = saved.logits_again(job)
                d_head = logits.loss_gradients(d_loss.contiguous(), job.kernels, job.options)
            else:
                factor = d_loss if folded else whole
                d_head = ParameterGradients(*(scaled(x, factor) for x in saved.head_gradients()))
        if d_entropy is not None:
            assert saved.entropy is not None
            more_hidden, more_head = saved.logits_again(job).entropy_gradients(
                d_entropy, saved.entropy, job.options
            )
            d_hidden = _sum(d_hidden, more_hidden)
            d_head = ParameterGradients(*map(_sum, d_head, more_head))
        return _Gradients(
            hidden=d_hidden,
            weight=d_head.weight,
            bias=d_head.bias,
            lora_a=d_head.lora_a,
            lora_b=d_head.lora_b,
        )


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _mean(
    logits: Tensor,  # [c, V]
    softcap: float | None,
) -> Tensor:
    """Each row's mean after the soft-cap, [c] in the type arithmetic is done in."""
    dtype = accumulate_dtype(logits.dtype)
    if softcap is None:
        return logits.mean(-1, dtype=dtype)
    return (softcap * torch.tanh(logits.to(dtype) / softcap)).mean(-1)
