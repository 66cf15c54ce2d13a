"""What every call of a CUDA kernel needs: the compiled launchers, addresses, the stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_engine.backends import extension


def kernels() -> Any:
    """The launchers of csrc/cuda."""
    return extension.cuda_emulation or extension.native().cuda


def pointer(x: Tensor | None) -> int:
    """The address of `x`; 0 for None."""
    return 0 if x is None else x.data_ptr()


@contextmanager
def stream_on(device: torch.device) -> Iterator[int]:
    """The handle of the device's current stream, the device being current meanwhile."""
    if extension.cuda_emulation is not None:
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream
