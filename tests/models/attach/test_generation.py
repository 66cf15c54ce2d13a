"""Generation with a cache: token for token, and logit for logit, what the model does without."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny_model import SMALL

import lora_engine
from lora_engine import ops
from lora_engine.backends.cpu import few_rows
from lora_engine.testing import tiny_llama, with_lora

WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True),
    "mistral_window": lambda: transformers.MistralConfig(**SMALL, sliding_window=5),
    "qwen2_window": lambda: transformers.Qwen2Config(**SMALL, **WINDOW),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
}
OPTIONS = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


def prompts(padding: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :4] = mask[2, :8] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("how", list(OPTIONS))
@pytest.mark.parametrize("name", list(MODELS))
def test_tokens_and_logits_are_the_models_own(name: str, how: str, padding: str) -> None:
    torch.manual_seed(0)
    model = with_lora(transformers.AutoModelForCausalLM.from_config(MODELS[name]())).eval()
    options = {
        **OPTIONS[how],
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = model.generate(**prompts(padding), **options)
    lora_engine.accelerate(model)
    found = model.generate(**prompts(padding), **options)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_cache_may_be_filled_piece_by_piece() -> None:
    model = with_lora(tiny_llama()).eval()
    ids = prompts("none")["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        lora_engine.accelerate(model)
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5)


def test_in_training_with_gradients_and_a_cache() -> None:
    model = with_lora(tiny_llama())
    ids = prompts("none")["input_ids"]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model(ids, use_cache=True).logits.square().sum(), parameters)

    expected = gradients()
    lora_engine.accelerate(model)
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))


def test_logits_of_last_tokens_are_one_product() -> None:
    """Of a part of a tensor PyTorch makes a batch of products, each with a copy of the weight."""
    model = tiny_llama().eval().requires_grad_(False)
    lora_engine.accelerate(model)
    with torch.profiler.profile() as profile:
        logits = model(prompts("none")["input_ids"], logits_to_keep=1, use_cache=False).logits
    assert logits.shape == (3, 1, 97)
    assert "aten::bmm" not in {event.name for event in profile.events()}


def test_tokens_of_padding_fed_one_by_one() -> None:
    """A token that sees nothing, itself included, leaves what comes after it finite."""
    model = with_lora(tiny_llama()).eval()
    ids, mask = prompts("left").values()

    def logits() -> torch.Tensor:
        cache, rows = transformers.DynamicCache(), []
        with torch.no_grad():
            for end in range(1, ids.shape[1] + 1):
                token, seen = ids[:, end - 1 : end], mask[:, :end]
                rows.append(model(token, attention_mask=seen, past_key_values=cache).logits)
        return torch.cat(rows, 1)[mask.bool()]

    expected = logits()
    lora_engine.accelerate(model)
    assert torch.allclose(logits(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["by head", "nothing seen, bool", "nothing seen, added"])
def test_masks_of_ones_own_for_a_single_token(kind: str) -> None:
    model = with_lora(tiny_llama()).eval()
    ids = prompts("none")["input_ids"]
    seen = torch.rand(3, 4 if kind == "by head" else 1, 1, 9) < 0.6
    seen[..., 0] = True
    if kind != "by head":
        seen[0] = False
    mask = torch.where(seen, 0.0, -torch.inf) if kind.endswith("added") else seen

    def logits() -> torch.Tensor:
        with torch.no_grad():
            cache = model(ids[:, :8], use_cache=True).past_key_values
            result: torch.Tensor = model(
                ids[:, 8:], attention_mask=mask, past_key_values=cache
            ).logits
            return result

    expected = logits()
    lora_engine.accelerate(model)
    assert torch.allclose(logits(), expected, atol=1e-5)


def test_in_training_with_checkpoints() -> None:
    """Checkpointed layers have no cache: each new token is alone, under a mask of all before it."""
    model = with_lora(tiny_llama())
    model.gradient_checkpointing_enable()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**prompts("left"), **options)
    lora_engine.accelerate(model)
    assert torch.equal(model.generate(**prompts("left"), **options), expected)


def test_behind_padding_on_the_right_as_without() -> None:
    """transformers warns of it, and reads the next token off a row of padding."""
    model = with_lora(tiny_llama()).eval()
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "output_scores": True}
    given = {"attention_mask": mask, "return_dict_in_generate": True, **options}
    expected = model.generate(ids, **given).scores
    lora_engine.accelerate(model)
    for ours, theirs in zip(model.generate(ids, **given).scores, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_token_reads_weights_and_adapters_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = with_lora(transformers.AutoModelForCausalLM.from_config(MODELS["llama"]())).eval()
    lora_engine.accelerate(model)
    calls: list[int] = []
    run = few_rows.lora_linear_few_rows
    monkeypatch.setattr(
        few_rows, "lora_linear_few_rows", lambda x, *rest: (calls.append(len(x)), run(x, *rest))[1]
    )
    given = prompts("none")
    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
        again = copy.deepcopy(cache)
        calls.clear()
        monkeypatch.setattr(ops.LoraGroup, "fill", lambda self: pytest.fail("factors are placed"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(3)
        token = given["input_ids"][:, :1]
        found = model(token, past_key_values=cache, use_cache=True).logits
    assert calls == [3] * (4 * 2 + 1)  # four groups of each layer, and the head
    monkeypatch.undo()
    lora_engine.restore(model)
    with torch.no_grad():
        expected = model(token, past_key_values=again).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_continuous_batching_runs_with_attention_that_knows_its_cache() -> None:
    plain = with_lora(tiny_llama(), init_lora_weights=False).eval()
    ours = copy.deepcopy(plain)
    lora_engine.accelerate(ours)
    chosen = ours.config._attn_implementation
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    options = {
        "generation_config": transformers.GenerationConfig(**settings),
        "continuous_batching_config": transformers.ContinuousBatchingConfig(
            num_blocks=8, max_batch_tokens=32, auto_switch_to_flash=False
        ),
    }
    asked = [[5, 6, 7], list(range(3, 20))]
    results = [model.generate_batch(asked, **options) for model in (ours, plain)]
    tokens = [[result[name].generated_tokens for name in sorted(result)] for result in results]
    assert tokens[0] == tokens[1] and ours.config._attn_implementation == chosen
