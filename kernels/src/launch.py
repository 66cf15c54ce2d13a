"""Launch parameters: from a table shipped with the package, no tuning while a model trains."""

import torch

from lora_engine.backends.hardware import capability
from lora_engine.backends.selection import launch_parameters


def config(kernel: str, device: torch.device, dtype: torch.dtype, size: int) -> dict[str, int]:
    """The launch parameters of `kernel`, as keyword arguments of its launch."""
    return launch_parameters(kernel, capability(device), dtype, size)


def vector(dtype: torch.dtype, *extents: int) -> int:
    """How many elements 16 bytes hold, where every extent is a multiple of it; else 1.

    Triton knows that an argument is a multiple of 16, not of 8: rows with eight padding columns
    would be read element by element. Kernels take extents divided by this, and multiply by the
    constant.
    """
    elements = 16 // dtype.itemsize
    for extent in extents:
        if extent % elements:
            return 1
    return elements


# Triton's own of these names take several microseconds a call outside of a kernel.
def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n, 1 or more, or above it."""
    return 1 << (n - 1).bit_length()
