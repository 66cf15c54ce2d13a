"""The products of a group of linears, forward and backward, on plain tensors.

    S  = X Aᵀ                  Y  = X Wᵀ + S (sB)ᵀ   = [X | S] [W | sB]ᵀ
    dS = dY (sB)               dX = dY W + dS A      = [dY | dS] [W; A]
    dA = dSᵀ X                 dB = s dYᵀ S

The right-hand forms of Y and dX are one augmented product each, possible where the base weight is
lent together with the factors; the group's strategy decides. Variants change operands and results,
not the products:
dropout masks X in the product S = X Aᵀ, and the term dS A of dX, which then takes two products;
with routed rows the columns of S and dS of other adapters are zeroed in each row;
DoRA multiplies each column of Y by magnitude / norm, and so each column of dY first of all;
where the base merges, W is Q(W + s B A), Y = X Wᵀ and dX = dY W, and the rest is as above: the
straight-through gradients of A and B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.backends import lora_contracts
from lora_engine.backends.lora_parts import (
    Added,
    DyGradients,
    ScaledColumns,
    ScaledRows,
    XGradient,
    split_parts,
)
from lora_engine.backends.products import copies_no_addend, multiply
from lora_engine.ops import augmented
from lora_engine.ops.lora.added import added_gradients
from lora_engine.ops.lora.group import Filling, LoraGroup
from lora_engine.ops.lora.trained import OfAdapter, OfGroup
from lora_engine.ops.tensors import accumulate_dtype, empty_rows, matmul
from lora_engine.values import Dropout


class WantedFactorGradients(NamedTuple):
    """Whether gradients of any A and of any B are wanted, and where they are added.

    added: empty where they are results, for autograd.
    """

    lora_a: bool
    lora_b: bool
    added: Sequence[Added] = ()


@dataclass(frozen=True)
class LoraProduct:
    """One call of a group, and what varies from call to call.

    filling: the adapters of this call, whose factors are in place while its forward pass runs.
    kernels: what launches the products.
    columns: which columns of S each row uses, [M, R] bool; None: all.
    """

    group: LoraGroup
    filling: Filling
    kernels: lora_contracts.LoraLinear
    dropout: Dropout | None = None
    columns: Tensor | None = None

    @property
    def spans(self) -> Sequence[tuple[slice, slice]]:
        """For each linear its rows of W and its columns of B."""
        return self.filling.adapters.spans

    def begin_backward(self) -> None:
        """Places this call's factors again, if a later call placed others."""
        self.group.fill_again(self.filling, self.kernels)

    def forward(
        self,
        xs: augmented.Joined,  # [M, K + R]
        residual: Tensor | None = None,  # [M, N]
        copy: Tensor | None = None,  # [M, R]
        residual_copy: Tensor | None = None,  # [M, N]
    ) -> tuple[Tensor, Tensor | None]:
        """Y [M, N] with biases and `residual` added, and with DoRA also Y before its scale.

        X is `xs.front`; S is written to `xs.behind`, and to `copy`. `residual_copy`, for a product
        that `adds_to` one, holds the residual before the call and Y after it.
        """
        self.fill_s(xs.front, xs.behind, copy)
        return self.forward_with(xs.front, xs.behind, residual, xs.whole, residual_copy)

    def forward_apart(
        self,
        x: Tensor,  # [M, K]
        s: Tensor,  # [M, R]
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` for an X that stands anywhere."""
        self.fill_s(x, s)
        return self.forward_with(x, s)

    def fill_s(
        self,
        x: Tensor,  # [M, K]
        s: Tensor,  # [M, R]
        copy: Tensor | None = None,  # [M, R]
    ) -> None:
        """Writes S of x, to `copy` too."""
        placed = self.group.placed
        if placed.rank:
            self.kernels.lora_a_fwd(x, placed.lora_a, s, self.spans, self.dropout, copy)
            self.route(s, copy)

    def route(self, *copies: Tensor | None) -> None:
        """Zeroes, in copies of S or dS [M, R], the columns that a row does not use."""
        if self.columns is not None:
            for s in copies:
                if s is not None:
                    s.mul_(self.columns)

    def forward_with(
        self,
        x: Tensor,  # [M, K]
        s: Tensor,  # [M, R]
        residual: Tensor | None = None,  # [M, N]
        joined: Tensor | None = None,  # [M, K + R]
        residual_copy: Tensor | None = None,  # [M, N]
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` with S that is made; `joined` is x and s as one, if they are."""
        bias, dora = self.filling.bias, self.filling.dora
        if residual_copy is not None:
            return self._products(x, s, joined, None, residual_copy), None
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

    def adds_to(self, rows: int) -> bool:
        """Whether Y of so many rows is to be added to a copy of the residual, rounded once.

        Not where the product reads an addend of its own.
        """
        plain = self.filling.bias is None and self.filling.dora is None
        base, strategy = self.group.base, self.group.forward_strategy(rows)
        reads = strategy == "augmented" and copies_no_addend(base.device, base.dtype)
        return plain and not reads and strategy != "two_segment"

    def _products(
        self,
        x: Tensor,
        s: Tensor,
        joined: Tensor | None,
        addend: Tensor | None,
        total: Tensor | None = None,
    ) -> Tensor:
        """X Wᵀ + S (sB)ᵀ + addend, for S that is made; addend is [N] or [M, N].

        Or that added to `total` [M, N], without addend.
        """
        base, lora_b = self.filling.base, self.filling.added.lora_b
        strategy = self.group.forward_strategy(x.shape[0])
        if strategy == "augmented":
            if joined is None:
                joined = torch.cat((x, s), dim=1)
            with base.forward_operand(lora_b) as operand:
                if total is not None:
                    return multiply(total, joined, operand, total)
                return _matmul(joined, operand, addend)
        n, rank = lora_b.shape
        y = total
        if y is None:
            y = empty_rows(x.shape[0], n, dtype=x.dtype, device=x.device)
        if strategy == "two_segment":
            vector = addend if addend is not None and addend.dim() == 1 else None
            for rows, weight in base.blocks():
                bias = None if vector is None else vector[rows]
                self.kernels.lora_linear_fwd(x, weight, s, lora_b[rows], y[:, rows], bias)
            return y if addend is None or vector is not None else y.add_(addend)
        for rows, weight in base.blocks():
            part = y[:, rows]
            added = None if addend is None else addend[..., rows]
            multiply(part, x, weight.t(), part if total is not None else added)
        return multiply(y, s, lora_b.t(), y) if rank else y

    def claim_gradient(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradients of Y side by side, times DoRA's scale, and columns for dS: [M, N + R]."""
        rank, dora = self.group.padded_rank, self.filling.dora
        if dora is None:
            return augmented.claim(grads, rank)
        flat = torch.cat([grad.reshape(-1, grad.shape[-1]) for grad in grads], dim=1)
        n = flat.shape[1]
        buffer = empty_rows(flat.shape[0], n + rank, dtype=flat.dtype, device=flat.device)
        torch.mul(flat, dora.scale, out=buffer[:, :n])
        return buffer

    def fill_ds(
        self,
        dys: Tensor,
        s: Tensor,
        wanted: WantedFactorGradients,
        scaled: ScaledRows | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Writes dS [M, R] into the last R columns of `dys` [M, N + R]; the first N hold dY.

        Returns the view of dS, and dB [E]: each adapter's s dYᵀ S, one after the other, which
        `lora_parts.split_parts` takes apart. dB is None where B needs no gradient, and where the
        kernel adds it to `wanted.added`. `scaled.ds` gets dS with its rows scaled. Without
        adapters nothing is written, and both are None.
        """
        if not self.group.padded_rank:
            return None, None
        dy, ds = dys.split_with_sizes(self.group.placed.lora_b.shape, dim=1)
        made = self.dy_gradients(ds, s, wanted, scaled)
        self.kernels.lora_b_bwd(
            dy,
            made.lora_b,
            made.s,
            made.ds,
            made.d_lora_b,
            made.spans,
            parts=made.parts,
            scaled=made.scaled,
            added=wanted.added if wanted.lora_b else (),
        )
        self.route(made.ds, None if scaled is None else scaled.ds)
        return made.ds, made.d_lora_b

    def dy_gradients(
        self, ds: Tensor, s: Tensor, wanted: WantedFactorGradients, scaled: ScaledRows | None = None
    ) -> DyGradients:
        """What is to be made of dY, not yet written, with dS [M, R] at `ds`; see `fill_ds`."""
        lora_b, d_lora_b, adapters = self.group.placed.lora_b, None, self.filling.adapters
        if wanted.lora_b and not wanted.added:
            dtype = accumulate_dtype(ds.dtype)
            d_lora_b = torch.empty(adapters.size_of_b, dtype=dtype, device=ds.device)
        return DyGradients(
            lora_b=lora_b,
            s=s,
            ds=ds,
            d_lora_b=d_lora_b,
            spans=adapters.spans,
            parts=adapters.parts,
            scaled=scaled,
        )

    def input_gradient(self, dys: Tensor) -> Tensor:
        """dX [M, K] from `dys` with dS filled in."""
        base, lora_a = self.filling.base, self.filling.added.lora_a
        rank, k = lora_a.shape
        n = dys.shape[1] - rank
        masked = self.dropout is not None and rank > 0
        if self.group.backward_strategy(dys.shape[0], masked=masked) == "augmented":
            with base.backward_operand(lora_a) as operand:
                return matmul(dys, operand)
        dx = empty_rows(dys.shape[0], k, dtype=dys.dtype, device=dys.device)
        for rows, weight in base.blocks():
            if rows.start == 0:  # the whole term dS A is added with the first row block
                self.kernels.lora_linear_dx(
                    dys[:, rows], weight, dys[:, n:], lora_a, dx, self.spans, self.dropout
                )
            else:
                multiply(dx, dys[:, rows], weight, dx)
        return dx

    def lora_a_gradient(
        self,
        ds: Tensor | None,  # [M, R]
        x: Tensor,  # [M, K]
        wanted: WantedFactorGradients,
        scaled: ScaledColumns | None = None,
    ) -> Tensor | None:
        """dSᵀ X [R, K], its columns times `scaled`, if wanted; None where it is added."""
        if not wanted.lora_a or ds is None:
            return None
        if wanted.added:
            self.kernels.lora_a_bwd(
                ds, x, None, self.spans, self.dropout, scaled=scaled, added=wanted.added
            )
            return None
        made = self.x_gradient(ds)
        self.kernels.lora_a_bwd(ds, x, made.d_lora_a, self.spans, self.dropout, scaled=scaled)
        return made.d_lora_a

    def x_gradient(self, ds: Tensor) -> XGradient:
        """What is to be made of dS and X, not yet written; see `lora_a_gradient`."""
        shape = self.group.placed.lora_a.shape
        d_lora_a = torch.empty(shape, dtype=accumulate_dtype(ds.dtype), device=ds.device)
        return XGradient(ds=ds, d_lora_a=d_lora_a, spans=self.spans)

    def factor_gradients(
        self,
        needs: Sequence[bool],
        d_lora_a: Tensor | None,
        d_lora_b: Tensor | None,
        grads: Sequence[Tensor],
        unscaled: Tensor | None,
    ) -> list[Tensor | None]:
        """Gradients of `filling.tensors`, each in its tensor's dtype, where `needs` says so.

        grads: of the linears' outputs, as autograd passed them. unscaled: Y before DoRA's scale.
        d_lora_a and d_lora_b may be overwritten, and the gradients may be views of them, each of
        one piece, which autograd may take as a parameter's without a copy.
        """
        blocks = len(self.filling.adapters.blocks)
        named = _by_name(tuple(needs), blocks)
        gradients = OfGroup[Tensor | None]([], [])
        sums = self._bias_sums(named, grads) if _any_needs(tuple(needs), blocks).biases else {}
        adapters = self.filling.adapters
        d_as: Sequence[Tensor | None] = [None] * len(adapters.blocks)
        d_bs = d_as
        if d_lora_a is not None:
            d_as = d_lora_a.split_with_sizes((*adapters.ranks, d_lora_a.shape[0] - adapters.rank))
        if d_lora_b is not None:
            d_bs = split_parts(d_lora_b, adapters.parts)
        each = zip(adapters.blocks, named.adapters, d_as, d_bs, strict=False)
        for block, needed, d_a, d_b in each:
            factors, dora = block.factors, self.filling.dora
            d_magnitude = d_bias = None
            if d_a is not None:
                d_a = _cast(d_a, factors.lora_a.dtype) if needed.lora_a else None
            if d_b is not None:
                if block.scales_by_tensor:
                    d_b.mul_(factors.scaling)
                d_b = _cast(d_b, factors.lora_b.dtype) if needed.lora_b else None
            if needed.magnitude and unscaled is not None and dora is not None:
                grad = grads[block.linear]
                dy = grad.reshape(-1, grad.shape[-1]).to(dora.norm.dtype)
                d_scale = (dy * unscaled[:, block.rows]).sum(0) / dora.norm[block.rows]
                d_magnitude = d_scale.to(factors.lora_a.dtype)
            if needed.bias and factors.bias is not None:
                d_bias = (sums[block.linear] * factors.scaling).to(factors.bias.dtype)
            gradients.adapters.append(
                OfAdapter(lora_a=d_a, lora_b=d_b, magnitude=d_magnitude, bias=d_bias)
            )
        for i, (bias, wanted) in enumerate(zip(self.filling.biases, named.biases, strict=True)):
            d_bias = sums[i].to(bias.dtype) if wanted and bias is not None else None
            gradients.biases.append(d_bias)
        return gradients.row()

    def _bias_sums(self, needs: OfGroup[bool], grads: Sequence[Tensor]) -> dict[int, Tensor]:
        """dY summed over rows, of the linears whose own or adapters' bias needs a gradient."""
        wanted = {i for i, needed in enumerate(needs.biases) if needed}
        for block, needed in zip(self.filling.adapters.blocks, needs.adapters, strict=True):
            if needed.bias:
                wanted.add(block.linear)
        rows = {i: grads[i].reshape(-1, grads[i].shape[-1]) for i in wanted}
        return {i: dy.sum(0, dtype=accumulate_dtype(dy.dtype)) for i, dy in rows.items()}

    def wanted(self, needs: Sequence[bool]) -> WantedFactorGradients:
        """What a backward pass makes of the factors, where `filling.tensors` have these `needs`."""
        adapters, base = self.filling.adapters, self.group.base
        key = tuple(needs), len(adapters.blocks)
        any_a, any_b, _ = _any_needs(*key)
        if not backends.factors_plan(base.device, base.dtype).adds:
            return WantedFactorGradients(lora_a=any_a, lora_b=any_b)
        return WantedFactorGradients(
            lora_a=any_a, lora_b=any_b, added=added_gradients(adapters, _by_name(*key))
        )


class _AnyNeeds(NamedTuple):
    """Whether any tensor of a kind needs a gradient; biases: of the linears or of adapters."""

    lora_a: bool
    lora_b: bool
    biases: bool


# The same for every call of a layer as a rule.
@lru_cache
def _by_name(needs: tuple[bool, ...], adapters: int) -> OfGroup[bool]:
    return OfGroup.of_row(needs, adapters)


@lru_cache
def _any_needs(needs: tuple[bool, ...], adapters: int) -> _AnyNeeds:
    named = _by_name(needs, adapters)
    of_adapters = named.adapters
    return _AnyNeeds(
        lora_a=any(a.lora_a for a in of_adapters),
        lora_b=any(a.lora_b for a in of_adapters),
        biases=any(named.biases) or any(a.bias for a in of_adapters),
    )


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which takes microseconds where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def _matmul(a: Tensor, b: Tensor, addend: Tensor | None) -> Tensor:
    """`a @ b + addend`, rounded once."""
    if addend is None:
        return matmul(a, b)
    out = empty_rows(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    return multiply(out, a, b, addend)
