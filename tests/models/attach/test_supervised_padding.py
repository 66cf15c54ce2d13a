"""Losses taken of rows of padding are the model's own."""

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.nn import functional

import lora_engine
from lora_engine.testing import tiny_llama, with_lora

IDS = torch.arange(3, 63).view(3, 20)


def mask_of(padding: str) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    places = {"left": slice(None, 5), "right": slice(-6, None), "between": slice(4, 9)}
    mask[1, places[padding]] = 0
    return mask


def loss_and_gradients(model: Any, mask: torch.Tensor, labels: torch.Tensor, **options: Any) -> Any:
    model.zero_grad()
    loss = model(input_ids=IDS, attention_mask=mask, labels=labels, **options).loss
    loss.backward()
    trained = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(trained)


def assert_trains_as_without(plain: Any, mask: torch.Tensor, labels: torch.Tensor) -> None:
    model = copy.deepcopy(plain)
    lora_engine.accelerate(model)
    for training, use_cache in ((True, False), (False, False), (False, True)):
        options = {"use_cache": use_cache}
        ours = loss_and_gradients(model.train(training), mask, labels, **options)
        theirs = loss_and_gradients(plain.train(training), mask, labels, **options)
        assert torch.allclose(ours[0], theirs[0], rtol=1e-5)
        assert (ours[1] - theirs[1]).abs().max() <= 1e-4 * theirs[1].abs().max()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right", "between"])
def test_labels_on_padding(padding: str, attention: str) -> None:
    """`labels=input_ids` is what many scripts write; a first token is told by what is before it."""
    plain = with_lora(tiny_llama())
    plain.set_attn_implementation(attention)
    mask = mask_of(padding)
    assert_trains_as_without(plain, mask, IDS)
    assert_trains_as_without(plain, mask, IDS.masked_fill(mask == 0, -100))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_under_checkpoints_that_run_layers_again(attention: str) -> None:
    plain = with_lora(tiny_llama())
    plain.set_attn_implementation(attention)
    plain.gradient_checkpointing_enable()
    plain.enable_input_require_grads()
    for padding in ("left", "right"):
        assert_trains_as_without(plain, mask_of(padding), IDS)


