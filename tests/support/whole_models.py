"""Small models of several families with PEFT adapters, batches for them, and what they train by."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from lora_engine.testing import assert_as_good_as, with_lora

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama_biases": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral_window": lambda: transformers.MistralConfig(**SIZES, sliding_window=5),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, head_dim=16),
    "stablelm": lambda: transformers.StableLmConfig(**SIZES, use_qkv_bias=True),  # LayerNorm
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8},
    "rslora": {"r": 5, "use_rslora": True},
    "dora": {"r": 4, "use_dora": True},
    "lora_bias": {"r": 4, "lora_bias": True},
    "some_linears": {"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "embedding_and_head": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "trained_head": {"r": 4, "modules_to_save": ["lm_head", "embed_tokens"]},
}
# What rounding may add to PEFT's own error, relative to the largest magnitude.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def model_of(name: str, dtype: torch.dtype = torch.float32, *, layers: int = 2) -> Any:
    """A random model on the CPU whose norms and biases are no ones and zeros."""
    torch.manual_seed(0)
    config = MODELS[name]()
    config.num_hidden_layers = layers
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def adapted(
    name: str, adapters: str, dtype: torch.dtype = torch.float32, *, layers: int = 2, **more: Any
) -> Any:
    """The model with PEFT adapters of ADAPTERS, or with "two" of different ranks, both active."""
    config = {**ADAPTERS["lora" if adapters == "two" else adapters], **more}
    model = with_lora(model_of(name, dtype, layers=layers), **config)
    if adapters == "two":
        targets = ["q_proj", "up_proj"]
        dropout = config.get("lora_dropout", 0.0)  # another one would be left to PEFT
        other = peft.LoraConfig(r=3, lora_alpha=9, target_modules=targets, lora_dropout=dropout)
        model.add_adapter("other", other)
        model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "magnitude" in key:  # they start as the norm, which makes the scale 1
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif "lora_B.other" in key or "lora_embedding_A" in key or key.endswith("B.bias"):
                parameter.normal_(std=0.05)
    return model


def batch_of(kind: str, device: torch.device) -> dict[str, Tensor]:
    """Labelled rows: "whole", padded on the "right" or "left", or "packed" into one."""
    ids = torch.randint(3, 97, (3, 24), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, :3] = -100
    given = {"input_ids": ids, "labels": labels}
    if kind in ("right", "left"):
        mask = torch.ones_like(ids)
        mask[1, 15:] = 0
        mask = mask if kind == "right" else mask.flip(1)
        given["attention_mask"], given["labels"] = mask, labels.masked_fill(mask == 0, -100)
        if kind == "left":  # the first token is predicted from padding, whose row nobody defines
            given["labels"][1, 9] = -100
    elif kind == "packed":
        places = torch.cat([torch.arange(n) for n in (24, 11, 37)])
        given = {name: x.reshape(1, -1) for name, x in given.items()}
        given["position_ids"] = places[None]
        given["labels"] = given["labels"].masked_fill(places == 0, -100)
    return {name: x.to(device) for name, x in given.items()}


def training_results(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss, and the gradient of every trained parameter that has one."""
    model.zero_grad()
    loss = model.train()(**given).loss
    loss.backward()
    named = model.named_parameters()
    return {"loss": loss.detach(), **{n: p.grad for n, p in named if p.grad is not None}}


def exact(model: Any) -> Any:
    """A copy in float64 on the CPU, with transformers' and PEFT's own forwards."""
    return copy.deepcopy(model).cpu().double()


def assert_trains_as_well(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    oracle: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Every result of ours is as near to the oracle as PEFT's in the same dtype."""
    assert ours.keys() == theirs.keys() == oracle.keys()
    gradients = {name: x for name, x in oracle.items() if name != "loss"}
    assert gradients and all(x.any() for x in gradients.values())
    largest = max(x.abs().max().item() for x in gradients.values())
    for name, expected in oracle.items():
        assert ours[name].dtype == theirs[name].dtype
        assert_as_good_as(
            ours[name].cpu(),
            theirs[name].cpu(),
            expected,
            tolerance=TOLERANCE[dtype],
            floor=1e-30 if name == "loss" else 0.1 * largest,
            what=name,
        )
