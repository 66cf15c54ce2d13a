"""A model whose adapter learns over its merged and quantised weights."""

from typing import Any

import peft
import pytest
import torch

import lora_engine
from lora_engine.errors import UserError
from lora_engine.models.peft.straight_through import StraightThrough
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.models.quantized.merge_aware_linear import MergeAwareLinear
from lora_engine.quantization.formats import WRITABLE
from lora_engine.testing import error, tiny_llama, with_lora

SIZES = {"hidden_size": 128, "intermediate_size": 256, "kv_heads": 2}


def model_of(dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    return with_lora(tiny_llama(dtype=dtype, **SIZES), **lora)


def results(model: Any) -> dict[str, torch.Tensor]:
    """The loss and all gradients, and logits made without gradients, of many rows and of few."""
    ids = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(5))
    loss = model(input_ids=ids, labels=ids).loss
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        few = model(input_ids=ids[:1, :5]).logits
    return {
        "loss": loss.detach(),
        "logits": logits,
        "few": few,
        **dict(zip(named, grads, strict=True)),
    }


def merged(model: Any, format: str = "nf4") -> Any:
    """The served model: PEFT's own merge of the adapter, quantised by `quantize_model`."""
    plain = model.merge_and_unload()
    lora_engine.quantize_model(plain, format)
    return plain


