"""Softmax cross-entropy of rows of logits."""

from torch import Tensor

from lora_engine.backends.cpu.launch import dtype_code, kernels, pointer
from lora_engine.backends.cpu.structs import CrossEntropyArgs


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
) -> None:
    """Writes loss, logprob, correct and what is given of entropy, lse and grad."""
    rows, cols = logits.shape
    kernels().cross_entropy(
        dtype_code(logits.dtype),
        CrossEntropyArgs(
            logits=logits.data_ptr(),
            target=target.data_ptr(),
            loss=loss.data_ptr(),
            logprob=logprob.data_ptr(),
            entropy=pointer(entropy),
            lse=pointer(lse),
            correct=correct.data_ptr(),
            grad=pointer(grad),
            grad_scale=0,
            rows=rows,
            cols=cols,
            stride=logits.stride(0),
            grad_stride=0 if grad is None else grad.stride(0),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=softcap or 0.0,
            z_loss=z_loss,
            lse_given=False,
        ),
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
    """Writes grad as `cross_entropy` would, from its lse, times grad_scale."""
    rows, cols = logits.shape
    kernels().cross_entropy(
        dtype_code(logits.dtype),
        CrossEntropyArgs(
            logits=logits.data_ptr(),
            target=target.data_ptr(),
            loss=0,
            logprob=0,
            entropy=0,
            lse=lse.data_ptr(),
            correct=0,
            grad=grad.data_ptr(),
            grad_scale=grad_scale.data_ptr(),
            rows=rows,
            cols=cols,
            stride=logits.stride(0),
            grad_stride=grad.stride(0),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=softcap or 0.0,
            z_loss=z_loss,
            lse_given=True,
        ),
    )
