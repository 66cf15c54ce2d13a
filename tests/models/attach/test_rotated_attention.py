"""Models whose attention has no kernel, as on a GPU: products and rotation are ours."""

from typing import Any

import pytest
import torch
import transformers
from tiny_model import SMALL

import lora_engine
from lora_engine import backends, ops
from lora_engine.models.attach import decoder_layer
from lora_engine.testing import error, with_lora

pytestmark = pytest.mark.skipif(
    not backends.extension_available(), reason="the C++ kernels cannot run here"
)

MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True),
    "mistral_window": lambda: transformers.MistralConfig(**SMALL, sliding_window=5),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
}


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No attention kernels; the tokens of each rotation by ours."""
    explain, runs_fused, rope = backends.explain, decoder_layer.runs_fused, ops.rope
    tokens: list[int] = []

    def without_attention(operation: str, *args: Any, **kwargs: Any) -> Any:
        forced = {"impl": "reference"} if operation == "attention" else {}
        return explain(operation, *args, **kwargs, **forced)

    def counted(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens.append(q.shape[0])
        return rope(q, *args, **kwargs)

    monkeypatch.setattr(backends, "explain", without_attention)
    monkeypatch.setattr(
        decoder_layer, "runs_fused", lambda name, *on: "mlp" in name and runs_fused(name, *on)
    )
    monkeypatch.setattr(ops, "rope", counted)
    return tokens


def model_of(name: str, attention: str) -> Any:
    torch.manual_seed(0)
    config = MODELS[name]()
    config._attn_implementation = attention
    return with_lora(transformers.AutoModelForCausalLM.from_config(config), r=4)


def results(model: Any) -> dict[str, torch.Tensor]:
    """The loss and all gradients of a padded batch."""
    ids = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()))
    return {"loss": loss.detach(), **dict(zip(named, grads, strict=True))}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients(rotations: list[int], name: str, attention: str) -> None:
    theirs, model = results(model_of(name, attention)), model_of(name, attention)
    report = lora_engine.accelerate(model)
    assert [entry.operation for entry in report.left] == ["attention"]
    assert [e.detail for e in report.entries if e.operation == "rope"] == [
        backends.explain("rope").reason
    ] * 2
    rotations.clear()  # of the tries
    ours = results(model)
    assert rotations == [36, 36]
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for key, expected in theirs.items():
        assert error(ours[key], expected) < 1e-4, key


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache(rotations: list[int], name: str) -> None:
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(2))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model = model_of(name, "sdpa").eval()
    theirs = model.generate(**given, **options)
    lora_engine.accelerate(model)
    rotations.clear()
    assert torch.equal(model.generate(**given, **options), theirs)
    assert rotations == [18, 18] + [2, 2] * 5


def test_without_a_kernel_for_rotation_the_layer_stays_as_it_is(
    rotations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    explain = backends.explain
    monkeypatch.setattr(
        backends,
        "explain",
        lambda operation, *on, **kw: explain(
            operation, *on, **kw, **({"impl": "reference"} if operation == "rope" else {})
        ),
    )
    model = model_of("llama", "sdpa")
    report = lora_engine.accelerate(model)
    assert not any(entry.operation == "rope" for entry in report.entries)
    results(model)
    assert not rotations
