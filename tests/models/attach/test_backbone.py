"""Padded batches: the same results for every row of a token, and padding not computed."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from tiny_model import SMALL

import lora_engine
from lora_engine.models.attach import decoder_layer
from lora_engine.models.attach.packed import can_share_prefixes
from lora_engine.testing import error, tiny_llama, with_lora

LENGTH = 14


def windowed_mistral() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=4))


def qwen3() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=8))


MODELS = {"llama": tiny_llama, "mistral_window": windowed_mistral, "qwen3": qwen3}
MASKS = {
    "right": ["11111111111111", "11111000000000", "10000000000000"],
    "left": ["11111111111111", "00000000011111", "00000000000001"],
    "both": ["00111111111100", "00000111000000", "11111111110000"],
    "a row of padding": ["11111111111111", "00000000000000", "11110000000000"],
    "holes": ["11111111111111", "11011110001000", "00101111111100"],
}


def padded(kind: str) -> dict[str, torch.Tensor]:
    mask = torch.tensor([[int(digit) for digit in row] for row in MASKS[kind]])
    ids = torch.randint(1, 97, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids * mask, "attention_mask": mask}


def labels_of_later_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Labels of every token but each row's first, which a row of padding would predict."""
    mask = batch["attention_mask"].bool()
    before = torch.zeros_like(mask)
    before[:, 1:] = mask[:, :-1]
    return batch["input_ids"].masked_fill(~(mask & before), -100)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows that each half of a layer computes."""
    rows: list[int] = []
    block = decoder_layer.mlp_block

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(x.shape[:-1].numel())
        return block(x, *args, **kwargs)

    monkeypatch.setattr(decoder_layer, "mlp_block", counted)
    yield rows


def results(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The loss of labels, its gradients, and the last hidden states of tokens."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(**batch, labels=labels_of_later_tokens(batch), use_cache=False).loss
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        states = model.get_base_model().base_model(**batch, use_cache=False).last_hidden_state
    return [loss, *gradients, states[batch["attention_mask"].bool()]]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", list(MASKS))
@pytest.mark.parametrize("name", list(MODELS))
def test_padded_batches_give_the_models_own_results(
    name: str, kind: str, checkpointing: bool
) -> None:
    model = with_lora(MODELS[name]())
    expected = results(model, padded(kind))
    lora_engine.accelerate(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    for ours, theirs in zip(results(model, padded(kind)), expected, strict=True):
        assert error(ours, theirs, floor=1e-4) < 2e-4


@pytest.mark.parametrize("kind", ["right", "left", "both"])
def test_padding_is_not_computed(computed: list[int], kind: str) -> None:
    model = with_lora(tiny_llama())
    lora_engine.accelerate(model)
    batch = padded(kind)
    computed.clear()
    model(**batch, labels=labels_of_later_tokens(batch)).loss.backward()
    tokens = int(batch["attention_mask"].sum())
    assert computed == [tokens] * 2


def test_rows_of_padding_that_are_read_are_computed(computed: list[int]) -> None:
    """A label of a left-padded row's first token is predicted by a row of padding."""
    model = with_lora(tiny_llama())
    batch = padded("left")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch, labels=labels).loss
    lora_engine.accelerate(model)
    computed.clear()
    assert error(model(**batch, labels=labels).loss, expected) < 1e-6
    assert set(computed) == {batch["input_ids"].numel()}


def test_hidden_states_of_padding_are_zero() -> None:
    model = tiny_llama()
    lora_engine.accelerate(model)
    batch = padded("right")
    states = model.base_model(**batch, use_cache=False).last_hidden_state
    assert states.shape == (3, LENGTH, 32)
    assert not states[batch["attention_mask"] == 0].any()


def test_embeddings_may_be_given() -> None:
    model = tiny_llama()
    batch = padded("right")
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    mask = batch["attention_mask"].bool()
    expected = model.base_model(**given, use_cache=False).last_hidden_state[mask]
    lora_engine.accelerate(model)
    got = model.base_model(**given, use_cache=False).last_hidden_state[mask]
    assert torch.allclose(got, expected, atol=1e-5)


def test_who_watches_a_layer_sees_the_padded_batch() -> None:
    model = with_lora(tiny_llama())
    lora_engine.accelerate(model)
    seen: list[torch.Size] = []
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda module, given, result: seen.append(result.shape))
    batch = padded("right")
    model(**batch, labels=labels_of_later_tokens(batch)).loss.backward()
    assert seen == [torch.Size([3, LENGTH, 32])]


@pytest.mark.parametrize("option", ["output_hidden_states", "use_cache"])
def test_what_else_is_asked_for_has_the_padded_shape(option: str) -> None:
    model = tiny_llama().eval()
    lora_engine.accelerate(model)
    output = model.base_model(**padded("right"), **{"use_cache": False, option: True})
    if option == "use_cache":
        assert output.past_key_values.get_seq_length() == LENGTH
    else:
        assert [states.shape for states in output.hidden_states] == [(3, LENGTH, 32)] * 3


def test_adapters_of_rows_follow_their_tokens() -> None:
    model = with_lora(tiny_llama())
    model.add_adapter("other", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3 if "other" in name else 0.1)
    batch = padded("right")
    model.eval()
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch, adapter_names=["default", "other", "__base__"]).logits[mask]
        model.base_model.set_adapter(["default", "other"])
        lora_engine.accelerate(model)
        rows = torch.tensor([0, 1, -1]).repeat_interleave(LENGTH)
        with lora_engine.route_adapters(model, ["default", "other"], rows):
            got = model(**batch, use_cache=False).logits[mask]
    assert torch.allclose(got, expected, atol=1e-4)


def test_a_hybrid_s_layers_without_attention_keep_batches_padded() -> None:
    model = tiny_llama().eval()
    lora_engine.accelerate(model)
    model.model.layers[1].self_attn = None
    model.model.layers[1].forward = lambda x, **kwargs: x
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    given = {"attention_mask": mask, "use_cache": False}
    assert model(ids, **given).logits.isfinite().all()
    assert not can_share_prefixes(model)


def with_windows(family: str) -> Any:
    """The first layer sees six tokens, the second all, and their masks go by their places."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    given = {**SMALL, "sliding_window": 6, "layer_types": kinds}
    if family == "gemma3":
        config = transformers.Gemma3TextConfig(**given, head_dim=8)
        return transformers.Gemma3ForCausalLM(config)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**given, use_sliding_window=True))


@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
@pytest.mark.parametrize("change", ["swapped", "one twice", "without the first", "wider"])
def test_layers_in_other_places_have_the_masks_of_these_places(change: str, family: str) -> None:
    plain = with_lora(with_windows(family))
    ours = copy.deepcopy(plain)
    lora_engine.accelerate(ours)
    ids = torch.arange(3, 43).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    answers = []
    for model in (plain, ours):
        backbone = model.get_base_model().model
        first, second = backbone.layers
        layers = {"swapped": [second, first], "one twice": [first] * 2}
        layers["without the first"] = [second]
        backbone.layers = torch.nn.ModuleList(layers.get(change, [first, second]))
        backbone.config.num_hidden_layers = len(backbone.layers)
        backbone.config.sliding_window = 9 if change == "wider" else 6
        for given in ({}, {"attention_mask": mask}):
            logits = model.train()(ids, use_cache=False, **given).logits
            answers.append(logits[mask.bool()] if given else logits)
    for theirs, actual in zip(answers[:2], answers[2:], strict=True):
        assert torch.allclose(actual, theirs, atol=1e-5)
