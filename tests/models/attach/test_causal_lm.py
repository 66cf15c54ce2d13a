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


IDS = torch.arange(3, 27).view(2, 12)
OF_OTHER_SHAPES = {
    "shorter": IDS[:, :7],
    "one row": IDS[:1],
    "two as long": IDS.repeat(1, 2),
    "in one line": IDS.flatten(),
}


@pytest.mark.parametrize("side", ["no padding", "left"])
@pytest.mark.parametrize("name", OF_OTHER_SHAPES)
def test_labels_not_shaped_as_the_tokens_are_the_models_own_affair(name: str, side: str) -> None:
    """transformers raises ValueError, but for labels in one line, whose loss it computes."""
    model = with_lora(tiny_llama()).train()
    mask = torch.ones_like(IDS)
    mask[1, : 4 if side == "left" else 0] = 0
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": OF_OTHER_SHAPES[name]}
    answers = []
    for accelerated in (False, True):
        if accelerated:
            lora_engine.accelerate(model)
        try:
            answers.append(f"{model(**batch).loss.item():.4f}")
        except ValueError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]
    assert ("batch_size" in answers[0]) == (name != "in one line")
