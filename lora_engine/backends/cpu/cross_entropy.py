"""Softmax cross-entropy of rows of logits."""

from torch import Tensor

from lora_engine.backends.cpu.address import dtype_code, pointer
from lora_engine.backends.extension import native


def cross_entropy(
    logits: Tensor,  # [rows, cols]
    target: Tensor,  # [rows] int64
    loss: Tensor,  # [rows] float32
    logprob: Tensor,  # [rows] float32
    correct: Tensor,  # [rows] bool
    *,
    ignore_index: int,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    entropy: Tensor | None = None,  # [rows] float32
    lse: Tensor | None = None,  # [rows] float32
    grad: Tensor | None = None,  # [rows, cols] in logits' dtype; may be logits
    grad_scale: Tensor | None = None,  # [rows] float32: a factor of each row's gradient
) -> None:
    """Writes loss, logprob, correct and what is given of entropy, lse and grad."""
    native().cross_entropy(
        dtype_code(logits.dtype),
        logits.data_ptr(),
        target.data_ptr(),
        loss.data_ptr(),
        logprob.data_ptr(),
        pointer(entropy),
        pointer(lse),
        correct.data_ptr(),
        pointer(grad),
        pointer(grad_scale),
        *logits.shape,
        logits.stride(0),
        0 if grad is None else grad.stride(0),
        ignore_index,
        label_smoothing,
        softcap or 0.0,
        z_loss,
        False,
    )


def cross_entropy_bwd(
    logits: Tensor,  # [rows, cols]
    target: Tensor,  # [rows] int64
    lse: Tensor,  # [rows] float32, as `cross_entropy` wrote it
    grad_scale: Tensor,  # [rows] float32: a factor of each row's gradient
    grad: Tensor,  # [rows, cols] in logits' dtype; may be logits
    *,
    ignore_index: int,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> None:
    """Writes grad as `cross_entropy` would, from its lse."""
    native().cross_entropy(
        dtype_code(logits.dtype),
        logits.data_ptr(),
        target.data_ptr(),
        0,
        0,
        0,
        lse.data_ptr(),
        0,
        grad.data_ptr(),
        grad_scale.data_ptr(),
        *logits.shape,
        logits.stride(0),
        grad.stride(0),
        ignore_index,
        label_smoothing,
        softcap or 0.0,
        z_loss,
        True,
    )
