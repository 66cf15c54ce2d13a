"""What tests and benchmarks share: oracle comparison and input makers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ROLES = ["<user>", "<assistant>", "<system>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


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
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=alpha, **settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return wrapped


def byte_tokenizer() -> Any:
    """A tokenizer of transformers whose tokens are bytes, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<end>", "<pad>", *ROLES]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    bytes_to_tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_to_tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_to_tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_to_tokens,
        eos_token="<end>",
        pad_token="<pad>",
        additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
    )


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
