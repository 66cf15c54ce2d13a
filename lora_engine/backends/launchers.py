"""The modules that launch each operation's kernels, as the contracts that they keep.

`impl` is what `backends.select` answers. A module is imported when it is first asked for: Triton's
only where Triton runs.
"""

from functools import cache
from typing import NoReturn

from lora_engine.backends import contracts, lora_contracts


def _no_kernels(operation: str, impl: str) -> NoReturn:
    raise ValueError(f"{operation}: there are no {impl} kernels")


@cache
def rms_norm(impl: str) -> contracts.RmsNorm:
    if impl == "cpu":
        from lora_engine.backends.cpu import rms_norm as cpu

        return cpu
    if impl == "triton":
        from lora_engine.backends.triton import rms_norm as triton

        return triton
    _no_kernels("rms_norm", impl)


@cache
def layer_norm(impl: str) -> contracts.LayerNorm:
    if impl == "cpu":
        from lora_engine.backends.cpu import layer_norm as cpu

        return cpu
    if impl == "triton":
        from lora_engine.backends.triton import layer_norm as triton

        return triton
    _no_kernels("layer_norm", impl)


@cache
def rope(impl: str) -> contracts.Rope:
    if impl == "cpu":
        from lora_engine.backends.cpu import rope as cpu

        return cpu
    if impl == "triton":
        from lora_engine.backends.triton import rope as triton

        return triton
    _no_kernels("rope", impl)


@cache
def glu(impl: str) -> contracts.Glu:
    if impl == "cpu":
        from lora_engine.backends.cpu import glu as cpu

        return cpu
    if impl == "triton":
        from lora_engine.backends.triton import glu as triton

        return triton
    _no_kernels("glu", impl)


@cache
def lora_linear(impl: str) -> lora_contracts.LoraLinear:
    if impl == "cpu":
        from lora_engine.backends.cpu import lora_linear as cpu

        return cpu
    if impl == "triton":
        from lora_engine.backends.triton import lora_linear as triton

        return triton
    _no_kernels("lora_linear", impl)


@cache
def few_rows(impl: str) -> lora_contracts.FewRows:
    if impl == "cpu":
        from lora_engine.backends.cpu import few_rows as cpu

        return cpu
    _no_kernels("few_rows", impl)


@cache
def glu_lora(impl: str) -> lora_contracts.GluLora:
    if impl == "triton":
        from lora_engine.backends.triton import glu_lora as triton

        return triton
    _no_kernels("glu_lora", impl)


@cache
def cross_entropy(impl: str) -> contracts.CrossEntropy:
    if impl == "cpu":
        from lora_engine.backends.cpu import cross_entropy as cpu

        return cpu
    if impl == "triton":
        from lora_engine.backends.triton import cross_entropy as triton

        return triton
    _no_kernels("cross_entropy", impl)


@cache
def attention(impl: str) -> contracts.Attention:
    if impl == "cpu":
        from lora_engine.backends.cpu import attention as cpu

        return cpu
    if impl == "triton":
        from lora_engine.backends.triton import attention as triton

        return triton
    if impl == "cuda":
        from lora_engine.backends.cuda import attention as cuda

        return cuda
    _no_kernels("attention", impl)


@cache
def attention_decode(impl: str) -> contracts.AttentionDecode:
    if impl == "cpu":
        from lora_engine.backends.cpu import attention_decode as cpu

        return cpu
    if impl == "triton":
        from lora_engine.backends.triton import attention_decode as triton

        return triton
    _no_kernels("attention_decode", impl)


@cache
def attention_by_plan(plan: str) -> contracts.Attention:
    """By `backends.attention_plan`: "hopper", ours for 9.0 alone, or "cudnn", PyTorch's."""
    if plan == "hopper":
        from lora_engine.backends.cuda import attention_hopper

        return attention_hopper
    if plan == "cudnn":
        from lora_engine.backends import cudnn_attention

        return cudnn_attention
    _no_kernels("attention", plan)


@cache
def adamw(impl: str) -> contracts.AdamW:
    if impl == "cpu":
        from lora_engine.backends.cpu import adamw as cpu

        return cpu
    if impl == "triton":
        from lora_engine.backends.triton import adamw as triton

        return triton
    if impl == "cuda":
        from lora_engine.backends.cuda import adamw as cuda

        return cuda
    _no_kernels("adamw", impl)


@cache
def adamw_8bit(impl: str) -> contracts.AdamW8bit:
    if impl == "cpu":
        from lora_engine.backends.cpu import adamw_8bit as cpu

        return cpu
    if impl == "triton":
        from lora_engine.backends.triton import adamw_8bit as triton

        return triton
    if impl == "cuda":
        from lora_engine.backends.cuda import adamw_8bit as cuda

        return cuda
    _no_kernels("adamw_8bit", impl)


@cache
def blockwise_4bit(impl: str) -> contracts.Blockwise4bit:
    if impl == "cpu":
        from lora_engine.backends.cpu import blockwise_4bit as cpu

        return cpu
    if impl == "triton":
        from lora_engine.backends.triton import blockwise_4bit as triton

        return triton
    if impl == "cuda":
        from lora_engine.backends.cuda import blockwise_4bit as cuda

        return cuda
    _no_kernels("blockwise_4bit", impl)


@cache
def packed_weight(impl: str) -> contracts.PackedWeight:
    if impl == "cpu":
        from lora_engine.backends.cpu import packed_weight as cpu

        return cpu
    _no_kernels("packed_weight", impl)


@cache
def k_quants(impl: str) -> contracts.KQuants:
    if impl == "cpu":
        from lora_engine.backends.cpu import k_quants as cpu

        return cpu
    _no_kernels("k_quants", impl)
