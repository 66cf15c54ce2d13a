"""The gated activation between a block's products, with or without their thin products.

Where kernels have one pass for it, S of the down projection is made of h before h leaves the
registers; in the backward pass dS and dB of gate and up, and dA of down, of dgate, dup and h.
Elsewhere, and where dropout or DoRA come between, these are products of their own that read what
the activation wrote.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lora_engine import backends
from lora_engine.backends import launchers
from lora_engine.backends.lora_parts import ScaledRows
from lora_engine.backends.request import Activation
from lora_engine.ops.layer.blocks import Call
from lora_engine.ops.lora.product import LoraProduct, WantedFactorGradients


def activate(
    call: Call,
    gate: Tensor,  # [M, I]
    up: Tensor,  # [M, I]
    h: Tensor,  # [M, I]
    s: Tensor,  # [M, R]
    copy: Tensor,  # [M, R]
    activation: str,
) -> None:
    """Writes h, and S of the outer product to `s` and to `copy`."""
    outer = call.outer
    sizes = Activation(h.shape[1], _rank(outer), backward=False, apart=outer.dropout is not None)
    if not backends.takes_one_pass(sizes, h.device, h.dtype, call.impl):
        kernels = launchers.glu(call.implementation("glu", h))
        kernels.glu_fwd(gate, up, h, activation=activation)
        outer.fill_s(h, s, copy)
        return
    one_pass = launchers.glu_lora(call.implementation("glu", h))
    lora_a = outer.group.placed.lora_a
    one_pass.glu_lora_fwd(gate, up, h, lora_a, s, outer.spans, copy, activation=activation)
    outer.route(s, copy)


class FactorGradients(NamedTuple):
    """dS [M, R] and dB [E] of the inner product, dA [R, I] of the outer; None if not made."""

    inner_ds: Tensor | None
    inner_d_b: Tensor | None
    outer_d_a: Tensor | None


def activate_backward(
    call: Call,
    dh: Tensor,  # [M, I]; overwritten
    gate_up: Tensor,  # [M, 2 I]
    parts: Sequence[Tensor],  # dgate, dup [M, I] each: with padding columns, not yet written
    inner_s: Tensor,  # [M, R]
    outer_ds: Tensor | None,  # [M, R]
    wanted: WantedFactorGradients,  # of the inner product
    outer_wanted: WantedFactorGradients,
    scaled: ScaledRows | None,
    activation: str,
) -> tuple[Tensor, FactorGradients]:
    """Writes dgate and dup; returns them with dS behind, [M, 2 I + R], and what is made of them.

    `scaled`: as for `LoraProduct.fill_ds`.
    """
    inner, outer = call.inner, call.outer
    dgate, dup = parts
    gate, up = gate_up.split_with_sizes(inner.group.out_features, dim=1)
    sizes = Activation(
        dh.shape[1],
        max(_rank(inner), _rank(outer) if outer_wanted.lora_a else 0),
        backward=True,
        apart=inner.filling.dora is not None
        or (outer_wanted.lora_a and outer.dropout is not None)
        or len(wanted.added) + len(outer_wanted.added) > 0,
    )
    if not backends.takes_one_pass(sizes, dh.device, dh.dtype, call.impl):
        h = dh  # the activation takes the place of its gradient
        kernels = launchers.glu(call.implementation("glu", dh))
        kernels.glu_bwd(dh, gate, up, dgate, dup, h, activation=activation)
        d_a = outer.lora_a_gradient(outer_ds, h, outer_wanted)
        dys = inner.claim_gradient(parts)
        ds, d_b = inner.fill_ds(dys, inner_s, wanted, scaled)
        return dys, FactorGradients(inner_ds=ds, inner_d_b=d_b, outer_d_a=d_a)
    dys = inner.claim_gradient(parts)
    inner_ds = dys[:, sum(inner.group.out_features) :]
    of_inner = inner.dy_gradients(inner_ds, inner_s, wanted, scaled)
    of_outer = None
    if outer_wanted.lora_a and outer_ds is not None:
        of_outer = outer.x_gradient(outer_ds)
    one_pass = launchers.glu_lora(call.implementation("glu", dh))
    one_pass.glu_lora_bwd(dh, gate, up, dgate, dup, of_inner, of_outer, activation=activation)
    inner.route(of_inner.ds, None if scaled is None else scaled.ds)
    d_a = None if of_outer is None else of_outer.d_lora_a
    return dys, FactorGradients(inner_ds=of_inner.ds, inner_d_b=of_inner.d_lora_b, outer_d_a=d_a)


def _rank(product: LoraProduct) -> int:
    """The largest total rank of a linear's adapters."""
    return max(columns.stop - columns.start for _, columns in product.spans)
