"""Every kind of adapter in the fast path: loss and gradients are those of PEFT's own layers."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from transformers_models import assert_same, batch, loss_and_gradients

import lora_engine
from lora_engine.errors import UserError
from lora_engine.testing import tiny_llama, with_lora

CONFIGS: dict[str, dict[str, Any]] = {
    "rank_1": {"r": 1},
    "rank_64": {"r": 64},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "lora_bias_on_head": {"lora_bias": True, "target_modules": ["q_proj", "lm_head"]},
    "q_and_v": {"target_modules": ["q_proj", "v_proj"]},
    "mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "ranks": {"rank_pattern": {"q_proj": 7, "up_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding_and_head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    "dora_on_some": {"use_dora": True, "target_modules": ["k_proj", "gate_proj", "down_proj"]},
}


def build(name: str) -> Any:
    bias = name in ("bias", "dora", "lora_bias")
    model = with_lora(tiny_llama(attention_bias=bias, mlp_bias=bias), **CONFIGS[name])
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "magnitude" in parameter_name:  # they start as the norm, which makes the scale 1
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter_name.endswith("bias") or "lora_embedding" in parameter_name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_peft(name: str, padding: str) -> None:
    model = build(name)
    theirs = loss_and_gradients(model, batch(padding))
    logits = model(**{**batch(padding), "labels": None}).logits.detach()
    report = lora_engine.accelerate(model, strict=True)
    assert any(entry.operation == "lora_linear" for entry in report.replaced)
    ours = loss_and_gradients(model, batch(padding))
    assert_same(ours, theirs, 1e-4)
    again = loss_and_gradients(model, batch(padding))
    assert all(torch.equal(again[1][key], grad) for key, grad in ours[1].items())
    seen = batch(padding).get("attention_mask", torch.ones(3, 20)).bool()
    mine = model(**{**batch(padding), "labels": None}).logits
    assert torch.allclose(mine[seen], logits[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_changes_the_result_as_with_peft(name: str) -> None:
    """The factors in the buffer, and DoRA's norms, are renewed."""
    model, plain = build(name), build(name)
    lora_engine.accelerate(model)
    for each in (model, plain):
        loss_and_gradients(each, batch())
        torch.optim.SGD((p for p in each.parameters() if p.requires_grad), lr=0.1).step()
    assert_same(loss_and_gradients(model, batch()), loss_and_gradients(plain, batch()), 1e-4)


def two_adapters() -> Any:
    model = with_lora(tiny_llama(), r=4)
    other = peft.LoraConfig(r=3, lora_alpha=9, target_modules=["embed_tokens", "q_proj", "up_proj"])
    model.add_adapter("other", other)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.other" in name or "lora_embedding_A.other" in name:
                parameter.normal_(std=0.05)
    return model


def activate(model: Any, names: str | list[str]) -> None:
    model.base_model.set_adapter(names)


def test_adapters_are_switched_and_added_up() -> None:
    model = two_adapters()
    plain = copy.deepcopy(model)
    activate(model, ["default", "other"])  # room for both
    lora_engine.accelerate(model, strict=True)
    choices: list[str | list[str]] = ["other", "default", ["default", "other"], "other"]
    for names in choices:
        activate(model, names), activate(plain, names)
        assert_same(loss_and_gradients(model, batch()), loss_and_gradients(plain, batch()), 1e-4)