def test_a_model_whose_loss_is_its_own() -> None:
    plain = with_lora(tiny_llama(), target_modules=["q_proj", "lm_head"], use_dora=True)
    report = lora_engine.accelerate(copy.deepcopy(plain))
    assert "linear_cross_entropy" in {entry.operation for entry in report.left}
    assert_trains_as_without(plain, mask_of("right"), IDS)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_loss_of_somebody_s_may_read_every_row(when: str, padding: str) -> None:
    def all_rows(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        return logits.float().logsumexp(-1).square().mean()

    plain = with_lora(tiny_llama()).train()
    model = copy.deepcopy(plain)
    if when == "after":
        lora_engine.accelerate(model)
    for each in (plain, model):
        each.base_model.model.loss_function = all_rows
    if when == "before":
        lora_engine.accelerate(model)
    mask = mask_of(padding)
    labels = IDS.masked_fill(mask == 0, -100)
    ours, theirs = (loss_and_gradients(each, mask, labels) for each in (model, plain))
    assert torch.allclose(ours[0], theirs[0], rtol=1e-5)
    assert (ours[1] - theirs[1]).abs().max() <= 1e-4 * theirs[1].abs().max()


def test_labels_of_each_token_are_not_shifted() -> None:
    torch.manual_seed(0)
    config = tiny_llama(classifier_dropout=0.0, num_labels=97).config
    plain = transformers.LlamaForTokenClassification(config)
    labels = torch.full_like(IDS, -100)
    labels[:, -1] = 1
    assert_trains_as_without(plain, mask_of("right"), labels)


def test_arguments_by_position() -> None:
    plain = with_lora(tiny_llama())
    model = copy.deepcopy(plain)
    lora_engine.accelerate(model)
    mask = mask_of("right")
    ours, theirs = (each.base_model.model(IDS, mask, labels=IDS).loss for each in (model, plain))
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_virtual_tokens_before_a_left_padded_batch() -> None:
    """Padding lies between the virtual tokens and the text, whose first token it predicts."""
    torch.manual_seed(0)
    tuned = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    plain = peft.get_peft_model(tiny_llama(), tuned)
    mask = mask_of("left")
    assert_trains_as_without(plain, mask, IDS.masked_fill(mask == 0, -100))


def test_other_padding_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(tiny_llama())
    lora_engine.accelerate(model)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", None)
    for padding in ("left", "right"):
        mask = mask_of(padding)
        loss_and_gradients(model, mask, IDS.masked_fill(mask == 0, -100))
    with pytest.raises(TypeError, match="NoneType"):
        loss_and_gradients(model, mask_of("right"), IDS)


def test_padding_between_tokens_is_computed() -> None:
    """As in a batch behind virtual tokens: only rows before and behind all tokens are left out."""
    plain = with_lora(tiny_llama()).eval()
    model = copy.deepcopy(plain)
    lora_engine.accelerate(model)
    given = {"input_ids": IDS, "attention_mask": mask_of("between")}
    with torch.no_grad():
        assert torch.allclose(model(**given).logits, plain(**given).logits, atol=1e-5)


def headed(kind: str) -> Any:
    torch.manual_seed(0)
    config = tiny_llama(num_labels=3, pad_token_id=0).config
    return getattr(transformers, f"LlamaFor{kind}")(config).eval()


def assert_same_with(plain: Any, **batch: Any) -> None:
    model = copy.deepcopy(plain)
    lora_engine.accelerate(model)
    results = []
    for each in (model, plain):
        loss = each(**batch, attention_mask=mask_of("right")).loss
        loss.backward()
        gradients = [p.grad.flatten() for p in each.parameters() if p.grad is not None]
        results.append((loss.detach(), torch.cat(gradients)))
    (ours, our_gradient), (theirs, their_gradient) = results
    assert torch.allclose(ours, theirs, rtol=1e-5)
    assert (our_gradient - their_gradient).abs().max() <= 1e-4 * their_gradient.abs().max()


@pytest.mark.parametrize("given", ["embeddings", "ids"])
def test_a_class_that_is_read_off_a_row_of_padding(given: str) -> None:
    """The last row's, where embeddings are given or padding has another id than the config's."""
    plain = headed("SequenceClassification")
    batch = {"input_ids": IDS}
    if given == "embeddings":
        batch = {"inputs_embeds": plain.get_input_embeddings()(IDS).detach()}
    assert_same_with(plain, **batch, labels=torch.tensor([0, 2, 1]))


def test_answers_are_sought_in_padding_too() -> None:
    begin = torch.tensor([1, 2, 4])
    plain = headed("QuestionAnswering")
    assert_same_with(plain, input_ids=IDS, start_positions=begin, end_positions=begin + 2)


def test_padding_that_no_class_is_read_off_is_not_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, mask = headed("SequenceClassification"), mask_of("right")
    lora_engine.accelerate(model)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", None)
    model(input_ids=IDS.masked_fill(mask == 0, 0), attention_mask=mask, use_cache=False)
    with pytest.raises(TypeError, match="NoneType"):
        model(input_ids=IDS, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("when", ["before", "after"])
def test_labels_on_padding_of_a_model_with_a_forward_of_somebody_s(when: str) -> None:
    plain = with_lora(tiny_llama())
    model = copy.deepcopy(plain)
    inner = model.get_base_model()
    own = inner.forward
    theirs = lambda *args, **kwargs: own(*args, **kwargs)  # noqa: E731
    if when == "after":
        lora_engine.accelerate(model)
    inner.forward = theirs
    if when == "before":
        lora_engine.accelerate(model)
    model.train()
    mask = mask_of("right")
    ours, expected = (loss_and_gradients(each, mask, IDS) for each in (model, plain))
    assert torch.allclose(ours[0], expected[0], rtol=1e-5)
    assert (ours[1] - expected[1]).abs().max() <= 1e-4 * expected[1].abs().max()
    lora_engine.restore(model)
    assert inner.forward is theirs
