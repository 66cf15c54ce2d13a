"""GGUF's Q4_K, Q5_K and Q6_K, their codes searched for the least squared error."""

import torch
from torch import Tensor

from lora_engine.backends.cpu.launch import kernels
from lora_engine.backends.cpu.structs import QuantizeKArgs

# Bits of a code, and bytes of a block of 256 values.
_SIZES = {"Q4_K": (4, 144), "Q5_K": (5, 176), "Q6_K": (6, 210)}
BLOCK = 256


def quantize_k(
    w: Tensor,  # [N, K] float32, contiguous, K a multiple of 256
    kind: str,  # "Q4_K", "Q5_K" or "Q6_K"
) -> Tensor:  # [N, bytes of a row] uint8
    """The rows' blocks; their values have to be finite and within float16's."""
    if w.dtype != torch.float32 or not w.is_contiguous() or w.shape[-1] % BLOCK:
        raise ValueError(f"quantize_k: expected contiguous float32 [N, 256 n], got {list(w.shape)}")
    bits, size = _SIZES[kind]
    codes = torch.empty(*w.shape[:-1], w.shape[-1] // BLOCK * size, dtype=torch.uint8)
    kernels().quantize_k(
        QuantizeKArgs(w=w.data_ptr(), codes=codes.data_ptr(), blocks=w.numel() // BLOCK, bits=bits)
    )
    return codes
