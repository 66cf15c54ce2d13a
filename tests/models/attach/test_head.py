"""The loss of every kind of output head against transformers' and PEFT's own."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers

import lora_engine
from lora_engine.errors import UserError
from lora_engine.models.attach.head import output_head, why_no_head
from lora_engine.models.attach.lazy_logits import LazyLogits
from lora_engine.testing import error, tiny_llama, with_lora

LINEARS = ["q_proj", "v_proj", "up_proj"]


def gemma2() -> Any:
    """Tied weights and a soft-cap low enough that it matters."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=None,
    )
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    return model


def biased() -> Any:
    model = tiny_llama()
    model.lm_head = torch.nn.Linear(32, 97)
    return model


def lora_on_head(model: Any, **config: Any) -> Any:
    return with_lora(model, target_modules=[*LINEARS, "lm_head"], **config)


MODELS: dict[str, Callable[[], Any]] = {
    "frozen": lambda: with_lora(tiny_llama()),
    "full": lambda: tiny_llama(),
    "full_tied": lambda: tiny_llama(tie_word_embeddings=True),
    "soft-cap": lambda: with_lora(gemma2(), target_modules=LINEARS),
    "soft-cap_full": gemma2,
    "bias": lambda: with_lora(biased(), target_modules=LINEARS),
    "bias_full": biased,
    "modules_to_save": lambda: with_lora(
        tiny_llama(), target_modules=LINEARS, modules_to_save=["lm_head"]
    ),
    "lora": lambda: lora_on_head(tiny_llama()),
    "lora_rslora": lambda: lora_on_head(tiny_llama(), use_rslora=True),
    "lora_tied": lambda: lora_on_head(tiny_llama(tie_word_embeddings=True)),
    "lora_soft-cap": lambda: lora_on_head(gemma2()),
    "lora_bias": lambda: lora_on_head(biased()),
}


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.train().zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same(ours: tuple[float, dict], theirs: tuple[float, dict]) -> None:
    assert abs(ours[0] - theirs[0]) <= 1e-5 * abs(theirs[0])
    assert ours[1].keys() == theirs[1].keys() and theirs[1]
    for name, grad in theirs[1].items():
        assert error(ours[1][name], grad, floor=1e-4) < 1e-4, name


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_all_gradients_are_the_models_own(name: str) -> None:
    model = MODELS[name]()
    theirs = loss_and_gradients(model)
    if "full" in name or "modules_to_save" in name or name.startswith("lora"):
        assert any("lm_head" in n or "embed_tokens" in n for n in theirs[1])
    report = lora_engine.accelerate(model)
    assert any(e.operation == "linear_cross_entropy" for e in report.replaced)
    assert isinstance(dict(model(**batch()).items())["logits"], LazyLogits)
    assert_same(loss_and_gradients(model), theirs)
    lora_engine.restore(model)
    assert loss_and_gradients(model)[0] == theirs[0]


def test_the_soft_cap_is_not_forgotten() -> None:
    model = gemma2()
    capped = loss_and_gradients(model)[0]
    model.config.final_logit_softcapping = None
    assert abs(loss_and_gradients(model)[0] - capped) > 0.01


def test_adapters_on_the_head_can_be_disabled_merged_and_switched() -> None:
    model = lora_on_head(tiny_llama())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with torch.no_grad():
        model.get_base_model().lm_head.lora_B["other"].weight.normal_()
    plain = copy.deepcopy(model)
    lora_engine.accelerate(model)
    with torch.no_grad():
        for name in ("other", "default"):
            model.set_adapter(name), plain.set_adapter(name)
            assert torch.allclose(model(**batch()).loss, plain(**batch()).loss, atol=1e-5)
        expected = plain(**batch()).loss
        with model.disable_adapter(), plain.disable_adapter():
            off = plain(**batch()).loss
            assert abs(off - expected) > 1e-3
            assert torch.allclose(model(**batch()).loss, off, atol=1e-5)
        model.merge_adapter()
        assert torch.allclose(model(**batch()).loss, expected, atol=1e-5)
        model.unmerge_adapter()
        assert torch.allclose(model(**batch()).loss, expected, atol=1e-5)


def test_a_trained_copy_of_the_head_can_be_disabled() -> None:
    model = MODELS["modules_to_save"]()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    plain = copy.deepcopy(model)
    lora_engine.accelerate(model)
    losses = []
    for disabled in (False, True):
        if disabled:
            model.base_model.disable_adapter_layers(), plain.base_model.disable_adapter_layers()
        losses.append(plain(**batch()).loss)
        assert torch.allclose(model(**batch()).loss, losses[-1], atol=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("config,reason", [({"lora_dropout": 0.1}, "lora_dropout > 0")])
def test_heads_that_are_not_covered_run_as_their_own(config: dict, reason: str) -> None:
    model = lora_on_head(tiny_llama(), **config)
    assert reason in (why_no_head(model) or "")
    report = lora_engine.accelerate(model)
    assert any(e.operation == "linear_cross_entropy" for e in report.left)
    assert model(**batch()).logits is not None


def test_the_head_is_described_as_it_is() -> None:
    model = tiny_llama()
    assert output_head(with_lora(model)).weight is model.lm_head.weight
    adapted = lora_on_head(tiny_llama())
    lora = output_head(adapted).lora
    assert lora is not None and lora.scaling == 2.0
    assert output_head(gemma2()).softcap == 2.0


def test_heads_whose_loss_would_differ_are_refused() -> None:
    for name in ("logits_scaling", "logit_scale", "lm_head_multiplier"):
        scaled = tiny_llama()
        setattr(scaled.config, name, 8.0)
        with pytest.raises(UserError, match=rf"changes its logits \(config.{name}\)"):
            output_head(scaled)
    dora = lora_on_head(tiny_llama(), use_dora=True)
    with pytest.raises(UserError, match="LoRA on the output head: DoRA"):
        output_head(dora)
    other = tiny_llama()
    other.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 97))
    with pytest.raises(UserError, match="the output head is Sequential"):
        output_head(other)
