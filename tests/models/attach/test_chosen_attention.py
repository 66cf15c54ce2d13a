"""An attention that somebody chooses for an accelerated model runs."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
