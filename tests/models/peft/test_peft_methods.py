"""PEFT's other methods than LoRA, around an accelerated model or under it: the same numbers."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

import lora_engine
from lora_engine.testing import tiny_llama

IDS = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(2))
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEAR = {"task_type": "CAUSAL_LM", "target_modules": PROJECTIONS}
VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
SQUARE = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "o_proj"]}
METHODS: dict[str, Callable[[], Any]] = {
    "prefix tuning": lambda: peft.PrefixTuningConfig(**VIRTUAL),
    "prompt tuning": lambda: peft.PromptTuningConfig(**VIRTUAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=16, **VIRTUAL),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(
        adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"
    ),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=20, tinit=2, tfinal=2, **LINEAR
    ),
    "VeRA": lambda: peft.VeraConfig(r=4, **SQUARE),
    "LoHa": lambda: peft.LoHaConfig(r=4, **LINEAR),
    "LoKr": lambda: peft.LoKrConfig(r=4, **LINEAR),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=8, **LINEAR),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **SQUARE),
    "HRA": lambda: peft.HRAConfig(r=4, **LINEAR),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=20, **LINEAR),
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=4, num_vectors=8, vector_length=8, topk=2, **SQUARE),
    "UniLoRA": lambda: peft.UniLoraConfig(r=4, **SQUARE),
    "TinyLoRA": lambda: peft.TinyLoraConfig(**SQUARE),
    "MiSS": lambda: peft.MissConfig(r=4, **LINEAR),
    "LN tuning": lambda: peft.LNTuningConfig(
        target_modules=["input_layernorm", "norm"], task_type="CAUSAL_LM"
    ),
    "trainable tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[3, 5, 7], target_modules=["embed_tokens"], task_type="CAUSAL_LM"
    ),
    "LoRA and trainable tokens": lambda: peft.LoraConfig(
        r=4, trainable_token_indices=[3, 5, 7], **LINEAR
    ),
}


def made(method: str, when: str | None) -> Any:
    """With the adapter put around the model before or after `accelerate`, or without that."""
    base = tiny_llama()
    if when == "before":
        lora_engine.accelerate(base)
    torch.manual_seed(3)
    model = peft.get_peft_model(base, METHODS[method]())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    if when == "after":
        lora_engine.accelerate(model)
    return model


def results(model: Any, mask: torch.Tensor) -> list[torch.Tensor]:
    """Losses with and without labels on padding, gradients, logits, and what is generated."""
    found: list[torch.Tensor] = []
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for labels in (IDS, IDS.masked_fill(mask == 0, -100)):
        loss = model(IDS, attention_mask=mask, labels=labels).loss
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
        found += [loss.detach(), *(grad for grad in grads if grad is not None)]
    model.eval()
    given = {"attention_mask": mask}
    with torch.no_grad():
        logits = model(IDS, **given).logits[:, -IDS.shape[1] :]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(input_ids=IDS, **given, **options)
    return [*found, logits[mask.bool()], generated.float()]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", METHODS)
def test_every_number_is_as_without(method: str, when: str) -> None:
    for padding in (slice(-4, None), slice(0, 4)):
        mask = torch.ones_like(IDS)
        mask[1, padding] = 0
        found, expected = (results(made(method, each), mask) for each in (when, None))
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=2e-5 * max(float(theirs.abs().max()), 1e-3))


@pytest.mark.parametrize("method", METHODS)
def test_parameters_stay_themselves_in_half_precision(method: str) -> None:
    """Each layer is tried in float32 too, with banks of parameters that its linears share."""
    base = tiny_llama(dtype=torch.bfloat16)
    model = peft.get_peft_model(base, METHODS[method](), autocast_adapter_dtype=False)
    before = dict(model.named_parameters(remove_duplicate=False))
    values = {name: p.detach().clone() for name, p in before.items()}
    lora_engine.accelerate(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    for name, p in before.items():
        assert after[name] is p and torch.equal(p, values[name]), name
