"""TRL's fused head on lora_engine's: what a trainer reads from it, and its gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

import lora_engine
from benchmarks.drop_in.trainer_cases import SETTINGS, make_model
from benchmarks.drop_in.trainer_setups import TRL
from lora_engine.models.attach.trl_head import TrlHeadForward
from lora_engine.testing import error, tiny_llama, with_lora

ALL = ("log_probs", "entropy", "mean_logits", "is_top1")
ORDERS = ["before", "after"]


def batch(padding: str = "right") -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 97, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :4] = mask[2, :7] = 0
    else:
        mask[1, -4:] = mask[2, -7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trl_model(order: str | None, model: Any = None, **head: Any) -> Any:
    """A model with TRL's head, accelerated before or after it came, or not."""
    model = with_lora(tiny_llama()) if model is None else model
    if order == "before":
        lora_engine.accelerate(model)
    add_fused_lm_head(getattr(model, "get_base_model", lambda: model)(), **{"outputs": ALL, **head})
    if order == "after":
        lora_engine.accelerate(model)
    return model.train()


def is_served(model: Any) -> bool:
    inner = getattr(model, "get_base_model", lambda: model)()
    return isinstance(vars(inner).get("forward"), TrlHeadForward)


def results(model: Any, given: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """Everything the head returns, and gradients of its loss and of the entropy."""
    output = model(**given, fused_lm_head=True, use_cache=False, **options)
    named = dict(model.named_parameters())
    parameters = {name: p for name, p in named.items() if p.requires_grad}
    objective = output.loss + 0.3 * output.entropy.sum()
    gradients = torch.autograd.grad(objective, list(parameters.values()))
    return {**output, **dict(zip(parameters, gradients, strict=True))}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype and ours[name].shape == expected.shape, name
        if expected.dtype == torch.bool:
            assert torch.equal(ours[name], expected), name
        else:
            assert error(ours[name], expected, floor=1e-4) < 1e-4, name


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("order", ORDERS)
def test_every_result_and_gradient_is_trl_s(order: str, padding: str) -> None:
    model = trl_model(order)
    assert is_served(model)
    assert_same(results(model, batch(padding)), results(trl_model(None), batch(padding)))


@pytest.mark.parametrize(
    "options",
    [{"num_items_in_batch": torch.tensor(7)}, {"position_ids": torch.arange(12)[None] + 2}],
    ids=["num_items_in_batch", "position_ids"],
)
def test_options_of_a_call(options: dict[str, Any]) -> None:
    expected = results(trl_model(None), batch(), **options)
    assert_same(results(trl_model("after"), batch(), **options), expected)


def test_labels_that_are_shifted_already() -> None:
    given = batch()
    given["shift_labels"] = torch.nn.functional.pad(given.pop("labels")[:, 1:], (0, 1), value=-100)
    assert_same(results(trl_model("after"), given), results(trl_model(None), given))


def test_labels_not_shaped_as_the_tokens_are_trl_s_own_affair() -> None:
    """TRL takes labels in one row for several, and fails in its own words on others."""
    given = batch()
    for labels in (given["labels"][:, :7], given["labels"][:1], given["labels"].flatten()):
        answers = []
        for order in (None, "after"):
            try:
                output = trl_model(order)(**{**given, "labels": labels}, fused_lm_head=True)
                answers.append(f"{output.loss.item():.4f} {list(output.log_probs.shape)}")
            except (ValueError, IndexError, RuntimeError) as error:
                answers.append(str(error))
        assert answers[0] == answers[1]


@pytest.mark.parametrize("order", ORDERS)
def test_temperature(order: str) -> None:
    expected = results(trl_model(None, temperature=0.7), batch())
    assert_same(results(trl_model(order, temperature=0.7), batch()), expected)


def test_a_trained_head_gets_its_gradient() -> None:
    def adapted() -> Any:
        return with_lora(tiny_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])

    expected = results(trl_model(None, adapted()), batch())
    assert any("lm_head" in name for name in expected)
    assert_same(results(trl_model("after", adapted()), batch()), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_lora_on_the_head_counts_and_is_trained(order: str) -> None:
    """TRL's own reads the head's weight past the adapter, for which its trainers refuse it."""

    def adapted() -> Any:
        return with_lora(tiny_llama(), target_modules=["q_proj", "lm_head"])

    given = batch()
    model, plain = trl_model(order, adapted()), adapted()
    targets, mask = given["labels"][:, 1:], given["labels"][:, 1:] != -100
    logits = plain(given["input_ids"], attention_mask=given["attention_mask"]).logits[:, :-1]
    log_probs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected = log_probs.masked_fill(~mask, 0)
    found = model(**given, fused_lm_head=True).log_probs
    assert is_served(model)
    assert error(found, expected) < 1e-5
    assert error(trl_model(None, adapted())(**given, fused_lm_head=True).log_probs, expected) > 1e-3
    pairs = ((model, found), (plain, expected))
    for ours, theirs in zip(*(gradients(m, x) for m, x in pairs), strict=True):
        assert error(ours, theirs) < 1e-4


def gradients(model: Any, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(values.sum(), [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO"])
def test_trainers_refuse_lora_on_the_head_as_without(
    name: str, accelerated: bool, tmp_path: Path
) -> None:
    model = with_lora(make_model("Llama", "ForCausalLM"), target_modules=["q_proj", "lm_head"])
    if accelerated:
        lora_engine.accelerate(model)
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        TRL[name].build(model, tmp_path, **SETTINGS)


def test_a_batch_without_labels_is_a_zero_with_gradients() -> None:
    given = batch()
    given["labels"] = torch.full_like(given["labels"], -100)
    found = results(trl_model("after"), given)
    assert not any(value.any() for value in found.values())


def test_the_reference_pass_is_the_model_without_its_adapter() -> None:
    """As in DPO: between the policy's forward pass and its backward pass."""

    def losses(order: str | None) -> list[torch.Tensor]:
        model = trl_model(order)
        given = {**batch(), "fused_lm_head": True, "use_cache": False}
        policy = model(**given).log_probs
        with torch.no_grad(), model.disable_adapter():
            reference = model(**given).log_probs
        loss = (policy - reference).square().sum()
        return [
            loss,
            *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]),
        ]

    for ours, theirs in zip(losses("after"), losses(None), strict=True):
        assert error(ours, theirs, floor=1e-5) < 1e-3


@pytest.mark.parametrize(
    "head",
    [{"outputs": (*ALL, "log_sum_sq_probs")}, {"cast_lm_head_to_fp32": True}],
    ids=["log_sum_sq_probs", "cast to float32"],
)
def test_what_is_not_served_is_trl_s_own(head: dict[str, Any]) -> None:
    expected = results(trl_model(None, tiny_llama().bfloat16(), **head), batch())
    found = results(trl_model("after", tiny_llama().bfloat16(), **head), batch())
    assert found.keys() == expected.keys()
    for name in ("log_probs", "entropy"):
        assert torch.allclose(found[name], expected[name], atol=0.1)


def test_calls_without_it_are_the_model_s_own() -> None:
    model, plain = trl_model("after"), trl_model(None)
    given = batch()
    mask = given.pop("attention_mask").bool()
    assert torch.allclose(model(**given).logits[mask], plain(**given).logits[mask], atol=1e-5)
    generated = [m.eval().generate(given["input_ids"], max_new_tokens=4) for m in (model, plain)]
    assert torch.equal(*generated)


@pytest.mark.parametrize("order", ORDERS)
def test_a_second_trainers_head_is_served_too(order: str) -> None:
    model = trl_model(order, temperature=0.5)
    add_fused_lm_head(model.get_base_model(), outputs=ALL, temperature=0.7)
    model.train()
    assert is_served(model)
    assert_same(results(model, batch()), results(trl_model(None, temperature=0.7), batch()))


@pytest.mark.parametrize("order", ORDERS)
def test_restored_models_run_trl_s_own(order: str) -> None:
    model = trl_model(order)
    expected = results(trl_model(None), batch())
    lora_engine.restore(model)
    assert not is_served(model)
    assert_same(results(model, batch()), expected)


def test_a_forward_of_somebody_else_runs() -> None:
    model = tiny_llama()
    calls: list[str] = []
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append("theirs")
        return own(*args, **kwargs)

    model.forward = forward
    report = lora_engine.accelerate(model)
    calls.clear()
    model.train()(**batch()).loss.backward()
    assert calls == ["theirs"]
    assert any("someone replaced the model's forward" in entry.detail for entry in report.left)
