"""`output_attentions`: the weights that a model's own plain attention returns."""

from typing import Any

import pytest
import torch
import transformers
from tiny_model import SMALL

import lora_engine
from lora_engine.testing import tiny_llama, with_lora

EAGER = {**SMALL, "attn_implementation": "eager"}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
IDS = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[1, :4] = MASK[2, :8] = 0


def llama() -> Any:
    return tiny_llama(attn_implementation="eager")


def with_windows() -> Any:
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**EAGER, **WINDOW))


def assert_same(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs) > 0
    for x, y in zip(ours, theirs, strict=True):
        assert torch.allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("make", [llama, with_windows])
@pytest.mark.parametrize("part", ["model", "backbone"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_of_one_call(make: Any, part: str, use_cache: bool) -> None:
    model = with_lora(make()).eval()

    def attentions() -> Any:
        called = model if part == "model" else model.get_base_model().model
        options = {"attention_mask": MASK, "use_cache": use_cache, "output_attentions": True}
        return called(IDS, **options).attentions

    expected = attentions()
    lora_engine.accelerate(model)
    assert_same(attentions(), expected)
    assert model(IDS, attention_mask=MASK).attentions is None


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=97,
            n_embd=32,
            n_head=4,
            n_layer=2,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="eager",
        )
    )


def opt() -> Any:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=97,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            attn_implementation="eager",
        )
    )


@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("make", [gpt2, opt, llama])
def test_of_a_model_without_a_head(make: Any, how: str) -> None:
    torch.manual_seed(0)
    model = make().base_model.eval()
    asked = {"output_attentions": True} if how == "argument" else {}
    model.config.output_attentions = how == "config"
    expected = model(IDS, attention_mask=MASK, **asked)
    lora_engine.accelerate(model)
    found = model(IDS, attention_mask=MASK, **asked)
    assert_same(found.attentions, expected.attentions)
    assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_of_a_loss_with_its_gradients(make: Any, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = with_lora(make()) if make is llama else make()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]

    def results() -> list[torch.Tensor]:
        options = {"output_attentions": True, "use_cache": False}
        output = model(IDS, attention_mask=MASK, labels=IDS, **options)
        entropy = sum(-(w * (w + 1e-9).log()).sum() for w in output.attentions)
        return [output.loss.detach(), *torch.autograd.grad(output.loss + entropy, trained)]

    expected = results()
    lora_engine.accelerate(model)
    for ours, theirs in zip(results(), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK)], ids=["left", "none"])
@pytest.mark.parametrize("make", [llama, with_windows])
def test_of_generation(make: Any, mask: torch.Tensor, cache: str) -> None:
    model = with_lora(make()).eval()
    options = {
        "attention_mask": mask,
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "output_attentions": True,
        "return_dict_in_generate": True,
        "cache_implementation": cache,
    }
    expected = model.generate(IDS, **options)
    lora_engine.accelerate(model)
    found = model.generate(IDS, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        assert_same(ours, theirs)
