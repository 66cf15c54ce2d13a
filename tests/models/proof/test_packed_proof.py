"""Training refuses models of which packed batches and the head do not give the loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t

import lora_engine
from lora_engine.errors import UserError
from lora_engine.models.proof import packed_proof
from lora_engine.models.proof.packed_proof import check_packed_training
from lora_engine.testing import tiny_llama, with_lora

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4}
SIZES |= {"num_hidden_layers": 2, "intermediate_size": 48}


def modernbert_decoder() -> Any:
    config = t.ModernBertDecoderConfig(**SIZES, local_attention=16, pad_token_id=0)
    return t.ModernBertDecoderForCausalLM(config)


def bart() -> Any:
    """Learned positions that its masks do not know of."""
    sizes = {"vocab_size": 97, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
    return t.BartForCausalLM(t.BartConfig(**sizes, decoder_ffn_dim=48))


def gemma2() -> Any:
    """Soft-capped logits, which the loss knows."""
    sizes = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
    return t.Gemma2ForCausalLM(t.Gemma2Config(**sizes, final_logit_softcapping=2.0))


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, gemma2])
def test_models_whose_loss_is_their_heads_are_trained(
    make: Callable[[], Any], accelerated: bool
) -> None:
    torch.manual_seed(0)
    model = with_lora(make())
    if accelerated:
        lora_engine.accelerate(model)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_packed_training(model.train())
    assert model.training
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("make", [modernbert_decoder, bart])
def test_others_are_refused(make: Callable[[], Any], accelerated: bool) -> None:
    torch.manual_seed(0)
    model = with_lora(make())
    if accelerated:
        lora_engine.accelerate(model)
    with pytest.raises(UserError, match="transformers' Trainer"):
        check_packed_training(model)


def test_sequences_that_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    hidden = packed_proof.packed_hidden_states

    def as_one(model: Any, batch: Any) -> torch.Tensor:
        positions = torch.arange(len(batch.input_ids))
        bounds = torch.tensor([0, len(positions)], dtype=torch.int32)
        return hidden(model, batch._replace(position_ids=positions, cu_seqlens=bounds))

    monkeypatch.setattr(packed_proof, "packed_hidden_states", as_one)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, 0.3)
    with pytest.raises(UserError, match="packed sequences"):
        check_packed_training(model)
