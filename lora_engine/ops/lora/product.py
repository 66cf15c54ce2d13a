"""The products of a group of linears, forward and backward, on plain tensors.

    S  = X Aᵀ                  Y  = X Wᵀ + S (sB)ᵀ   = [X | S] [W | sB]ᵀ
    dS = dY (sB)               dX = dY W + dS A      = [dY | dS] [W; A]
    dA = dSᵀ X                 dB = s dYᵀ S

On the right of Y and dX: the augmented product, where the base weight can be lent with the factors.
Which way is taken is the group's strategy.
Variants change S alone, or Y and dY alone, and leave the products as they are:
dropout masks X on its way into S (and dS A on its way out, so that dX is two products);
rows routed by adapter have the columns of S and dS of all other adapters zeroed;
DoRA multiplies each column of Y, and of dY before anything else, by magnitude / norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.backends import contracts
from lora_engine.ops import augmented
from lora_engine.ops.lora.group import Filling, LoraGroup
from lora_engine.ops.tensors import accumulate_dtype, empty_rows, matmul
from lora_engine.values import Dropout


@dataclass(frozen=True)
class LoraProduct:
    """One call of a group, and what varies from call to call.

    filling: the adapters of this call, whose factors are in place while its forward pass runs.
    kernels: what launches the products.
    columns: which columns of S each row uses, [M, R] bool; None: all.
    """

    group: LoraGroup
    filling: Filling
    kernels: contracts.LoraLinear
    dropout: Dropout | None = None
    columns: Tensor | None = None

    @property
    def spans(self) -> Sequence[tuple[slice, slice]]:
        """For each linear its rows of W and its columns of B."""
        return self.filling.adapters.spans

    def begin_backward(self) -> None:
        """Places this call's factors again, if a later call placed others."""
        self.group.fill_again(self.filling)

    def forward(
        self,
        xs: Tensor,  # [M, K + R]
        residual: Tensor | None = None,  # [M, N]
    ) -> tuple[Tensor, Tensor | None]:
        """Y [M, N] with biases and `residual` added, and with DoRA also Y before its scale.

        X stands in the front columns of `xs`; S is written behind it.
        """
        k = self.group.in_features
        return self.forward_apart(xs[:, :k], xs[:, k:], residual, xs)

    def forward_apart(
        self,
        x: Tensor,  # [M, K]
        s: Tensor,  # [M, R]
        residual: Tensor | None = None,  # [M, N]
        joined: Tensor | None = None,  # [M, K + R]
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` for an X that stands anywhere; `joined` is x and s as one, if they are."""
        placed = self.group.placed
        if placed.rank:
            self.kernels.lora_a_fwd(x, placed.lora_a, s, self.spans, self.dropout)
            if self.columns is not None:
                s.mul_(self.columns)
        bias, dora = self.filling.bias, self.filling.dora
        if dora is None:
            first, second = (residual, None) if bias is None else (bias, residual)
            y = self._products(x, s, joined, first)
            return (y if second is None else y.add_(second)), None
        unscaled = self._products(x, s, joined, None)
        y = torch.mul(unscaled, dora.scale).to(unscaled.dtype)
        for addend in (bias, residual):
            if addend is not None:
                y += addend
        return y, unscaled

    def _products(
        self, x: Tensor, s: Tensor, joined: Tensor | None, addend: Tensor | None
    ) -> Tensor:
        """X Wᵀ + S (sB)ᵀ + addend, for S that is made; addend is [N] or [M, N]."""
        base, placed = self.group.base, self.group.placed
        strategy = self.group.forward_strategy(x.shape[0])
        if strategy == "augmented":
            if joined is None:
                joined = torch.cat((x, s), dim=1)
            with base.forward_operand(placed.lora_b) as operand:
                return _matmul(joined, operand.t(), addend)
        n = placed.lora_b.shape[0]
        y = empty_rows(x.shape[0], n, dtype=x.dtype, device=x.device)
        if strategy == "two_segment":
            vector = addend if addend is not None and addend.dim() == 1 else None
            for rows, weight in base.blocks():
                bias = None if vector is None else vector[rows]
                self.kernels.lora_linear_fwd(x, weight, s, placed.lora_b[rows], y[:, rows], bias)
            return y if addend is None or vector is not None else y.add_(addend)
        for rows, weight in base.blocks():
            if addend is None:
                torch.mm(x, weight.t(), out=y[:, rows])
            else:
                torch.addmm(addend[..., rows], x, weight.t(), out=y[:, rows])
        return y.addmm_(s, placed.lora_b.t()) if placed.rank else y

    def claim_gradient(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradients of Y side by side with room for dS behind, [M, N + R], DoRA's scale in."""
        rank, dora = self.group.padded_rank, self.filling.dora
        if dora is None:
            return augmented.claim(grads, rank)
        flat = torch.cat([grad.reshape(-1, grad.shape[-1]) for grad in grads], dim=1)
        n = flat.shape[1]
        buffer = empty_rows(flat.shape[0], n + rank, dtype=flat.dtype, device=flat.device)
        torch.mul(flat, dora.scale, out=buffer[:, :n])
        return buffer

    def fill_ds(
        self, dys: Tensor, s: Tensor, *, wanted: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Writes dS [M, R] behind dY in `dys` [M, N + R]; returns it, and dYᵀ S [N, R], if wanted.

        None for either without adapters.
        """
        lora_b = self.group.placed.lora_b
        n, rank = lora_b.shape
        if not rank:
            return None, None
        dy, ds = dys.split((n, rank), dim=1)
        d_lora_b = None
        if wanted:
            d_lora_b = torch.empty(n, rank, dtype=accumulate_dtype(dys.dtype), device=dys.device)
        self.kernels.lora_b_bwd(dy, lora_b, s, ds, d_lora_b, self.spans)
        if self.columns is not None:
            ds.mul_(self.columns)
        return ds, d_lora_b

    def input_gradient(self, dys: Tensor) -> Tensor:
        """dX [M, K] from `dys` with dS filled in."""
        base, lora_a = self.group.base, self.group.placed.lora_a
        rank, k = lora_a.shape
        n = dys.shape[1] - rank
        masked = self.dropout is not None and rank > 0
        if self.group.backward_strategy(dys.shape[0], masked=masked) == "augmented":
            with base.backward_operand(lora_a) as operand:
                return matmul(dys, operand)
        dx = empty_rows(dys.shape[0], k, dtype=dys.dtype, device=dys.device)
        for rows, weight in base.blocks():
            if rows.start == 0:  # with the adapters' share, all of it
                self.kernels.lora_linear_dx(
                    dys[:, rows], weight, dys[:, n:], lora_a, dx, self.spans, self.dropout
                )
            else:
                dx.addmm_(dys[:, rows], weight)
        return dx

    def lora_a_gradient(self, ds: Tensor | None, x: Tensor, *, wanted: bool) -> Tensor | None:
        """dSᵀ X [R, K], if wanted."""
        if not wanted or ds is None:
            return None
        shape = self.group.placed.lora_a.shape
        d_lora_a = torch.empty(shape, dtype=accumulate_dtype(ds.dtype), device=ds.device)
        self.kernels.lora_a_bwd(ds, x, d_lora_a, self.spans, self.dropout)
        return d_lora_a

    def factor_gradients(
        self,
        needs: Sequence[bool],
        d_lora_a: Tensor | None,
        d_lora_b: Tensor | None,
        grads: Sequence[Tensor],
        unscaled: Tensor | None,
    ) -> list[Tensor | None]:
        """Gradients of `filling.tensors()`, each in its tensor's dtype, where `needs` says so.

        `grads` are those of Y as they arrived, `unscaled` is Y before DoRA's scale. d_lora_a and
        d_lora_b are used up: the gradients may be parts of them.
        """
        blocks, dora = self.filling.adapters.blocks, self.filling.dora
        found: list[Tensor | None] = [None] * len(needs)
        for i, block in enumerate(blocks):
            factors = block.factors
            if needs[3 * i] and d_lora_a is not None:
                d_a = _part(d_lora_a, factors.lora_a, block.columns)
                found[3 * i] = d_a.to(factors.lora_a.dtype)
            if needs[3 * i + 1] and d_lora_b is not None:
                d_b = _part(d_lora_b, factors.lora_b, block.rows, block.columns)
                found[3 * i + 1] = d_b.mul_(factors.scaling).to(factors.lora_b.dtype)
            if needs[3 * i + 2] and unscaled is not None and dora is not None:
                dy = grads[block.linear].reshape(unscaled.shape[0], -1).to(dora.norm.dtype)
                d_scale = (dy * unscaled[:, block.rows]).sum(0) / dora.norm[block.rows]
                found[3 * i + 2] = d_scale.to(factors.lora_a.dtype)
        start = 3 * len(blocks)
        of_linears = slice(start, start + len(self.filling.biases))
        found[start:] = self._bias_gradients(needs[of_linears], needs[of_linears.stop :], grads)
        return found

    def _bias_gradients(
        self, needs_linear: Sequence[bool], needs_block: Sequence[bool], grads: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Gradients of every linear's bias, then of every block's."""
        blocks, biases = self.filling.adapters.blocks, self.filling.biases
        sums: dict[int, Tensor] = {}
        for i, grad in enumerate(grads):
            ours = [n for n, b in zip(needs_block, blocks, strict=True) if b.linear == i]
            if needs_linear[i] or any(ours):
                flat = grad.reshape(-1, grad.shape[-1])
                sums[i] = flat.sum(0, dtype=accumulate_dtype(flat.dtype))
        found: list[Tensor | None] = []
        for i, (needed, bias) in enumerate(zip(needs_linear, biases, strict=True)):
            found.append(sums[i].to(bias.dtype) if needed and bias is not None else None)
        for needed, block in zip(needs_block, blocks, strict=True):
            d_bias, bias = None, block.factors.bias
            if needed and bias is not None:
                d_bias = (sums[block.linear] * block.factors.scaling).to(bias.dtype)
            found.append(d_bias)
        return found

    def wants(self, needs: Sequence[bool]) -> tuple[bool, bool]:
        """Whether any lora_a, and whether any lora_b, needs a gradient."""
        count = 3 * len(self.filling.adapters.blocks)
        return any(needs[:count:3]), any(needs[1:count:3])


def _part(whole: Tensor, factor: Tensor, *place: slice) -> Tensor:
    """A factor's own part of the gradients of all factors."""
    return whole if whole.shape == factor.shape else whole[place]


def _matmul(a: Tensor, b: Tensor, addend: Tensor | None) -> Tensor:
    """`a @ b + addend`, rounded once."""
    if addend is None:
        return matmul(a, b)
    out = empty_rows(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    return torch.addmm(addend, a, b, out=out)
