"""What the two halves of a decoder layer, each one autograd function, have in common.

    attention_block:  x + out(attention(qkv(norm(x))))      ops/layer/attention_block.py
    mlp_block:        x + down(glu(gate_up(norm(x))))       ops/layer/mlp_block.py

Between the products nothing is saved that one pointwise pass gives again. For a token: x and the
norm's 1 / rms, S of both groups, q, k, v and attention's output (or gate and up). Normed heads and
the activation are made again in the backward pass, where their gradients are being read anyway. The
norm's output is not needed for dA, whose sum is taken of x.
The residual is added by the product that makes the branch's output, and its gradient by the norm's
backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.backends import contracts, launchers
from lora_engine.backends.lora_parts import ScaledColumns, ScaledRows
from lora_engine.backends.request import Heads
from lora_engine.ops import augmented
from lora_engine.ops.lora.group import LoraGroup
from lora_engine.ops.lora.linear import checked_product, make_product
from lora_engine.ops.lora.product import LoraProduct, WantedFactorGradients
from lora_engine.ops.tensors import accumulate_dtype, check, empty_rows, shape_of
from lora_engine.values import Dropout, PreNorm


@dataclass
class Rerun:
    """A call of blocks that runs a second time in the backward pass, from its input alone.

    again: whether this is the second run. `unread` then: the name of the block whose output nobody
        reads, as the run is for what its blocks save; its last product is left out.
    keeps_attention: whether attention's output [M, Nq + R] and log-sum-exp [heads, M] of the first
        run are kept, in `attention`, for the second, which computes the rest.
    """

    unread: str
    keeps_attention: bool = False
    again: bool = False
    attention: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Branch:
    """The linears of a block, and what varies from call to call.

    dropouts: of the two groups' adapters; None: no dropout.
    routes: each row's adapter, [...]; None: rows use all.
    grad_padding_columns: columns to leave behind the gradient of x, which the block before reads.
    rerun: of a call that runs twice.
    """

    inner: LoraGroup
    outer: LoraGroup
    dropouts: tuple[Dropout | None, Dropout | None] = (None, None)
    routes: Tensor | None = None
    grad_padding_columns: int = 0
    rerun: Rerun | None = None

    @property
    def is_plain(self) -> bool:
        """Whether rows use all adapters, without dropout."""
        return self.routes is None and all(dropout is None for dropout in self.dropouts)


def implementation(
    block: str, x: Tensor, branch: Branch, impl: str | None, heads: Heads | None = None
) -> str:
    """What computes the block for tensors like x: the reference unless both groups have kernels.

    heads: of a block with attention.
    """
    inner, outer = (
        backends.select(block, x.device, x.dtype, impl, group.base.format, heads)
        for group in (branch.inner, branch.outer)
    )
    return outer if inner != "reference" else inner


def runs_fused(
    block: str, x: Tensor, inner: LoraGroup, outer: LoraGroup, head_dim: int | None = None
) -> bool:
    """Whether all parts of the block have kernels for tensors like x, over these groups' bases.

    head_dim: of a block with attention.
    """
    heads = None if head_dim is None else Heads(head_dim)
    return all(
        backends.runs_fused(block, x.device, x.dtype, group.base.format, heads)
        for group in (inner, outer)
    )


def check_branch(x: Tensor, norm: PreNorm, branch: Branch) -> None:
    """ValueError where the branch does not fit rows x [..., H]."""
    hidden = x.shape[-1]
    check(
        norm.weight.shape == (hidden,) and norm.weight.dtype == x.dtype,
        lambda: f"the block's norm {shape_of(norm.weight)} does not fit x {shape_of(x)}",
    )
    check(
        branch.outer.out_features == (hidden,),
        lambda: f"the block's output {branch.outer.out_features} does not fit x {shape_of(x)}",
    )


def products(x: Tensor, branch: Branch, impl: str | None) -> tuple[LoraProduct, LoraProduct]:
    """The branch's inner and outer product for rows x [..., H]."""
    inner = make_product(x, branch.inner, branch.dropouts[0], branch.routes, impl)
    base = branch.outer.base
    check(base.dtype == x.dtype, lambda: f"the block's output does not fit {shape_of(x)}")
    impl = backends.select("lora_linear", x.device, x.dtype, impl, base.format)
    return inner, checked_product(branch.outer, branch.dropouts[1], branch.routes, impl)


class OfBothGroups(NamedTuple):
    """Which of the tensors of a block's groups need a gradient, in the order of their fillings."""

    inner: Sequence[bool]
    outer: Sequence[bool]


