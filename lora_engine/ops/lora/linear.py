"""Linear layers with LoRA: a group that shares its input as one product."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import launchers
from lora_engine.ops import augmented
from lora_engine.ops.context import Context, named_first
from lora_engine.ops.lora import few_rows
from lora_engine.ops.lora.group import LoraGroup
from lora_engine.ops.lora.product import LoraProduct
from lora_engine.ops.once_differentiable import once_differentiable
from lora_engine.ops.tensors import as_rows, is_observed, not_a_view, shape_of, without_autocast
from lora_engine.values import AdaptedLinear, Dropout


@without_autocast
def lora_linear(
    x: Tensor,
    group: LoraGroup,
    *,
    dropout: Dropout | None = None,
    routes: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    """The outputs [..., N_i] of every linear of the group for `x` [..., K], in x's dtype.

    LoRA as in arXiv:2106.09685; DoRA where adapters have a magnitude. `dropout`
    drops entries of x on their way into each linear's adapter. `routes` [...] int64 gives each row
    the adapter with that number (`LoraFactors.adapter`) and no other; -1 none. Adapters with a bias
    cannot be routed.

    Gradients: x, every lora_a, lora_b, magnitude and bias (in their own dtype), and biases of the
    linears that require one; the base weight is frozen. x and the gradients are used without a
    copy where they were allocated with `padding_columns`, as `rms_norm`, `glu` and `attention` do.

    Raises ValueError where x or routes do not fit the weight.
    """
    _check(x, group, routes)
    if dropout is None and routes is None:
        kernels = few_rows.kernels_for(x, group, impl=impl)
        if kernels is not None:
            return _outputs(few_rows.lora_linear(kernels, x, group), x.shape, group)
    impl = backends.select("lora_linear", x.device, x.dtype, impl, group.base.format)
    if impl == "reference":
        x, linears = augmented.operand(x), adapted_linears(group)
        parts = reference.lora_group(x, linears, dropout=dropout, routes=routes)
        return tuple(map(_takes_any_gradient, parts))
    product = make_product(x, group, dropout, routes, impl)
    if not is_observed():
        return _forward(x, product)[0]
    outputs: tuple[Tensor, ...] = _LoraLinear.apply(x, product, *product.filling.tensors)
    return outputs


def make_product(
    x: Tensor,
    group: LoraGroup,
    dropout: Dropout | None = None,
    routes: Tensor | None = None,
    impl: str | None = None,
) -> LoraProduct:
    """The checked product for rows `x` [..., K]; with the adapters as they are now.

    Raises ValueError where x or routes do not fit the weight, or no kernels can run.
    """
    _check(x, group, routes)
    impl = backends.select("lora_linear", x.device, x.dtype, impl, group.base.format)
    return checked_product(group, dropout, routes, impl)


def checked_product(
    group: LoraGroup, dropout: Dropout | None, routes: Tensor | None, impl: str
) -> LoraProduct:
    """`make_product` for rows and routes of the right shape, by kernels that are chosen."""
    _check_routed(group, routes)
    columns = None
    if routes is not None and group.padded_rank:
        columns = group.adapters.route(routes.reshape(-1), group.padded_rank)
    kernels = launchers.lora_linear(impl)
    return LoraProduct(
        group=group, filling=group.fill(kernels), kernels=kernels, dropout=dropout, columns=columns
    )


def _check(x: Tensor, group: LoraGroup, routes: Tensor | None) -> None:
    if x.shape[-1] != group.in_features or x.dtype != group.base.dtype:
        dtype = str(group.base.dtype).removeprefix("torch.")
        weight = f"[{sum(group.out_features)}, {group.in_features}] {dtype}"
        raise ValueError(f"lora_linear: x {shape_of(x)} does not fit weight {weight}")
    if routes is not None and routes.shape != x.shape[:-1]:
        raise ValueError(f"lora_linear: routes {shape_of(routes)} do not fit x {shape_of(x)}")
    _check_routed(group, routes)


def _check_routed(group: LoraGroup, routes: Tensor | None) -> None:
    if routes is not None and group.adapters.has_bias:
        raise ValueError("lora_linear: rows cannot be routed to adapters that have a bias")


def adapted_linears(group: LoraGroup) -> list[AdaptedLinear]:
    """The group's linears, each by itself, as the reference takes them."""
    blocks, base = group.adapters.blocks, group.base.merged(group.adapters)
    return [
        AdaptedLinear(
            weight=base.read(rows),
            adapters=[b.factors for b in blocks if b.linear == i],
            bias=bias,
            merged=group.base.merges,
        )
        for i, (rows, bias) in enumerate(zip(group.rows, group.biases, strict=True))
    ]


def _takes_any_gradient(y: Tensor) -> Tensor:
    """`y`, whose gradient is copied if what stands beside its rows is not known to be finite."""
    if y.requires_grad:
        y.register_hook(lambda dy: dy if dy is None else augmented.operand(dy))
    return y


class _Needs(NamedTuple):
    """Which of the function's inputs before the adapters' tensors need a gradient."""

    x: bool
    product: bool


class _Gradients(NamedTuple):
    """The gradients of those inputs."""

    x: Tensor | None
    product: None = None


class _Kept(NamedTuple):
    product: LoraProduct
    shape: torch.Size  # of x


class _Saved(NamedTuple):
    """What the backward pass reads."""

    x: Tensor  # [M, K]
    s: Tensor  # [M, R]
    unscaled: Tensor | None  # [M, N], Y before DoRA's scale


def _forward(x: Tensor, product: LoraProduct) -> tuple[tuple[Tensor, ...], _Saved]:
    """The outputs, and what the backward pass reads."""
    group = product.group
    k = group.in_features
    if group.forward_strategy(x.numel() // k) == "augmented":
        xs = augmented.Joined.of(augmented.claim([x], group.padded_rank), k)
        rows, low_rank = xs.front, xs.behind
        y, unscaled = product.forward(xs)
    else:
        rows = as_rows(augmented.operand(x))
        low_rank = rows.new_empty(rows.shape[0], group.padded_rank)
        y, unscaled = product.forward_apart(rows, low_rank)
    return _outputs(y, x.shape, group), _Saved(x=rows, s=low_rank, unscaled=unscaled)


def _outputs(y: Tensor, shape: torch.Size, group: LoraGroup) -> tuple[Tensor, ...]:
    """Every linear's part [..., N_i] of y [M, N]."""
    parts = (y,) if len(group.out_features) == 1 else y.split_with_sizes(group.out_features, dim=1)
    return tuple(part.view(*shape[:-1], part.shape[1]) for part in parts)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[_Kept], x: Tensor, product: LoraProduct, *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        outputs, saved = _forward(x, product)
        ctx.kept = _Kept(product, x.shape)
        ctx.save_for_backward(*saved, *factors)
        return (not_a_view(outputs[0]),) if len(outputs) == 1 else outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[_Kept], *grads: Tensor) -> tuple[Tensor | None, ...]:
        product, shape = ctx.kept
        saved, _ = named_first(_Saved, ctx.saved_tensors)
        asked, needs = named_first(_Needs, ctx.needs_input_grad)
        product.begin_backward()
        wanted = product.wanted(needs)
        dys = product.claim_gradient(grads)
        ds, d_lora_b = product.fill_ds(dys, saved.s, wanted)
        dx = product.input_gradient(dys).view(shape) if asked.x else None
        d_lora_a = product.lora_a_gradient(ds, saved.x, wanted)
        return (
            *_Gradients(dx),
            *product.factor_gradients(needs, d_lora_a, d_lora_b, grads, saved.unscaled),
        )
