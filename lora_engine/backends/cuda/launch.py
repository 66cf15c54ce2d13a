"""What every call of a CUDA kernel needs: its struct of arguments, addresses, the stream.

Structs have the names of csrc/cuda/launchers.hpp, which says what each field is. The extension
compares a class's fields with its struct when it first sees the class, and raises TypeError where
a name or the order differs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from lora_engine import values
from lora_engine.backends import extension

Address: TypeAlias = int  # as of Tensor.data_ptr(); 0 is null


class AdamWHyper(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    bias_correction1: float
    bias_correction2: float
    grad_norm: Address
    max_grad_norm: float

    @staticmethod
    def of(hyper: values.AdamWHyper, grad_norm: Tensor | None) -> "AdamWHyper":
        """The contract's numbers beside the address of the norm that they clip by."""
        return AdamWHyper(
            lr=hyper.lr,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            eps=hyper.eps,
            weight_decay=hyper.weight_decay,
            bias_correction1=hyper.bias_correction1,
            bias_correction2=hyper.bias_correction2,
            grad_norm=pointer(grad_norm),
            max_grad_norm=hyper.max_grad_norm or 0.0,
        )


class AdamWArgs(NamedTuple):
    params: Address
    grads: Address
    exp_avg: Address
    exp_avg_sq: Address
    size: int
    hyper: AdamWHyper


class AdamW8bitArgs(NamedTuple):
    params: Address
    grads: Address
    exp_avg: Address
    exp_avg_sq: Address
    exp_avg_absmax: Address
    exp_avg_sq_absmax: Address
    size: int
    hyper: AdamWHyper


class GradNormArgs(NamedTuple):
    grads: Address
    partials: Address
    norm: Address
    size: int


class AttentionFwdArgs(NamedTuple):
    q: Address
    k: Address
    v: Address
    cu_seqlens: Address
    o: Address
    lse: Address
    taken: Address
    stride_q: int
    stride_k: int
    stride_v: int
    stride_o: int
    tokens: int
    sequences: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: int
    window: int
    dtype: int
    scale: float


class AttentionBwdArgs(NamedTuple):
    d_o: Address
    q: Address
    k: Address
    v: Address
    o: Address
    lse: Address
    dq: Address
    dk: Address
    dv: Address
    cu_seqlens: Address
    stats: Address
    dq_sum: Address
    order: Address
    stride_do: int
    stride_q: int
    stride_k: int
    stride_v: int
    stride_o: int
    stride_dq: int
    stride_dk: int
    stride_dv: int
    tokens: int
    sequences: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: int
    dtype: int
    scale: float


class AttentionMmaFwdArgs(NamedTuple):
    q: Address
    k: Address
    v: Address
    cu_seqlens: Address
    parents: Address
    o: Address
    lse: Address
    stride_q: int
    stride_k: int
    stride_v: int
    stride_o: int
    tokens: int
    sequences: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: int
    window: int
    dtype: int
    scale: float


class AttentionMmaBwdArgs(NamedTuple):
    d_o: Address
    q: Address
    k: Address
    v: Address
    o: Address
    lse: Address
    dq: Address
    dk: Address
    dv: Address
    cu_seqlens: Address
    parents: Address
    delta: Address
    last: Address
    stride_do: int
    stride_q: int
    stride_k: int
    stride_v: int
    stride_o: int
    stride_dq: int
    stride_dk: int
    stride_dv: int
    tokens: int
    sequences: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: int
    window: int
    dtype: int
    scale: float


class Quantize4bitArgs(NamedTuple):
    w: Address
    bounds: Address
    ascending: Address
    codes: Address
    absmax: Address
    size: int
    block: int
    dtype: int


class Dequantize4bitArgs(NamedTuple):
    codes: Address
    absmax: Address
    nested_absmax: Address
    nested_code: Address
    offset: Address
    values: Address
    w: Address
    rows: int
    cols: int
    stride: int
    first: int
    block: int
    dtype: int


class Launchers(Protocol):
    """The launchers of csrc/cuda; `stream` is a CUDA stream's handle."""

    def adamw(self, args: AdamWArgs, stream: int) -> None: ...
    def adamw_8bit(self, args: AdamW8bitArgs, stream: int) -> None: ...
    def attention_fwd(self, args: AttentionFwdArgs, stream: int) -> None: ...
    def attention_bwd(self, args: AttentionBwdArgs, stream: int) -> None: ...
    def attention_mma_fwd(self, args: AttentionMmaFwdArgs, stream: int) -> None: ...
    def attention_mma_bwd(self, args: AttentionMmaBwdArgs, stream: int) -> None: ...
    def grad_norm(self, args: GradNormArgs, stream: int) -> None: ...
    def quantize_4bit(self, args: Quantize4bitArgs, stream: int) -> None: ...
    def dequantize_4bit(self, args: Dequantize4bitArgs, stream: int) -> None: ...


def dtype_code(dtype: torch.dtype) -> int:
    """The DType of csrc/cuda/launchers.hpp."""
    return (torch.float32, torch.bfloat16, torch.float16).index(dtype)


def pointer(tensor: Tensor | None) -> Address:
    """The tensor's address; null for None."""
    return 0 if tensor is None else tensor.data_ptr()


def kernels() -> Launchers:
    """lora_engine._C.cuda, or the tests' emulation of it."""
    return cast(Launchers, extension.cuda_emulation or extension.native().cuda)


@contextmanager
def stream_on(device: torch.device) -> Iterator[int]:
    """The handle of the device's current stream, the device being current meanwhile."""
    if extension.cuda_emulation is not None:
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream
