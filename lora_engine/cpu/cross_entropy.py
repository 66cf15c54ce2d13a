"""Softmax cross-entropy of rows of logits."""

from torch import Tensor

from lora_engine import backends
from lora_engine.cpu.address import dtype_code


def cross_entropy(
    logits: Tensor,  # [rows, cols]; becomes `softmax - onehot` where `gradient`
    target: Tensor,  # [rows] int64
    loss: Tensor,  # [rows] float32
    correct: Tensor,  # [rows] bool
    ignore_index: int,
    *,
    gradient: bool,
) -> None:
    """Writes loss and correct, and with `gradient` the logits' gradient over them."""
    rows, cols = logits.shape
    backends.native().cross_entropy(
        dtype_code(logits.dtype),
        logits.data_ptr(),
        target.data_ptr(),
        loss.data_ptr(),
        correct.data_ptr(),
        rows,
        cols,
        logits.stride(0),
        ignore_index,
        gradient,
    )
