"""Divergence of a linear head's distribution from a teacher's, without the logits of all rows.

As in `linear_cross_entropy`, rows are worked in chunks: the logits of both heads for a chunk, the
divergence, its gradient in place over the logits, and the products of that gradient. The sum has
one factor for all rows, so every gradient is ready, but for that factor, when the forward pass
ends.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.ops.augmented import operand
from lora_engine.ops.context import Context
from lora_engine.ops.head.head_gradients import HeadGradients, scaled
from lora_engine.ops.head.linear_head import (
    HeadParameters,
    LinearHead,
    ParameterGradients,
    WantedHeadGradients,
)
from lora_engine.ops.once_differentiable import once_differentiable
from lora_engine.ops.tensors import accumulate_dtype, check, shape_of, without_autocast
from lora_engine.values import LoraFactors


@dataclass(frozen=True)
class HeadInput:
    """A head and the rows it is put to: logits `softcap(hidden weightᵀ + bias + LoRA)`."""

    hidden: Tensor  # [U, H]
    weight: Tensor  # [V, H], in hidden's dtype
    bias: Tensor | None = None  # [V]
    lora: LoraFactors | None = None
    softcap: float | None = None


class LinearDivergence(NamedTuple):
    """What `linear_divergence` returns."""

    total: Tensor  # scalar float32: the sum over rows
    by_row: Tensor  # [U] float32, detached


@without_autocast
def linear_divergence(
    student: HeadInput,
    teacher: HeadInput,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    impl: str | None = None,
) -> LinearDivergence:
    """Of each row's softmax p of the student's logits from q of the teacher's, in nats.

    beta 0: KL(q, p). beta 1: KL(p, q). Between them beta KL(q, m) + (1 - beta) KL(p, m) with
    m = beta q + (1 - beta) p (arXiv:2306.13649). Both logits are divided by the temperature.
    Differentiable once, in the student's hidden rows and its head; the teacher gets no gradient.
    Logits have hidden's dtype, everything after float32. Extra memory is a chunk of logits of each
    head, `chunk_rows` x V, their float32 copies, and the gradients. impl: "reference", or None.

    Raises ValueError where shapes do not fit, or a number makes no sense.
    """
    name = "linear_divergence"
    for head, who in ((student, "student"), (teacher, "teacher")):
        check(
            head.hidden.dim() == head.weight.dim() == 2
            and head.hidden.shape[1] == head.weight.shape[1]
            and head.hidden.dtype == head.weight.dtype,
            f"{name}: the {who}'s hidden {shape_of(head.hidden)} does not fit its weight "
            f"{shape_of(head.weight)}",
        )
    check(
        len(student.hidden) == len(teacher.hidden) and len(student.weight) == len(teacher.weight),
        f"{name}: {len(student.hidden)} rows of {len(student.weight)} classes, the teacher's "
        f"{len(teacher.hidden)} of {len(teacher.weight)}",
    )
    check(0 <= beta <= 1, f"{name}: beta={beta} is not in [0, 1]")
    check(temperature > 0, f"{name}: temperature={temperature} is not positive")
    if impl == "reference":
        by_row = reference.linear_divergence(student, teacher, beta, temperature)
        return LinearDivergence(by_row.sum(), by_row.detach())
    lora = student.lora
    lora_a, lora_b, scaling = None, None, 0.0
    if lora is not None:
        lora_a, lora_b, scaling = operand(lora.lora_a), operand(lora.lora_b), lora.scaling
    inputs = (operand(student.hidden), operand(student.weight), student.bias, lora_a, lora_b)
    wanted = WantedHeadGradients(*(x is not None and x.requires_grad for x in inputs))
    if not torch.is_grad_enabled():
        wanted = WantedHeadGradients(*(False for _ in inputs))
    rows = chunk_rows or backends.chunk_rows(
        student.hidden.device, student.hidden.dtype, *(len(student.hidden), len(student.weight))
    )
    job = _Job(
        teacher=teacher,
        beta=beta,
        temperature=temperature,
        softcap=student.softcap,
        scaling=scaling,
        chunk_rows=rows,
        wanted=wanted,
    )
    return LinearDivergence(*_LinearDivergence.apply(*inputs, job))


@dataclass(frozen=True)
class _Job:
    teacher: HeadInput
    beta: float
    temperature: float
    softcap: float | None
    scaling: float
    chunk_rows: int
    wanted: WantedHeadGradients


class _Gradients(NamedTuple):
    """The gradients of the function's inputs."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    job: None = None


