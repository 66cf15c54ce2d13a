"""Right models that look wrong at first: little to learn, or a batch that reaches a part only."""

import copy

import peft
import pytest
import torch
from torch import nn
from training_helpers import (
    one_batch,
    rows,
    tiny_llama,
    tiny_lora,
)
from transformers import OlmoeConfig, OlmoeForCausalLM
from two_adapters import BOTH, NAMES, PARTS, two_adapters

from lora_engine import preflight


@pytest.fixture(scope="module", params=["learned", "at its lowest"])
def learned(request):
    """A model, trained until its loss is near zero, or as low as contradictory examples let it."""
    model, batch = tiny_llama(), rows(4, 6)
    batch["attention_mask"][:] = 1
    batch["labels"] = batch["input_ids"].clone()
    if request.param == "at its lowest":
        batch["input_ids"][:] = batch["input_ids"][0].clone()
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(100):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return request.param, model, batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_learned_already_passes(learned, dtype):
    kind, model, batch = learned
    report = preflight(copy.deepcopy(model).to(dtype), batch)
    assert report.loss_after <= report.loss_before
    assert (report.loss_before < 0.01) == (kind == "learned")


@pytest.mark.parametrize(
    ("dtype", "seed"),
    [*((torch.float32, seed) for seed in (0, 1, 2)), (torch.bfloat16, 0), (torch.bfloat16, 3)],
    ids=str,
)
def test_routed_experts_pass(dtype, seed):
    """Which experts a token is routed to jumps, and the loss with it, where routers move."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = OlmoeConfig(vocab_size=61, num_experts=8, num_experts_per_tok=2, **sizes, **heads)
    torch.manual_seed(seed)
    preflight(OlmoeForCausalLM(config).to(dtype), rows(3, 16))


def test_a_loss_of_zero_passes():
    model, batch = tiny_llama(), rows(1, 4)
    with torch.no_grad():
        model.model.norm.weight.mul_(1e4)
    batch["attention_mask"][:] = 1
    with torch.no_grad():
        following = model(batch["input_ids"]).logits[0, 0].argmax()
    batch["labels"] = torch.tensor([[-100, following, -100, -100]])
    report = preflight(model, batch)
    assert report.loss_before == report.loss_after == 0
    assert "learned already" in str(report)


def test_gradients_of_rounding_alone_pass():
    """Where there is one key, q and k change nothing, and their gradients are zero but for that."""
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"])
    model = peft.get_peft_model(tiny_llama(), config)

    def rounds(module, args, output):  # some machines' products are exact here
        output.register_hook(lambda gradient: gradient + 1e-9 * torch.randn_like(gradient))

    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.register_forward_hook(rounds)
    report = preflight(model, rows(1, 2) | one_key())
    assert report.loss_after == report.loss_before


def one_key():
    return {"attention_mask": torch.ones(1, 2, dtype=torch.long), "labels": torch.tensor([[3, 5]])}


def test_layers_that_the_batch_does_not_reach_pass():
    model = tiny_llama()
    model.spare = nn.ModuleDict({"self_attn": nn.Linear(32, 32)})
    config = peft.LoraConfig(target_modules=["q_proj", "spare.self_attn"])
    report = preflight(peft.get_peft_model(model, config), rows())
    assert (report.parameters, report.unreached) == (6, 2)
    assert "reach 4 of 6 trained tensors" in str(report)


def test_tokens_that_the_batch_does_not_hold_pass():
    model = tiny_llama()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    config = peft.TrainableTokensConfig(token_indices=[5], target_modules=["embed_tokens"])
    batch = rows()
    batch["input_ids"][batch["input_ids"] == 5] = 6
    model = peft.get_peft_model(model, config)
    report = preflight(model, batch)
    assert (report.parameters, report.unreached) == (1, 1)
    assert "reaches nothing that is trained" in str(report)
    batch["input_ids"][:, -2] = 5
    assert preflight(model, batch).unreached == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_models_pass(reentrant):
    model = tiny_lora()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert preflight(model, rows()).unreached == 0


def test_records_of_one_adapter_leave_the_other_be():
    model = two_adapters()
    report = preflight(model, one_batch(PARTS["other"]))
    assert (report.parameters, report.unreached) == (56, 28)
    assert report.gradient_norms["other.lora_A"] > 0 == report.gradient_norms["default.lora_A"]
    report = preflight(model, one_batch(BOTH.examples))
    assert report.unreached == 0
    assert set(report.gradient_norms) == {f"{n}.{f}" for n in NAMES for f in ("lora_A", "lora_B")}


def test_a_frozen_view_of_what_is_trained_may_follow_it():
    model = tiny_llama()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data, requires_grad=False)
    report = preflight(model, rows())
    assert report.unreached == 0
