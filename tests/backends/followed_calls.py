"""Wrong calls on the way from `ops` to a compiled kernel, which `make lint` has mypy read.

Each is marked as an error, and mypy says so where it finds none: that is, where it does not follow
a call because a module of kernels, or what a launcher calls, has become an `Any`. Every operation
has a call here, and every kind of its implementations.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from lora_engine.backends import launchers
from lora_engine.backends.cpu import launch as cpu
from lora_engine.backends.cpu import structs
from lora_engine.backends.cuda import launch as cuda
from lora_engine.values import AdamWHyper

if TYPE_CHECKING:

    def wrong_calls(x: Tensor, hyper: AdamWHyper) -> None:
        launchers.glu("cpu").glu_fwd(x, x, activation="silu")  # type: ignore[call-arg]
        launchers.glu("cpu").glu_forward(x, x, x)  # type: ignore[attr-defined]
        launchers.rms_norm("triton").rms_norm_fwd(
            x,
            None,
            x,
            x,
            None,
            "rstd",  # type: ignore[arg-type]
            1e-6,
            0.0,
        )
        launchers.layer_norm("cpu").layer_norm_bwd(x, x, x, x, x, x, x)  # type: ignore[call-arg]
        launchers.rope("triton").rope(
            x,
            None,
            x,
            None,
            x,
            x,
            None,
            interleaved="yes",  # type: ignore[arg-type]
            inverse=False,
        )
        launchers.lora_linear("cpu").lora_a_fwd(x, x, x, [slice(1)])  # type: ignore[list-item]
        launchers.few_rows("cpu").lora_linear_few_rows(x, x, [(1, None, 0)], [], x)  # type: ignore[list-item]
        launchers.glu_lora("triton").glu_lora_bwd(x, x, x, x, x, x, None)  # type: ignore[arg-type,call-arg]
        launchers.cross_entropy("triton").cross_entropy(
            x,
            x,
            x,
            x,
            x,
            ignored=-100,  # type: ignore[call-arg]
        )
        launchers.attention("cpu").attention_fwd(x)  # type: ignore[call-arg]
        launchers.attention_decode("cpu").attention_decode(x)  # type: ignore[call-arg]
        launchers.adamw("cuda").adamw(x, x, x, x, hyper, 1.0)  # type: ignore[arg-type]
        launchers.adamw_8bit("cuda").adamw_8bit(x, x, x, x, x, x, None, x)  # type: ignore[arg-type]
        launchers.blockwise_4bit("cpu").dequantize_4bit(x, x, x, x, 0, 64)  # type: ignore[arg-type]
        launchers.blockwise_4bit("cuda").quantize_4bit(x, x, x, x, x, "64")  # type: ignore[arg-type]
        launchers.blockwise_4bit("triton").quantize_4bit(x, x, x, x, x)  # type: ignore[call-arg]
        launchers.packed_weight("cpu").decode_scaled(x, x)  # type: ignore[arg-type]
        launchers.packed_weight("cpu").decode_blocks(x)  # type: ignore[arg-type,call-arg]
        launchers.k_quants("cpu").quantize_k(x, "Q4_K")  # type: ignore[call-arg]

    def wrong_structs(x: Tensor, hyper: AdamWHyper) -> None:
        norm = structs.GradNormArgs(x.data_ptr(), x.data_ptr(), x)  # type: ignore[arg-type]
        cpu.kernels().grad_norm(cpu.dtype_code(x.dtype), norm)
        cpu.kernels().adamw(cpu.dtype_code(x.dtype), norm)  # type: ignore[arg-type]
        cpu.kernels().grad_norms(norm)  # type: ignore[attr-defined]
        cuda.kernels().adamw(norm, 0)  # type: ignore[arg-type]
        cuda.AdamWArgs(0, 0, 0, 0, 1, hyper)  # type: ignore[arg-type]
