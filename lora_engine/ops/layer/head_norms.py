"""The norm of each head of q and k, where the attention half of a layer has one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_engine.ops.layer.blocks import Call
from lora_engine.ops.tensors import accumulate_dtype, empty_rows
from lora_engine.values import PreNorm


def norm_heads(
    call: Call,
    norms: tuple[PreNorm, PreNorm],
    q: Tensor,  # [T, Hq D]
    k: Tensor,  # [T, Hkv D]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """q and k with every head normed, and each head's 1 / rms [T Hq], [T Hkv]."""
    width = q.shape[1] + k.shape[1]
    buffer = empty_rows(q.shape[0], width, dtype=q.dtype, device=q.device)
    results = buffer.split_with_sizes([q.shape[1], k.shape[1]], dim=1)
    rstds = []
    for norm, x, y in zip(norms, (q, k), results, strict=True):
        heads = _heads(x, norm)
        rstd = torch.empty(
            heads.shape[0] * heads.shape[1], dtype=accumulate_dtype(x.dtype), device=x.device
        )
        call.norm_kernels(x).rms_norm_fwd(
            heads, None, norm.weight, _heads(y, norm), None, rstd, norm.eps, norm.offset
        )
        rstds.append(rstd)
    return results[0], results[1], rstds


def norm_heads_backward(
    call: Call,
    norms: tuple[PreNorm, PreNorm],
    inputs: Sequence[Tensor],  # [T, Hq D], [T, Hkv D]
    rstd: Sequence[Tensor],
    grads: Sequence[Tensor],  # of the normed heads; those of `inputs` take their place
    needs_weight: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of both norms' weights, where they are needed."""
    dweights: list[Tensor | None] = []
    for norm, x, scale, grad, needed in zip(norms, inputs, rstd, grads, needs_weight, strict=True):
        dweight = scale.new_empty(norm.weight.shape) if needed else None
        dx = _heads(grad, norm)
        call.norm_kernels(x).rms_norm_bwd(
            dx, None, _heads(x, norm), norm.weight, scale, dx, dweight, norm.offset
        )
        dweights.append(None if dweight is None else dweight.to(x.dtype))
    return dweights


def _heads(x: Tensor, norm: PreNorm) -> Tensor:
    return x.unflatten(1, (-1, norm.weight.shape[0]))
