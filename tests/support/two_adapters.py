"""A model of two adapters, and examples for each."""

from dataclasses import replace

import peft
import torch
from training_helpers import accelerated, make_examples, tiny_lora

from lora_engine.data.dataset import TokenizedDataset

NAMES = ("default", "other")


def examples_of(name, count=8, seed=0):
    return [replace(e, adapter=name) for e in make_examples(count, seed=seed)]


PARTS = {"default": examples_of("default", seed=3), "other": examples_of("other", seed=4)}
BOTH = TokenizedDataset([e for pair in zip(*PARTS.values(), strict=True) for e in pair])


def two_adapters(active=NAMES):
    model = tiny_lora(rank=4)
    model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.base_model.set_adapter(list(active))
    return accelerated(model)