def test_disabled_adapters_still_run_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(tiny_llama())
    lora_engine.accelerate(model)
    ids = batch()["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        expected = tiny_llama().eval()(ids).logits
        # Every forward of PEFT's layers begins with it.
        monkeypatch.setattr(peft.tuners.lora.Linear, "_check_forward_args", None)
        assert torch.allclose(model.eval()(ids, use_cache=False).logits, expected, atol=1e-5)


def test_mixed_batches_of_adapter_names_are_peft_s() -> None:
    model = two_adapters().eval()
    plain = copy.deepcopy(model)
    lora_engine.accelerate(model)
    names = ["default", "other", "__base__"]
    with torch.no_grad():
        ours = model(batch()["input_ids"], adapter_names=names).logits
        theirs = plain(batch()["input_ids"], adapter_names=names).logits
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert not torch.allclose(ours, plain(batch()["input_ids"]).logits, atol=1e-3)


def packed(lengths: tuple[int, ...], seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 97, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def gradients_of(model: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    lengths = given["labels"].ne(-100).sum()
    (model(**given, use_cache=False).loss * lengths).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_rows_routed_by_adapter_train_each_as_if_alone() -> None:
    model = two_adapters()
    activate(model, ["default", "other"])
    lora_engine.accelerate(model, strict=True)
    first, second = packed((7, 5), seed=1), packed((9,), seed=2)
    both = {key: torch.cat((first[key], second[key]), dim=1) for key in first}
    rows = torch.tensor([0] * 12 + [1] * 9)[None]
    with lora_engine.route_adapters(model, ["default", "other"], rows):
        together = gradients_of(model, both)
    for name, part in (("default", first), ("other", second)):
        activate(model, name)
        alone = gradients_of(model, part)
        assert alone and all(f".{name}" in key for key in alone)
        for key, gradient in alone.items():
            assert torch.allclose(together[key], gradient, rtol=1e-4, atol=1e-6), key


def test_rows_without_an_adapter_use_the_base() -> None:
    model = two_adapters().eval()
    activate(model, ["default", "other"])
    lora_engine.accelerate(model)
    ids = batch()["input_ids"]
    with torch.no_grad():
        with lora_engine.route_adapters(model, ["default"], torch.full((ids.numel(),), -1)):
            routed = model(ids, use_cache=False).logits
            with pytest.raises(UserError, match="use_cache=False"):
                model(ids)
        with model.disable_adapter():
            assert torch.allclose(routed, model(ids).logits, atol=1e-5)


def refuse_unknown(model: Any) -> None:
    with lora_engine.route_adapters(model, ["default", "none"], torch.zeros(3)):
        pass


def refuse_plain(model: Any) -> None:
    lora_engine.restore(model)
    with lora_engine.route_adapters(model, ["default"], torch.zeros(3)):
        pass


def refuse_text(model: Any) -> None:
    with lora_engine.route_adapters(model, "default", torch.zeros(3)):
        pass


def run_rows(model: Any, rows: torch.Tensor) -> None:
    with lora_engine.route_adapters(model, ["default"], rows):
        model(batch()["input_ids"], use_cache=False)


@pytest.mark.parametrize(
    "misuse,message",
    [
        (refuse_unknown, "no adapter 'none'"),
        (refuse_plain, "accelerate"),
        (refuse_text, r"names is a text; give a list, \['default'\]"),
        (lambda model: run_rows(model, torch.zeros(60)), "torch.float32, expected torch.int64"),
        (lambda model: run_rows(model, torch.arange(60) - 1), "from -1 to 58; expected 0 to 0"),
        (lambda model: run_rows(model, torch.zeros(59).long()), r"59 rows .* 60 tokens \[3, 20\]"),
    ],
    ids=["unknown", "plain", "text", "floats", "no_such_number", "too_few"],
)
def test_routing_that_cannot_work_is_refused(misuse: Callable[[Any], None], message: str) -> None:
    model = two_adapters()
    lora_engine.accelerate(model)
    with pytest.raises(UserError, match=message):
        misuse(model)


def test_routing_through_peft_s_own_layers_is_refused() -> None:
    model = with_lora(tiny_llama(), lora_bias=True)
    lora_engine.accelerate(model)
    with (
        lora_engine.route_adapters(model, ["default"], torch.zeros(60, dtype=torch.int64)),
        pytest.raises(UserError, match="lora_bias"),
    ):
        model(batch()["input_ids"], use_cache=False)
