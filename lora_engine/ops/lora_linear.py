"""Linear layers with LoRA as one augmented matrix product.

For linears that share their input (q, k, v; gate, up) with weights stacked to W [N, K], adapters
A [R, K] (all ranks stacked) and B [N, R] (block-diagonal), and s = scaling:

    W̃ = [ W  sB ]        S  = X Aᵀ                  Y  = [X | S] W̃[:N]ᵀ
        [ A   0 ]        dS = dY (sB)               dX = [dY | dS] W̃[:, :K]
                         dA = dSᵀ X                 dB = s dYᵀ S

One product with R more inner columns replaces a product and two passes over Y.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.ops import augmented
from lora_engine.ops.tensors import check, matmul, shape_of

ROW_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class LoraFactors:
    """One linear's adapter: `y += scaling * (x lora_aᵀ) lora_bᵀ`."""

    lora_a: Tensor  # [r, K]
    lora_b: Tensor  # [N, r]
    scaling: float


class AugmentedWeight:
    """The buffer W̃ of a group of linears that share their input.

    `weights` [N_i, K] are copied in; read them back with `weight(i)`, a view that a module may use
    as its own weight, so that there is one copy only. `adapters[i]` is None for a linear without
    LoRA. A and B are copied in again whenever they have changed since the last use (by address or
    `Tensor._version`: in-place steps under `torch.no_grad()` count, writes through `.data` do
    not; call `refresh(force=True)` after those).
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        adapters: Sequence[LoraFactors | None],
        biases: Sequence[Tensor | None] | None = None,
    ) -> None:
        check(len(weights) == len(adapters) > 0, "AugmentedWeight: one adapter entry per weight")
        self.biases = tuple(biases) if biases is not None else (None,) * len(weights)
        self.in_features = weights[0].shape[1]
        self.out_features = tuple(weight.shape[0] for weight in weights)
        for weight in weights:
            check(
                weight.dim() == 2
                and weight.shape[1] == self.in_features
                and weight.dtype == weights[0].dtype,
                f"AugmentedWeight: {shape_of(weight)} does not share {shape_of(weights[0])}'s K",
            )
        ranks = [0 if adapter is None else adapter.lora_a.shape[0] for adapter in adapters]
        self.tail = self._padded(sum(ranks), weights[0].dtype)
        n, k = sum(self.out_features), self.in_features
        self.buffer = torch.zeros(
            n + self.tail, k + self.tail, dtype=weights[0].dtype, device=weights[0].device
        )
        rows = _spans(self.out_features)
        columns = _spans(ranks)
        self.rows, self.columns = rows, columns
        for weight, span in zip(weights, rows, strict=True):
            self.buffer[span, :k].copy_(weight.detach())
        self.adapters = tuple(adapters)
        for i, adapter in enumerate(adapters):
            if adapter is not None:
                self._check_adapter(i, adapter)
        self._seen: tuple[Any, ...] = ()

    def _padded(self, rank: int, dtype: torch.dtype) -> int:
        """Spare columns for `rank`, such that rows of K + R and of N + R start aligned."""
        step = max(1, ROW_ALIGNMENT_BYTES // dtype.itemsize)
        return -(-rank // step) * step

    def _check_adapter(self, i: int, adapter: LoraFactors) -> None:
        rank = adapter.lora_a.shape[0]
        check(
            adapter.lora_a.shape == (rank, self.in_features)
            and adapter.lora_b.shape == (self.out_features[i], rank),
            f"AugmentedWeight: lora_a {shape_of(adapter.lora_a)} and lora_b "
            f"{shape_of(adapter.lora_b)} do not fit weight "
            f"[{self.out_features[i]}, {self.in_features}]",
        )

    def weight(self, i: int) -> Tensor:
        """Linear i's weight [N_i, K], a view of the buffer."""
        return self.buffer[self.rows[i], : self.in_features]

    def refresh(self, *, force: bool = False) -> None:
        """Copies A and scaling * B into the buffer, if they have changed."""
        seen = tuple(
            (factor.data_ptr(), factor._version)
            for adapter in self.adapters
            if adapter is not None
            for factor in (adapter.lora_a, adapter.lora_b)
        )
        if seen == self._seen and not force:
            return
        n, k = sum(self.out_features), self.in_features
        with torch.no_grad():
            for adapter, rows, columns in zip(self.adapters, self.rows, self.columns, strict=True):
                if adapter is None:
                    continue
                rank_rows = slice(n + columns.start, n + columns.stop)
                rank_columns = slice(k + columns.start, k + columns.stop)
                self.buffer[rank_rows, :k].copy_(adapter.lora_a)
                self.buffer[rows, rank_columns].copy_(adapter.lora_b * adapter.scaling)
        self._seen = seen