@pytest.mark.parametrize("format", WRITABLE)
def test_it_computes_what_the_merged_and_quantised_model_computes(format: str) -> None:
    model = model_of()
    lora_engine.make_merge_aware(model, format)
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(5))
    served = merged(model_of(), format)
    with torch.no_grad():
        expected = served(input_ids=ids, labels=ids)
        actual = model(input_ids=ids, labels=ids)
        assert torch.equal(actual.loss, expected.loss) and torch.equal(
            actual.logits, expected.logits
        )
        lora_engine.accelerate(model, strict=True), lora_engine.accelerate(served)
        ours = model(input_ids=ids).logits
        assert error(ours, expected.logits) < 1e-5
        assert error(ours, served(input_ids=ids).logits) < 1e-5
    weights = {n: m for n, m in served.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(weights) == 14
    for name, linear in weights.items():
        layer = model.get_submodule(f"base_model.model.{name}.base_layer")
        kept = layer.mergeable.merged(layer._adapters())
        for part, tensor in linear.quantized.tensors.items():
            assert torch.equal(kept.tensors[part], tensor), (name, part)


def test_gradients_are_the_straight_through_ones() -> None:
    """Of the loss by the quantised weights, as if these were W + s B A."""
    model = model_of()
    lora_engine.make_merge_aware(model)
    ours = results(model)
    plain = tiny_llama(**SIZES)
    sums: dict[str, tuple[torch.Tensor, Any]] = {}
    for name, layer in model.named_modules():
        if not isinstance(getattr(layer, "base_layer", None), MergeAwareLinear):
            continue
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        exact = layer.base_layer.weight + layer.scaling["default"] * b @ a
        packed = lora_engine.quantize_weight(exact.detach()).dequantize()
        inner = name.removeprefix("base_model.model.")
        sums[f"{inner}.weight"] = exact + (packed - exact).detach(), layer
    ids = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(5))
    passed = {name: weight for name, (weight, _) in sums.items()}
    loss = torch.func.functional_call(plain, passed, (), {"input_ids": ids, "labels": ids}).loss
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, expected in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
        assert error(ours[name], expected) < 1e-4, name
    assert error(ours["loss"], loss.detach()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accelerated_it_computes_the_same(dtype: torch.dtype) -> None:
    model = model_of(dtype)
    lora_engine.make_merge_aware(model)
    theirs = results(model)
    report = lora_engine.accelerate(model, strict=True)
    assert "LoRA" in str(report) or "block" in str(report)
    ours = results(model)
    for name, expected in theirs.items():
        assert error(ours[name], expected) < (1e-4 if dtype == torch.float32 else 0.1), name
    lora_engine.restore(model)
    restored = results(model)
    assert all(torch.equal(restored[name], expected) for name, expected in theirs.items())


@pytest.mark.parametrize("accelerated", [True, False])
def test_steps_learn_through_the_quantiser(accelerated: bool) -> None:
    model = model_of()
    lora_engine.make_merge_aware(model, "int4")
    if accelerated:
        lora_engine.accelerate(model, strict=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    ids = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    with torch.no_grad():
        last = model(input_ids=ids, labels=ids).loss
    lora_engine.restore(model)
    for module in model.modules():  # PEFT merges plain linears alone
        if isinstance(module, MergeAwareLinear):
            module.__class__ = torch.nn.Linear
        if hasattr(module, "lora_variant"):
            module.lora_variant.clear()
    served = merged(model, "int4")
    with torch.no_grad():
        assert error(served(input_ids=ids, labels=ids).loss, last) < 1e-5


def test_a_disabled_adapter_leaves_the_quantised_base() -> None:
    model, plain = model_of(), tiny_llama(**SIZES)
    lora_engine.quantize_model(plain)
    lora_engine.make_merge_aware(model)
    ids = torch.randint(0, 97, (2, 20))
    with torch.no_grad():
        on, expected = model(input_ids=ids).logits, plain(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, expected)
        lora_engine.accelerate(model, strict=True)
        with model.disable_adapter():
            assert error(model(input_ids=ids).logits, expected) < 1e-5
        assert error(model(input_ids=ids).logits, on) < 1e-5
    assert error(on, expected) > 0.01


def test_linears_without_an_adapter_are_packed() -> None:
    model = model_of(target_modules=["q_proj", "down_proj"])
    lora_engine.make_merge_aware(model, "int8")
    kinds = {n: type(m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    packed = [n for n, kind in kinds.items() if kind is QuantizedLinear]
    aware = [n for n, kind in kinds.items() if kind is MergeAwareLinear]
    assert len(packed) == 10 and len(aware) == 4
    assert all(n.endswith(("q_proj.base_layer", "down_proj.base_layer")) for n in aware)
    theirs = results(model)
    lora_engine.accelerate(model, strict=True)
    assert all(error(x, theirs[name]) < 1e-4 for name, x in results(model).items())


def test_an_adapter_loaded_later_is_not_taken_until_the_next_call() -> None:
    model = model_of()
    lora_engine.make_merge_aware(model)
    model.add_adapter("other", peft.LoraConfig(target_modules="all-linear", r=2))
    model.set_adapter("other")
    report = lora_engine.accelerate(model)
    assert "one of its adapters is not" in str(report)
    lora_engine.restore(model)
    lora_engine.make_merge_aware(model)
    lora_engine.accelerate(model, strict=True)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UserError, match="several adapters"):
        model(input_ids=torch.arange(9)[None])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head stays out of packed bits"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens is trained other"),
    "whole": (
        {"target_modules": ["q_proj"], "modules_to_save": ["k_proj"]},
        "k_proj is trained other",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_into_packed_bits_is_refused_and_left_as_it_was(name: str) -> None:
    options, reason = REFUSED[name]
    model = model_of(**options)
    modules = dict(model.named_modules())
    with pytest.raises(UserError, match=reason) as told:
        lora_engine.make_merge_aware(model)
    assert "\n" not in str(told.value)
    assert all(model.get_submodule(n) is m for n, m in modules.items())


def test_a_model_that_is_not_ready_is_refused() -> None:
    with pytest.raises(UserError, match="no LoRA layers"):
        lora_engine.make_merge_aware(tiny_llama(**SIZES))
    with pytest.raises(UserError, match="did you mean nf4"):
        lora_engine.make_merge_aware(model_of(), "nf5")
    with pytest.raises(UserError, match="skip 'k_prj' matches no linear; did you mean k_proj"):
        lora_engine.make_merge_aware(model_of(), skip=["k_prj"])
    model = model_of()
    lora_engine.accelerate(model)
    with pytest.raises(UserError, match="before accelerate"):
        lora_engine.make_merge_aware(model)
    lora_engine.restore(model)
    lora_engine.make_merge_aware(model)
    with pytest.raises(UserError, match="lora-engine merge"):
        model.merge_and_unload()


def test_a_head_may_be_saved_whole() -> None:
    model = model_of(modules_to_save=["lm_head"])
    lora_engine.make_merge_aware(model)
    lora_engine.accelerate(model)
    assert all(x.isfinite().all() for x in results(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accelerated", [True, False])
def test_preflight_compares_the_gradients_with_the_sum_that_is_not_quantised(
    accelerated: bool, dtype: torch.dtype
) -> None:
    model = with_lora(tiny_llama(dtype=dtype, initializer_range=0.3, **SIZES))
    lora_engine.make_merge_aware(model, "nf4")
    if accelerated:
        lora_engine.accelerate(model, strict=True)
    ids = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "labels": ids}
    before = results(model)
    report = lora_engine.preflight(model, batch)
    assert report.unreached == 0 and report.loss_after < report.loss_before
    assert all(torch.equal(before[name], x) for name, x in results(model).items())


def test_preflight_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    lora_engine.make_merge_aware(model)
    right = StraightThrough.forward
    monkeypatch.setattr(
        StraightThrough,
        "forward",
        lambda module, active_adapter, x, result, **more: right(
            module, active_adapter, -x, result, **more
        ),
    )
    ids = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(2))
    with pytest.raises(UserError, match="gradient"):
        lora_engine.preflight(model, {"input_ids": ids, "labels": ids})
