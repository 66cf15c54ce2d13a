import pytest
import torch
import transformers
from tiny_model import SMALL

import lora_engine
from lora_engine.data.batch import collate
from lora_engine.data.render import Example
from lora_engine.evaluation.batch_loss import batch_loss
from lora_engine.models.attach import decoder_layer
from lora_engine.models.attach.packed import can_share_prefixes, packed_hidden_states
from lora_engine.objectives.sft import SFT
from lora_engine.testing import tiny_llama, with_lora


def qwen3_with_window() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **SMALL, head_dim=8, use_sliding_window=True, sliding_window=11, max_window_layers=1
    )
    return transformers.Qwen3ForCausalLM(config)


MODELS = {"llama": tiny_llama, "qwen3_window": qwen3_with_window}


def examples(*, shared: int = 20) -> list[Example]:
    """Six examples that begin with the same tokens, two of them with more, one a copy."""
    generator = torch.Generator().manual_seed(2)

    def draw(count: int) -> list[int]:
        return torch.randint(0, 97, (count,), generator=generator).tolist()

    system, question = draw(shared), draw(10)
    rows = [system + draw(n) for n in (5, 1, 30)]
    rows += [system + question + draw(n) for n in (7, 12)]
    rows += [rows[0]]
    return [Example(row, [i % 3 > 0 for i in range(len(row))], f"made:{len(row)}") for row in rows]


def loss_and_gradients(model: torch.nn.Module, *, share: bool) -> list[torch.Tensor]:
    batch = collate(examples(), share_prefixes=share)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = batch_loss(model, batch, SFT()).total
    return [loss, *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_sharing_prefixes_changes_no_gradient(name: str, checkpointing: bool) -> None:
    model = with_lora(MODELS[name]())
    plain = loss_and_gradients(model, share=False)
    lora_engine.accelerate(model)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert can_share_prefixes(model)
    shared = loss_and_gradients(model, share=True)
    for ours, expected in zip(shared, plain, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_rows_that_are_shared_are_computed_once() -> None:
    model = with_lora(tiny_llama())
    lora_engine.accelerate(model)
    batch = collate(examples(), share_prefixes=True)
    assert batch.num_rows == batch.num_tokens - 5 * 20 - 10
    assert packed_hidden_states(model, batch).shape == (batch.num_rows, 32)


def test_the_last_mlp_runs_on_the_rows_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(tiny_llama())
    batch = collate(examples())
    rows = torch.tensor([3, 40, 3])
    expected = packed_hidden_states(model, batch, rows)
    lora_engine.accelerate(model)
    seen: list[int] = []
    block = decoder_layer.mlp_block
    monkeypatch.setattr(
        decoder_layer,
        "mlp_block",
        lambda x, *a, **k: (seen.append(x.shape[-2]), block(x, *a, **k))[1],
    )
    hidden = packed_hidden_states(model, batch, rows)
    assert seen == [sum(map(len, examples())), 3]
    assert torch.allclose(hidden, expected, atol=1e-5)
    whole = packed_hidden_states(model, batch)
    assert torch.allclose(whole[rows], hidden, atol=1e-6)


def test_labels_of_a_padded_batch_prune_too_but_not_wanted_hidden_states() -> None:
    model = with_lora(tiny_llama())
    ids = torch.randint(0, 97, (2, 9))
    labels = ids.masked_fill(torch.rand(2, 9) < 0.5, -100)
    expected = model(input_ids=ids, labels=labels).loss
    lora_engine.accelerate(model)
    assert torch.allclose(model(input_ids=ids, labels=labels).loss, expected, rtol=1e-5)
    states = model(input_ids=ids, labels=labels, output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(2, 9, 32)] * 3


def test_a_batch_without_any_label_has_pytorchs_loss_and_no_gradient() -> None:
    model = with_lora(tiny_llama())
    lora_engine.accelerate(model)
    ids = torch.randint(0, 97, (2, 9))
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.isnan()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and not any(grad.any() for grad in grads)


def test_what_cannot_share_prefixes_says_so() -> None:
    batch = collate(examples(), share_prefixes=True)
    with pytest.raises(ValueError, match="attention is not lora_engine's"):
        packed_hidden_states(with_lora(tiny_llama()), batch)
    model = with_lora(tiny_llama(), lora_dropout=0.1)
    lora_engine.accelerate(model)
    assert not can_share_prefixes(model)
    assert can_share_prefixes(model, training=False)
    with pytest.raises(ValueError, match="has dropout"):
        packed_hidden_states(model, batch)
    dropping = with_lora(tiny_llama(attention_dropout=0.1))
    lora_engine.accelerate(dropping)
    assert not can_share_prefixes(dropping)
