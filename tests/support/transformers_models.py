"""Small models of transformers, one batch for them, and the comparison of what they train by."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tiny_model import SMALL

from lora_engine.testing import error

SIZES = {**SMALL, "max_position_embeddings": 128}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama_bias": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama_tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral_window": lambda: transformers.MistralConfig(**SIZES, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen2_window": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "llama_gelu": lambda: transformers.LlamaConfig(**SIZES, hidden_act="gelu"),
}


def make(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]())
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(padding: str = "none", supervised_from: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 97, (3, 20), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 13:] = 0
    elif padding == "left":
        mask[1, :7] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :supervised_from] = -100
    given = {"input_ids": ids, "labels": labels}
    return given if padding == "none" else {**given, "attention_mask": mask}


def loss_and_gradients(model: Any, given: dict) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same(ours: tuple[float, dict], theirs: tuple[float, dict], tolerance: float) -> None:
    assert abs(ours[0] - theirs[0]) <= tolerance * abs(theirs[0])
    assert ours[1].keys() == theirs[1].keys() and theirs[1]
    for name, grad in theirs[1].items():
        assert error(ours[1][name], grad, floor=1e-4) < tolerance, name
