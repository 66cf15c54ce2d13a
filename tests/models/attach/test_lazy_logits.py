"""Logits of a training step: not made unless they are read, and then the model's own."""

from typing import Any

import pytest
import torch

import lora_engine
from lora_engine.errors import UserError
from lora_engine.models.attach.lazy_logits import LazyLogits
from lora_engine.testing import error, tiny_llama, with_lora


def given() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def accelerated(**config: Any) -> Any:
    model = with_lora(tiny_llama(), **config)
    lora_engine.accelerate(model)
    return model


@pytest.mark.parametrize(
    "read",
    [
        lambda output: output.logits,
        lambda output: output["logits"],
        lambda output: output.get("logits"),
        lambda output: output[1],
        lambda output: output[:2][1],
        lambda output: output.to_tuple()[1],
        lambda output: type(output)(dict(output.items())).logits,  # as accelerate converts results
    ],
    ids=["attribute", "key", "get", "place", "slice", "tuple", "copy"],
)
def test_however_they_are_read_they_are_the_models_own(read: Any) -> None:
    model = with_lora(tiny_llama())
    expected = model(**given()).logits
    lora_engine.accelerate(model)
    assert torch.allclose(read(model(**given())), expected, atol=1e-5)


def test_reading_the_loss_does_not_make_them() -> None:
    output = accelerated()(**given())
    assert output.loss is output[0] is output["loss"]
    assert list(output) == ["loss", "logits"]
    assert isinstance(dict(output.items())["logits"], LazyLogits)
    assert output.logits is output.logits


def test_a_loss_made_of_them_has_the_models_own_gradients() -> None:
    def gradients(model: Any) -> tuple[torch.Tensor, ...]:
        output = model(**given())
        loss = output.loss + output.logits.log_softmax(-1).square().mean()
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    model = with_lora(tiny_llama(), target_modules=["q_proj", "lm_head"])
    expected = gradients(model)
    lora_engine.accelerate(model)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        assert error(ours, theirs, floor=1e-6) < 1e-4


def test_a_frozen_head_makes_them_after_the_backward_pass_too() -> None:
    model = accelerated()
    expected = model(**given()).logits
    output = model(**given())
    output.loss.backward()
    assert torch.equal(output.logits, expected)


def test_a_trained_head_does_not_make_them_once_it_may_have_been_written() -> None:
    model = accelerated(target_modules=["lm_head"])
    early, late = model(**given()), model(**given())
    assert early.logits.shape == (2, 9, 97)
    early.loss.backward()
    late.loss.backward()
    assert early.logits.shape == (2, 9, 97)
    with pytest.raises(UserError, match="read them before"):
        late.logits  # noqa: B018


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_converted_with_all_of_the_result_they_are_float32(weights: torch.dtype) -> None:
    """Under mixed precision accelerate hands on every result in float32."""
    from accelerate.utils.operations import convert_to_fp32

    model = with_lora(tiny_llama(dtype=weights))
    lora_engine.accelerate(model)
    exact = model(**given()).logits.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**given())
    logits = convert_to_fp32(output).logits
    assert logits.dtype == torch.float32 and logits.requires_grad
    assert error(logits, exact) < 2e-2


def test_converted_they_cannot_be_made_of_another_head_either() -> None:
    model = accelerated(target_modules=["q_proj", "lm_head"])
    output = model(**given())
    converted = dict(output.items())["logits"].float()
    output.loss.backward()
    with pytest.raises(UserError, match="logits are read after backward"):
        converted.value()


WATCHERS = [lambda logits: logits.retain_grad(), lambda logits: logits.register_hook(torch.neg)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("watch", WATCHERS, ids=["retain_grad", "hook"])
def test_who_waits_for_the_loss_s_gradient_in_them_is_told(watch: Any, dtype: torch.dtype) -> None:
    model = with_lora(tiny_llama(dtype=dtype))
    lora_engine.accelerate(model)
    output = model(**given())
    watch(dict(output.items())["logits"].float().value())
    with pytest.raises(UserError, match="the loss is not computed from the logits"):
        output.loss.backward()


def test_a_loss_made_of_them_reaches_who_watches_them() -> None:
    output = accelerated()(**given())
    logits = output.logits
    logits.retain_grad()
    logits.square().sum().backward()
    assert torch.allclose(logits.grad, 2 * logits)
