"""An embedding with LoRA: rows gathered, the adapter's product added onto them in place."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.backends.products import multiply
from lora_engine.ops.augmented import operand
from lora_engine.ops.lora import few_rows
from lora_engine.ops.tensors import check, is_observed, shape_of, without_autocast
from lora_engine.values import LoraFactors


@without_autocast
def lora_embedding(
    ids: Tensor,  # [...] int64
    weight: Tensor,  # [V, H]
    adapters: Sequence[LoraFactors],
    *,
    routes: Tensor | None = None,  # [...] int64
    padding_idx: int | None = None,
) -> Tensor:
    """`weight[ids] + Σ scaling (A[:, ids])ᵀ Bᵀ`, [..., H] in weight's dtype.

    The adapters' lora_a are [r, V] and lora_b [H, r] (PEFT's lora_embedding_A and _B); both get
    gradients, the weight none. `routes` gives each id the adapter with that number and no other.
    The row of A for `padding_idx` gets no gradient, as in torch's embedding.
    The gathers are torch's, on every device; with gradients the product adds onto the gathered
    rows, so that neither `scaling` nor the sum costs a pass.

    Raises ValueError where an adapter does not fit the weight.
    """
    flat = ids.reshape(-1)
    out = F.embedding(flat, weight.detach())
    for factors in adapters:
        rank = factors.lora_a.shape[0]
        check(
            factors.lora_a.shape == (rank, weight.shape[0])
            and factors.lora_b.shape == (weight.shape[1], rank)
            and factors.magnitude is None,
            f"lora_embedding: lora_a {shape_of(factors.lora_a)} and lora_b "
            f"{shape_of(factors.lora_b)} do not fit weight {shape_of(weight)}",
        )
        s = F.embedding(flat, factors.lora_a.t(), padding_idx)
        if routes is not None:
            s = s * (routes.reshape(-1) == factors.adapter)[:, None]
        s, lora_b = s.to(out.dtype), operand(factors.lora_b).to(out.dtype)
        if is_observed():
            out = torch.addmm(out, s, lora_b.t(), alpha=factors.scaling)
            continue
        s = s * factors.scaling
        few = few_rows.linear(s, lora_b, None)
        out = multiply(out, s, lora_b.t(), out) if few is None else out + few
    return out.view(*ids.shape, weight.shape[1])
