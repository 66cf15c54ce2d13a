"""An attention that somebody chooses for an accelerated model runs."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_model import SMALL
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama import modeling_llama

import lora_engine
from lora_engine.models.attach.packed import can_share_prefixes
from lora_engine.testing import tiny_llama, with_lora

IDS = torch.arange(3, 43).view(2, 20)
MASK = torch.ones_like(IDS)
MASK[1, -6:] = 0
OWN = "halved"  # values count half


@pytest.fixture(autouse=True)
def rows() -> Iterator[set[int]]:
    """Registers OWN; the numbers of rows of the batches that it was given."""
    rows = set()

    def halved(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.add(len(q))
        return sdpa_attention_forward(module, q, k, v / 2, *args, **kwargs)

    AttentionInterface.register(OWN, halved)
    AttentionMaskInterface.register(OWN, sdpa_mask)
    yield rows
    del AttentionInterface._global_mapping[OWN], AttentionMaskInterface._global_mapping[OWN]


def choose(model: Any, name: str) -> None:
    inner: PreTrainedModel = model.get_base_model()
    inner.set_attn_implementation(name)


def results(model: Any) -> Tensor:
    """Loss and gradients of a padded batch, and what is generated."""
    model.train().zero_grad()
    labels = IDS.masked_fill(MASK == 0, -100)
    loss = model(input_ids=IDS, attention_mask=MASK, labels=labels, use_cache=False).loss
    loss.backward()
    trained = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    new = model.eval().generate(input_ids=IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return torch.cat([loss.detach()[None], *trained, new.flatten().float()])


@pytest.mark.parametrize("name", ["eager", OWN])
def test_it_runs_and_stays(name: str) -> None:
    plain = with_lora(tiny_llama(initializer_range=0.2))
    model = copy.deepcopy(plain)
    lora_engine.accelerate(model)
    before = results(model)
    choose(model, name)
    choose(plain, name)
    expected = results(plain)
    assert torch.allclose(results(model), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(before, expected, rtol=1e-4, atol=1e-5) == (name == "eager")
    output = model(IDS, output_attentions=name == "eager")
    assert (output.attentions is not None) == (name == "eager")
    lora_engine.restore(model)
    assert model.config._attn_implementation == name
    assert torch.allclose(results(model), expected, rtol=1e-4, atol=1e-5)


def test_batches_are_neither_packed_nor_do_sequences_share_prefixes(rows: set[int]) -> None:
    model = with_lora(tiny_llama())
    lora_engine.accelerate(model)
    assert can_share_prefixes(model)
    choose(model, OWN)
    assert not can_share_prefixes(model)
    results(model)
    assert rows == {len(IDS)}
    choose(model, "lora_engine")
    assert can_share_prefixes(model)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_layer_that_is_told_to_see_later_tokens_does(
    when: str, window: int | None, mask: Tensor | None
) -> None:
    """As whoever makes an encoder of a decoder tells it. transformers' masks hide them all the
    same where there is padding, or a window that is shorter than the rows."""
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, sliding_window=window)
    plain = with_lora(MistralForCausalLM(config), init_lora_weights=False).train()
    ours = copy.deepcopy(plain)
    seen = ours(IDS, attention_mask=mask).logits
    if when == "after":
        lora_engine.accelerate(ours)
    for model in (plain, ours):
        for layer in model.get_base_model().model.layers:
            layer.self_attn.is_causal = False
    if when == "before":
        lora_engine.accelerate(ours)
    rows = torch.ones_like(IDS) if mask is None else mask
    labels = IDS.masked_fill(rows == 0, -100)
    found, expected = (m(IDS, attention_mask=mask, labels=labels) for m in (ours, plain))
    assert torch.allclose(found.loss, expected.loss, atol=1e-5)
    logits = [each.logits[rows.bool()] for each in (found, expected)]
    assert torch.allclose(*logits, atol=1e-5)
    later = torch.allclose(expected.logits[rows.bool()], seen[rows.bool()], atol=1e-3)
    assert later == (mask is not None or window is not None)
    for result in (found, expected):
        result.loss.backward()
    gradients = [[p.grad for p in m.parameters() if p.requires_grad] for m in (ours, plain)]
    for ours_of_it, plain_of_it in zip(*gradients, strict=True):
        assert torch.allclose(ours_of_it, plain_of_it, atol=1e-5)


def test_layers_whose_own_attention_asks_their_mask_alone() -> None:
    """Eager attention is causal by the mask that it is always given, and asks no `is_causal`."""
    plain = with_lora(tiny_llama(initializer_range=0.2), init_lora_weights=False)
    choose(plain, "eager")
    for layer in plain.get_base_model().model.layers:
        layer.self_attn.is_causal = False
    ours = copy.deepcopy(plain)
    report = lora_engine.accelerate(ours)
    assert any(each.operation == "attention" for each in report.left)
    assert torch.allclose(ours(IDS).logits, plain(IDS).logits, atol=1e-5)


def test_a_rotation_that_somebody_puts_into_transformers_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = with_lora(tiny_llama(initializer_range=0.2), init_lora_weights=False).train()
    ours = copy.deepcopy(plain)
    lora_engine.accelerate(ours)
    before = ours(IDS, labels=IDS).loss
    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, *a, **b: own(3 * q, k, *a, **b)
    )
    for mask in (None, MASK):
        labels = IDS if mask is None else IDS.masked_fill(mask == 0, -100)
        found, expected = (m(IDS, attention_mask=mask, labels=labels).loss for m in (ours, plain))
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found, before, atol=1e-3)
    monkeypatch.undo()
    assert torch.allclose(ours(IDS, labels=IDS).loss, before, atol=1e-6)
