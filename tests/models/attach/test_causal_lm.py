from typing import Any

import pytest
import torch
import transformers

import lora_engine
from lora_engine import UserError
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


def tiny(kind: str) -> Any:
    """One that reshapes its masks, one with embedded positions, one with layers of ours."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": 64}
    if kind == "gpt2":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off))
    if kind == "opt":
        sizes |= {"ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32}
        return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes))
    return tiny_llama()


ONE_ROW = torch.ones(1, 12, dtype=torch.int64)
PADDED = ONE_ROW.clone()
PADDED[:, 9:] = 0
MASKS = {
    "one row": ONE_ROW,
    "one row, padded": PADDED,
    "one line": ONE_ROW[0],
    "one line, padded": PADDED[0],
    "two rows for three": ONE_ROW.repeat(2, 1),
    "a row more": ONE_ROW.repeat(4, 1),
    "longer": torch.ones(3, 15, dtype=torch.int64),
    "shorter": torch.ones(3, 8, dtype=torch.int64),
    "of queries": torch.ones(3, 1, 12, dtype=torch.int64),
    "of pairs": torch.ones(3, 12, 12, dtype=torch.int64),
    "whole": torch.ones(12, 12, dtype=torch.bool).tril()[None, None],
    "numbered below zero": -PADDED.repeat(3, 1),
    "numbers of packed sequences": torch.tensor([[1] * 5 + [2] * 4 + [0] * 3]).repeat(3, 1),
    "fractions": torch.tensor([[1.0] * 5 + [0.5] * 4 + [0.0] * 3]).repeat(3, 1),
}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_shape_do_what_they_do_without(kind: str, name: str) -> None:
    """Loss and gradients with labels on padding too, or an error where there is one without."""
    ids = torch.arange(3, 39).view(3, 12)
    model = with_lora(tiny(kind), target_modules="all-linear").train()
    answers: list[Any] = []
    for accelerated in (False, True):
        if accelerated:
            lora_engine.accelerate(model)
        model.zero_grad()
        try:
            loss = model(input_ids=ids, attention_mask=MASKS[name], labels=ids).loss
        except (ValueError, IndexError, RuntimeError) as error:
            answers.append(str(error))
            continue
        loss.backward()
        trained = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        answers.append(torch.cat([loss.detach()[None], trained]))
    theirs, ours = answers
    if isinstance(theirs, str):
        assert ours == theirs
    else:
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_loss_of_a_model_in_float64_is_float32_s_as_transformers_has_it(when: str) -> None:
    model = with_lora(tiny_llama()).train()
    if when == "after":
        lora_engine.accelerate(model)
    model.double()
    if when == "before":
        lora_engine.accelerate(model)
    ours = model(input_ids=IDS, labels=IDS).loss
    lora_engine.restore(model)
    theirs = model(input_ids=IDS, labels=IDS).loss
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("shape", ["shorter", "of another number of rows", "in one line"])
def test_positions_that_are_not_the_tokens_are_refused(shape: str) -> None:
    model = with_lora(tiny_llama()).train()
    lora_engine.accelerate(model)
    positions = {"shorter": torch.arange(7)[None], "in one line": torch.arange(12)}
    wrong = positions.get(shape, torch.arange(12).repeat(3, 1))
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}
    with pytest.raises(UserError, match="a position for each token"):
        model(**batch, position_ids=wrong)
    assert model(**batch, position_ids=torch.arange(12)[None]).loss.isfinite()