class _Saved(NamedTuple):
    """What the backward pass reads: the gradients of the inputs for a total whose own is 1."""

    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None
    d_lora_a: Tensor | None
    d_lora_b: Tensor | None


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[None],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        job: _Job,
    ) -> tuple[Tensor, Tensor]:
        parameters = HeadParameters(weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b)
        head, (theirs, their_hidden) = LinearHead.of(parameters, job.scaling), _of(job.teacher)
        step, rows = job.chunk_rows, hidden.shape[0]
        chunks = [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
        by_row = torch.empty(rows, dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if job.wanted.hidden else None
        trains = job.wanted.trains_head
        sums = HeadGradients(parameters, job.wanted, hidden.dtype, len(chunks)) if trains else None
        buffer, other = head.buffer(min(rows, step)), theirs.buffer(min(rows, step))
        for span in chunks:
            count = span.stop - span.start
            z, y = buffer[:count], other[:count]
            s = head.logits(hidden[span], z)
            theirs.logits(their_hidden[span], y)
            by_row[span], dz = _divergence(z, y, job)
            if d_hidden is None and sums is None:
                continue
            z.copy_(dz)
            ds = head.rank_gradient(z)
            if d_hidden is not None:
                head.hidden_gradient(z, ds, d_hidden[span])
            if sums is not None:
                sums.add(z, hidden[span], s, ds, job.scaling)
        d_head = ParameterGradients() if sums is None else sums.finish()
        saved = _Saved(
            d_hidden=d_hidden,
            d_weight=d_head.weight,
            d_bias=d_head.bias,
            d_lora_a=d_head.lora_a,
            d_lora_b=d_head.lora_b,
        )
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(by_row)
        ctx.set_materialize_grads(False)
        return by_row.sum(), by_row

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[None], d_total: Tensor | None, _by_row: None) -> _Gradients:
        saved = _Saved(*ctx.saved_tensors)
        if d_total is None:
            return _Gradients()
        return _Gradients(
            hidden=scaled(saved.d_hidden, d_total),
            weight=scaled(saved.d_weight, d_total),
            bias=scaled(saved.d_bias, d_total),
            lora_a=scaled(saved.d_lora_a, d_total),
            lora_b=scaled(saved.d_lora_b, d_total),
        )


def _of(head: HeadInput) -> tuple[LinearHead, Tensor]:
    """A frozen head, and its hidden rows."""
    lora = head.lora
    parameters = HeadParameters(
        weight=operand(head.weight).detach(),
        bias=None if head.bias is None else head.bias.detach(),
        lora_a=None if lora is None else lora.lora_a.detach(),
        lora_b=None if lora is None else lora.lora_b.detach(),
    )
    scaling = 0.0 if lora is None else lora.scaling
    return LinearHead.of(parameters, scaling), operand(head.hidden).detach()


def _divergence(
    z: Tensor,  # [c, V]: the student's logits, before a soft-cap
    y: Tensor,  # [c, V]: the teacher's
    job: _Job,
) -> tuple[Tensor, Tensor]:
    """Each row's divergence [c], and its gradient in z [c, V], in the type of arithmetic.

    With g the divergence's gradient in p, that in the logits over the temperature is
    p (g - Σ p g); of the forward KL it is p - q.
    """
    logits, slope = _capped(z, job.softcap)
    log_p = (logits / job.temperature).log_softmax(-1)
    log_q = (_capped(y, job.teacher.softcap)[0] / job.temperature).log_softmax(-1)
    p = log_p.exp()
    if job.beta == 0:
        q = log_q.exp()
        rows, d_logits = (q * (log_q - log_p)).sum(-1), p - q
    else:
        if job.beta == 1:
            log_m, share = log_q, 1.0
        else:
            share = 1 - job.beta
            weights = torch.tensor([share, job.beta], dtype=z.dtype, device=z.device)
            own, theirs = weights.to(log_p.dtype).log()
            log_m = torch.logaddexp(log_p + own, log_q + theirs)
        g = share * (log_p - log_m)
        mean = (p * g).sum(-1)
        rows = mean if job.beta == 1 else mean + job.beta * (log_q.exp() * (log_q - log_m)).sum(-1)
        d_logits = p * (g - mean[:, None])
    d_logits /= job.temperature
    return rows, d_logits if slope is None else d_logits * slope


def _capped(z: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """The logits after the soft-cap, and their slope in those before it (None: 1)."""
    z = z.to(accumulate_dtype(z.dtype))
    if softcap is None:
        return z, None
    bent = torch.tanh(z / softcap)
    return softcap * bent, 1 - bent.square()
