import pytest
import torch

import lora_engine
from lora_engine.data.batch import PackedBatch, collate
from lora_engine.data.render import Example
from lora_engine.models.attach.packed import packed_hidden_states
from lora_engine.testing import tiny_llama, with_lora


def packed(lengths: list[int]) -> PackedBatch:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 97, (n,), generator=generator).tolist() for n in lengths]
    return collate([Example(row, [True] * len(row), "made", False) for row in rows])


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
def test_hidden_states_are_those_of_each_sequence_alone(accelerated: bool) -> None:
    model = with_lora(tiny_llama())
    batch = packed([5, 1, 17])
    expected = [
        model.get_base_model().model(input_ids=ids[None]).last_hidden_state[0]
        for ids in batch.input_ids.split([5, 1, 17])
    ]
    if accelerated:
        lora_engine.accelerate(model)
    hidden = packed_hidden_states(model, batch)
    assert torch.allclose(hidden, torch.cat(expected), atol=1e-5)


BATCHES = {
    "positions start again": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])},
    "mask of more tokens": {"attention_mask": torch.ones(1, 12, dtype=torch.int64)},
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_loss_is_the_models_own_where_its_cache_decides_the_mask(name: str) -> None:
    """transformers tells packed sequences apart by positions only where it makes no cache."""
    model = with_lora(tiny_llama()).train()
    ids = torch.arange(3, 12)[None]
    batch = {"input_ids": ids, "labels": ids, **BATCHES[name]}
    expected = [model(**batch).loss, model(**batch, use_cache=True).loss]
    lora_engine.accelerate(model)
    found = [model(**batch).loss, model(**batch, use_cache=True).loss]
    assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-5)


def test_the_mean_of_no_labels_is_not_a_number_and_trains_nothing() -> None:
    model = with_lora(tiny_llama(), target_modules=["q_proj", "lm_head"]).train()
    ids = torch.arange(3, 12)[None]
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    for accelerated in (False, True):
        if accelerated:
            lora_engine.accelerate(model)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        assert loss.isnan()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and not any(gradient.any() for gradient in gradients)
