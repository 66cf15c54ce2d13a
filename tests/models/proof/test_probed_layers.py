"""Of layers that differ in weights alone one is tried for all, each by itself."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import transformers as t

import lora_engine
from lora_engine.models.proof.closeness import excess
from lora_engine.models.proof.probed_layers import ProbedLayers
from lora_engine.testing import tiny_llama, with_lora

IDS = torch.arange(3, 15)[None]


@pytest.mark.parametrize(("last", "runs"), [(False, [0, 3]), (True, [0, 3, 5])])
def test_of_one_kind_the_first_runs_and_the_last_if_asked(last: bool, runs: list[int]) -> None:
    model = tiny_llama(layers=6).eval()
    model.model.layers[3].self_attn.scaling = 0.1
    layers = ProbedLayers(model)
    ran: Counter[int] = Counter()
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.update([i]))
    with torch.no_grad(), layers.recording(last=last):
        model(input_ids=IDS, use_cache=False)
    assert sorted(ran) == runs
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_layer_types_of_the_configuration_are_kinds() -> None:
    config = t.Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
    )
    found = ProbedLayers(t.Qwen2ForCausalLM(config)).layers
    runs = [layer.name.rpartition(".")[2] for layer in found if layer.stands_in is None]
    assert runs == ["0", "2"]


def test_a_wrong_layer_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes before it is as recorded, and so is what comes behind it."""
    model = tiny_llama(layers=3).eval()
    layers = ProbedLayers(model)
    with torch.no_grad():
        with layers.recording(last=True):
            expected = model(input_ids=IDS, use_cache=False).logits
        model.model.layers[2].mlp.down_proj.weight.mul_(1.01)
        with layers.replaying(last=True):
            actual = model(input_ids=IDS, use_cache=False).logits
    assert layers.problem is not None and "model.layers.2 " in layers.problem
    assert torch.equal(actual, expected)


def scaled(function: Any, factor: float) -> Any:
    """The residual branch of a fused half, off by a factor."""

    def wrong(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        y = function(x, *args, **options)
        return x + factor * (y - x)

    return wrong


@pytest.mark.parametrize(("half", "factor"), [("mlp_block", 1.05), ("attention_block", 1.1)])
def test_in_bfloat16_a_branch_that_is_a_little_off_is_found(
    half: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_engine.models.attach import decoder_layer

    torch.manual_seed(0)
    model = with_lora(tiny_llama(hidden_size=64, intermediate_size=96, dtype=torch.bfloat16))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "base_layer" in name:
                p.normal_(0, p.shape[1] ** -0.5)
    assert not lora_engine.accelerate(model).left
    monkeypatch.setattr(decoder_layer, half, scaled(getattr(decoder_layer, half), factor))
    report = lora_engine.accelerate(model)
    assert any("layers.0 differs" in entry.detail for entry in report.left), str(report)


def test_wrong_gradients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_engine.models.attach import decoder_layer

    block = decoder_layer.mlp_block
    plain = with_lora(tiny_llama())
    model = copy.deepcopy(plain)

    def wrong(*args: Any, **options: Any) -> torch.Tensor:
        y = block(*args, **options)
        return y + 0.5 * (y - y.detach())

    monkeypatch.setattr(decoder_layer, "mlp_block", wrong)
    report = lora_engine.accelerate(model)
    assert "another gradient" in str(report) and not report.replaced
    monkeypatch.undo()
    ours, theirs = (m.train()(input_ids=IDS, labels=IDS).loss for m in (model, plain))
    assert torch.equal(ours, theirs)


def test_tokens_at_a_kink_do_not_count_in_half_precision() -> None:
    """A router near a tie takes another expert for a few tokens; a wrong mask is wrong for many."""
    torch.manual_seed(0)
    theirs = torch.randn(2, 20, 8).bfloat16()
    ours = theirs.clone()
    ours[0, :3] = 7.0
    assert excess(ours, theirs, None, torch.bfloat16) <= 1
    ours[0, :10] = 7.0
    assert excess(ours, theirs, None, torch.bfloat16) > 10
    assert excess(ours.float(), theirs.float(), None, torch.float32) > 10


def test_padding_does_not_count() -> None:
    theirs = torch.randn(2, 6, 8)
    mask = torch.ones(2, 6)
    mask[1, :2] = 0
    ours = theirs.clone()
    ours[1, :2] = 0.0
    assert excess(ours, theirs, mask, torch.float32) == 0
    assert excess(ours, theirs, None, torch.float32) > 1
    stacked = (x[None].expand(3, -1, -1, -1) for x in (ours, theirs))
    assert excess(*stacked, mask, torch.float32) == 0
