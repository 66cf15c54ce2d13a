"""Memory for one intermediate result at a time, which all products share."""

import threading

import torch
from torch import Tensor

from lora_engine.backends.devices import keeps_freed_memory


class _Scratch(threading.local):
    """The memory of a device and dtype, as large as the largest result so far.

    Each thread has its own: products of different threads may run at once.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


_scratch = _Scratch()


def scratch_matrix(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised [rows, cols], over whatever this thread asked for before.

    On a GPU torch's allocator is the scratch, one for each CUDA stream: a product's operand is
    given back when its kernels are launched, and the next is made in its place, by autograd's
    thread as well.
    """
    if keeps_freed_memory(device):
        return torch.empty(rows, cols, dtype=dtype, device=device)
    buffers = _scratch.buffers
    buffer = buffers.get((device, dtype))
    if buffer is None or buffer.numel() < rows * cols:
        buffers[device, dtype] = buffer = torch.empty(0)  # freed before more is taken
        # No inference tensor, which could not be written to outside of inference mode.
        with torch.inference_mode(False):
            buffer = torch.empty(rows * cols, dtype=dtype, device=device)
        buffers[device, dtype] = buffer
    return buffer[: rows * cols].view(rows, cols)
