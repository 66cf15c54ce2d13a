"""What tests and benchmarks share: oracle comparison and input makers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tiny_llama(
    *,
    vocab_size: int = 97,
    hidden_size: int = 32,
    intermediate_size: int = 48,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    """A small random LlamaForCausalLM of transformers, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=512,
            **config,
        )
    )
    return model.to(dtype)


def with_lora(model: Any, *, r: int = 4, alpha: int = 8, seed: int = 0, **config: Any) -> Any:
    """`model` with PEFT LoRA on all linear layers and B random, so that no gradient is zero."""
    import peft

    torch.manual_seed(seed)
    config.setdefault("target_modules", "all-linear")
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=r, lora_alpha=alpha, task_type="CAUSAL_LM", **config)
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return wrapped


def cu_seqlens(lengths: Sequence[int]) -> Tensor:
    """Bounds [S + 1] int32 of packed sequences of the given lengths."""
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    bounds[1:] = torch.tensor(list(lengths), dtype=torch.int32).cumsum(0)
    return bounds


def error(actual: Tensor, oracle: Tensor, floor: float = 1e-30) -> float:
    """Largest absolute difference, relative to the oracle's largest magnitude or `floor`."""
    if actual.shape != oracle.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} is not {tuple(oracle.shape)}")
    if not oracle.numel():
        return 0.0
    scale = max(oracle.double().abs().max().item(), floor)
    return (actual.double() - oracle.double()).abs().max().item() / scale


def assert_as_good_as(
    actual: Tensor,
    peer: Tensor,
    oracle: Tensor,
    *,
    tolerance: float,
    floor: float = 1e-30,
    what: str = "result",
) -> None:
    """`actual` loses no more against `oracle` than `peer`, PyTorch in the same dtype, does.

    The rule of ml-cross-entropy's and flash-attention's tests: our error <= peer's + tolerance,
    errors relative to the oracle's largest magnitude, or to `floor` where that is larger (for
    results that are zero but for cancellation).
    """
    if not torch.isfinite(actual).all():
        raise AssertionError(f"{what} has non-finite values")
    ours, theirs = error(actual, oracle, floor), error(peer, oracle, floor)
    if ours > theirs + tolerance:
        raise AssertionError(
            f"{what}: error {ours:.3g} against the oracle, PyTorch's in the same dtype is "
            f"{theirs:.3g} (tolerance {tolerance:.3g})"
        )