@dataclass(frozen=True)
class Call:
    """What a block's function needs besides tensors that get gradients; each block adds its own."""

    norm: PreNorm
    inner: LoraProduct
    outer: LoraProduct
    grad_padding_columns: int
    impl: str | None
    rerun: Rerun | None

    def is_unread(self, block: str) -> bool:
        """Whether nobody reads the block's output, nor its backward pass what is made of that."""
        rerun = self.rerun
        return (
            rerun is not None
            and rerun.again
            and rerun.unread == block
            and self.outer.filling.dora is None
        )

    def tensors(self) -> list[Tensor | None]:
        """The function's last inputs: what the products' adapters are made of."""
        return [*self.inner.filling.tensors, *self.outer.filling.tensors]

    def split(self, needs: Sequence[bool]) -> OfBothGroups:
        """`needs` of the block's factors, which stand one group's after the other's."""
        count = len(self.inner.filling.tensors)
        return OfBothGroups(inner=needs[:count], outer=needs[count:])

    def implementation(self, operation: str, x: Tensor) -> str:
        """What runs the operation for tensors like x."""
        return backends.select(operation, x.device, x.dtype, self.impl)

    def norm_kernels(self, x: Tensor) -> contracts.RmsNorm:
        """What norms tensors like x."""
        return launchers.rms_norm(self.implementation("rms_norm", x))

    def normed(
        self, x: Tensor, *, unread: bool = False
    ) -> tuple[augmented.Joined, Tensor, Tensor | None]:
        """norm(x) with padding columns for S behind it, 1 / rms, and a copy of x.

        The outer product adds itself to the copy; None where it does not, or is not made (`unread`
        output). The norm has x in registers: PyTorch's product would copy it once more.
        """
        rows, cols = x.shape
        copy = None
        if not unread and self.outer.adds_to(rows):
            copy = empty_rows(rows, cols, dtype=x.dtype, device=x.device)
        width = cols + self.inner.group.padded_rank
        buffer = empty_rows(rows, width, dtype=x.dtype, device=x.device)
        joined = augmented.Joined.of(buffer, cols)
        rstd = torch.empty(rows, dtype=accumulate_dtype(x.dtype), device=x.device)
        self._norm_into(joined.front, x, rstd, copy)
        return joined, rstd, copy

    def _norm_into(self, y: Tensor, x: Tensor, rstd: Tensor, copy: Tensor | None = None) -> None:
        norm = self.norm
        self.norm_kernels(x).rms_norm_fwd(
            x, None, norm.weight, y, copy, rstd, norm.eps, norm.offset
        )

    def inner_gradients(
        self,
        dy: Tensor,  # [M, H]: of the block's output, that is of the residual too
        dys: Tensor,  # [M, N + R]: of the inner products, with dS filled in
        ds: Tensor | None,  # [M, R]: that dS
        scaled: ScaledRows | None,
        x: Tensor,
        rstd: Tensor,
        needs: Sequence[bool],  # of x, of the norm's weight
        wanted: WantedFactorGradients,  # of the inner product
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, of the norm's weight, and of the inner A.

        scaled: `scaled_ds`, written with dS.
        """
        rows, cols = x.shape
        d_lora_a = None
        if wanted.lora_a and ds is not None:
            d_lora_a = self._inner_a_gradient(ds, scaled, x, rstd, wanted)
        if not any(needs):
            return None, None, d_lora_a
        d_normed = self.inner.input_gradient(dys)
        (dx,) = augmented.empty(
            rows, [cols], self.grad_padding_columns, dtype=x.dtype, device=x.device
        )
        dweight = rstd.new_empty(cols) if needs[1] else None
        self.norm_kernels(x).rms_norm_bwd(
            d_normed, dy, x, self.norm.weight, rstd, dx, dweight, self.norm.offset
        )
        return dx, None if dweight is None else dweight.to(x.dtype), d_lora_a

    def scaled_ds(
        self,
        x: Tensor,  # [M, H]
        rstd: Tensor,  # [M]
        *,
        wants_a: bool,
    ) -> ScaledRows | None:
        """dS / rms(x) of the inner product for `inner_gradients`, to be written with dS.

        None where that needs none.
        """
        if not wants_a or not backends.factors_plan(x.device, x.dtype).scales_rows:
            return None
        rank = self.inner.group.padded_rank
        return ScaledRows(rstd, torch.empty(x.shape[0], rank, dtype=x.dtype, device=x.device))

    def _inner_a_gradient(
        self,
        ds: Tensor,  # [M, R]
        scaled: ScaledRows | None,
        x: Tensor,  # [M, H]
        rstd: Tensor,  # [M]
        wanted: WantedFactorGradients,
    ) -> Tensor | None:
        """dSᵀ norm(x) [R, H] without norm(x): a factor of each row goes to dS, of each column last.

        Without the first, norm(x) is made again.
        """
        if scaled is None:
            normed = torch.empty_like(x)
            self._norm_into(normed, x, rstd)
            return self.inner.lora_a_gradient(ds, normed, wanted)
        columns = ScaledColumns(self.norm.weight, self.norm.offset)
        return self.inner.lora_a_gradient(scaled.ds, x, wanted, columns)
