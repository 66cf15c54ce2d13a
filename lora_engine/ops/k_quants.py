"""GGUF's Q4_K, Q5_K and Q6_K, their codes searched for the least squared error."""

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import launchers
from lora_engine.ops.tensors import check, shape_of
from lora_engine.quantization import gguf

KINDS = ("Q4_K", "Q5_K", "Q6_K")


def quantize_k(
    w: Tensor,  # [N, K]
    kind: str,
    *,
    impl: str | None = None,
) -> Tensor:  # [N, bytes of a row] uint8
    """The rows of a weight as blocks of GGUF's type `kind`: "Q4_K", "Q5_K" or "Q6_K".

    w: of any floating dtype, read in float32; values that are not finite, or beyond float16's, give
    blocks that decode to no sensible number. Not differentiable.

    Raises ValueError for another type, and for rows that are no whole blocks of 256 values.
    """
    check(kind in KINDS, f"quantize_k: kind={kind!r}: expected {', '.join(KINDS)}")
    block = gguf.TYPES[kind.lower()]
    check(
        w.dim() == 2 and w.is_floating_point() and w.shape[1] % block.values == 0,
        f"quantize_k: w {shape_of(w)} is not [N, K] of a float dtype with K a multiple of "
        f"{block.values}",
    )
    impl = backends.select("k_quants", w.device, w.dtype, impl)
    w = w.detach().float().contiguous()
    if impl == "reference":
        return reference.quantize_k(w, kind)
    n, k = w.shape
    codes = torch.empty(n, k // block.values * block.bytes, dtype=torch.uint8, device=w.device)
    launchers.k_quants(impl).quantize_k(w, codes, kind)
    return codes