def lora_linear(
    x: Tensor, weight: AugmentedWeight, *, impl: str | None = None
) -> tuple[Tensor, ...]:
    """The outputs [..., N_i] of every linear of the group for `x` [..., K], in x's dtype.

    LoRA as in arXiv:2106.09685 without dropout. Gradients: x, every lora_a and lora_b (in their
    own dtype), and biases that require one; the base weight is frozen. x and the gradients are
    used without a copy where their maker left room behind each row (`tail=` of `rms_norm`,
    `swiglu`, `attention`).

    Raises ValueError where x does not fit the weight.
    """
    check(
        x.shape[-1] == weight.in_features and x.dtype == weight.buffer.dtype,
        f"lora_linear: x {shape_of(x)} does not fit weight "
        f"[{sum(weight.out_features)}, {weight.in_features}] {weight.buffer.dtype}",
    )
    if backends.select("lora_linear", x.device, x.dtype, impl) == "reference":
        return _reference(x, weight)
    weight.refresh()
    factors: list[Tensor | None] = []
    for adapter in weight.adapters:
        factors += (adapter.lora_a, adapter.lora_b) if adapter is not None else (None, None)
    outputs: tuple[Tensor, ...] = _LoraLinear.apply(x, weight, weight.buffer, *factors)
    return tuple(
        y if bias is None else y + bias for y, bias in zip(outputs, weight.biases, strict=True)
    )


def _reference(x: Tensor, weight: AugmentedWeight) -> tuple[Tensor, ...]:
    outputs = []
    for i, (adapter, bias) in enumerate(zip(weight.adapters, weight.biases, strict=True)):
        if adapter is None:
            outputs.append(torch.nn.functional.linear(x, weight.weight(i), bias))
        else:
            outputs.append(
                reference.lora_linear(
                    x, weight.weight(i), adapter.lora_a, adapter.lora_b, adapter.scaling, bias
                )
            )
    return tuple(outputs)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: AugmentedWeight, buffer: Tensor, *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        n, k = sum(weight.out_features), weight.in_features
        xs = augmented.claim([x], weight.tail)
        if weight.tail:
            torch.mm(xs[:, :k], buffer[n:, :k].t(), out=xs[:, k:])
        y = matmul(xs, buffer[:n].t())
        ctx.weight, ctx.shape = weight, x.shape
        ctx.save_for_backward(xs, buffer, *factors)
        outputs = y.split(list(weight.out_features), dim=1)
        return tuple(part.view(*x.shape[:-1], part.shape[1]) for part in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight: AugmentedWeight = ctx.weight
        xs, buffer, *factors = ctx.saved_tensors
        n, k = sum(weight.out_features), weight.in_features
        dys = augmented.claim(grads, weight.tail)
        d_s = dys[:, n:]
        if weight.tail:
            _project_back(weight, buffer, dys, d_s)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = matmul(dys, buffer[:, :k]).view(ctx.shape)
        d_factors: list[Tensor | None] = [None] * len(factors)
        # dA of the whole group in one product: its rows are the ranks of every adapter.
        d_a = torch.mm(d_s.t(), xs[:, :k]) if any(ctx.needs_input_grad[3::2]) else None
        for i, (adapter, rows, columns) in enumerate(
            zip(weight.adapters, weight.rows, weight.columns, strict=True)
        ):
            if adapter is None:
                continue
            if d_a is not None and ctx.needs_input_grad[3 + 2 * i]:
                d_factors[2 * i] = d_a[columns].to(adapter.lora_a.dtype)
            if ctx.needs_input_grad[4 + 2 * i]:
                s = xs[:, k + columns.start : k + columns.stop]
                d_b = torch.mm(dys[:, rows].t(), s)
                d_factors[2 * i + 1] = d_b.to(adapter.lora_b.dtype) * adapter.scaling
        return (dx, None, None, *d_factors)


def _project_back(weight: AugmentedWeight, buffer: Tensor, dys: Tensor, d_s: Tensor) -> None:
    """dS = dY (sB), each linear's block of B alone; the padding between and behind is zero."""
    k = weight.in_features
    used = 0
    for adapter, rows, columns in zip(weight.adapters, weight.rows, weight.columns, strict=True):
        if adapter is not None:
            block = buffer[rows, k + columns.start : k + columns.stop]
            torch.mm(dys[:, rows], block, out=d_s[:, columns])
            used = columns.stop
    d_s[:, used:].zero_()


def _spans(widths: Sequence[int]) -> list[slice]:
    """Consecutive slices of the given widths."""
    spans, start = [], 0
    for width in widths:
        spans.append(slice(start, start + width))
        start += width
    return spans
