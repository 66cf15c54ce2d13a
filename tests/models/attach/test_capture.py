"""Calls that ask for hidden states or attentions, and what they leave on the layers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lora_engine
from lora_engine.models.attach import decoder_layer
from lora_engine.testing import tiny_llama, with_lora

IDS = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[1, -4:] = 0
LABELS = IDS.masked_fill(MASK == 0, -100)
ASKED = [{"output_hidden_states": True}, {"output_attentions": True}]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that fused halves of layers are given, as they run."""
    shapes: list[tuple[int, ...]] = []
    for name in ("attention_block", "mlp_block"):
        own = getattr(decoder_layer, name)

        def counting(x: torch.Tensor, *args: Any, _own: Any = own, **kwargs: Any) -> Any:
            shapes.append(tuple(x.shape))
            return _own(x, *args, **kwargs)

        monkeypatch.setattr(decoder_layer, name, counting)
    return shapes


def loss(model: Any, **options: Any) -> Any:
    return model(IDS, attention_mask=MASK, labels=LABELS, use_cache=False, **options).loss


def backward_shapes(model: Any, fused: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    fused.clear()
    loss(model).backward()
    return list(fused)


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_calls_after_one_that_asked_are_fused_and_packed(
    asked: dict[str, bool], when: str, fused: list[tuple[int, ...]]
) -> None:
    """Whether the one that asked came before `accelerate` or after."""
    model = with_lora(tiny_llama())
    if when == "before":
        loss(model, **asked)
    lora_engine.accelerate(model)
    if when == "after":
        loss(model, **asked)
    tokens = int(MASK.sum())
    assert backward_shapes(model, fused) == [(1, tokens, 32)] * 4  # two halves of two layers


def test_a_hook_of_somebody_else_still_counts(fused: list[tuple[int, ...]]) -> None:
    model = with_lora(tiny_llama())
    lora_engine.accelerate(model)
    loss(model, output_hidden_states=True)
    seen: list[torch.Size] = []
    attention = model.get_base_model().model.layers[0].self_attn
    attention.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    assert backward_shapes(model, fused) == [(3, 9, 32)] * len(fused)
    assert seen == [(*IDS.shape, 32)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("asked", [{}, *ASKED, ASKED[0] | ASKED[1]], ids=str)
def test_checkpointed_layers_run_again_as_they_ran(asked: dict[str, bool], reentrant: bool) -> None:
    def results(accelerated: bool) -> Iterator[torch.Tensor]:
        model = with_lora(tiny_llama())
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        if accelerated:
            lora_engine.accelerate(model)
        for _ in range(2):  # the first puts the hooks there
            found = model(IDS, labels=IDS, use_cache=False, **asked).loss
            found.backward()
        yield found.detach()
        yield from (p.grad for p in model.parameters() if p.requires_grad)

    for ours, theirs in zip(results(True), results(False), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))
