"""GGUF's Q4_K, Q5_K and Q6_K, their codes searched for the least squared error."""

from torch import Tensor

from lora_engine.backends.cpu.launch import kernels
from lora_engine.backends.cpu.structs import QuantizeKArgs

_BITS = {"Q4_K": 4, "Q5_K": 5, "Q6_K": 6}


def quantize_k(
    w: Tensor,  # [N, K] float32, contiguous, K a multiple of 256
    codes: Tensor,  # [N, bytes of a row] uint8, contiguous
    kind: str,
) -> None:
    """Writes codes."""
    kernels().quantize_k(
        QuantizeKArgs(
            w=w.data_ptr(), codes=codes.data_ptr(), blocks=w.numel() // 256, bits=_BITS[kind]
        )
    )
