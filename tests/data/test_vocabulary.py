"""Token ids without an embedding are found before training, with the records they stand in."""

import logging
from dataclasses import replace

import peft
import pytest
from small_tokenizers import make_byte_level
from torch import nn

from lora_engine.data.dataset import TokenizedDataset, prepare
from lora_engine.data.render import Example
from lora_engine.data.vocabulary import check_vocabulary, vocabulary_rows
from lora_engine.errors import UserError
from lora_engine.testing import tiny_llama
from lora_engine.training.config import TrainConfig
from lora_engine.training.trainer import Trainer

ROWS = [{"text": "fine"}, {"text": "a <extra> b"}, {"prompt": "<extra>", "completion": "c"}]


def grown_tokenizer():
    """A tokenizer and its former size: one token was added since."""
    tokenizer = make_byte_level()
    size = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    return tokenizer, size


def model_of(rows: int):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_llama(vocab_size=rows), lora)


@pytest.mark.parametrize("tokenised", [False, True], ids=["records", "tokenised"])
def test_the_trainer_names_every_record_with_a_token_beyond_the_embedding(tmp_path, tokenised):
    tokenizer, size = grown_tokenizer()
    data = replace(prepare(ROWS, tokenizer), name="data") if tokenised else ROWS
    config = TrainConfig(output_dir=tmp_path / "out", max_steps=1, tokens_per_batch=64)
    with pytest.raises(UserError) as caught:
        Trainer(model_of(size), tokenizer, [{"text": "fine"}], data, config)
    assert str(caught.value) == "\n  ".join(
        [
            "data: 2 of 3 records cannot be used, mend or remove them:",
            *(
                f"{origin}: token {size} ('<extra>') is beyond the model's vocabulary of {size} "
                "rows; add rows with model.resize_token_embeddings(len(tokenizer)), or take the "
                "token out of the tokenizer"
                for origin in ("record:1", "record:2")
            ),
        ]
    )
    Trainer(model_of(size + 1), tokenizer, data, None, config)


def test_ids_that_are_none():
    dataset = TokenizedDataset([Example([1, -100], [True, True], "a:1")], name="a")
    with pytest.raises(UserError, match="a:1: token -100 is no token id"):
        check_vocabulary(dataset, tiny_llama(vocab_size=8), None)
    dataset = TokenizedDataset([Example([7, 0], [True, True], "a:1")])
    check_vocabulary(dataset, tiny_llama(vocab_size=8), None)


@pytest.mark.parametrize(("tokens", "marks"), [(0, 0), (2, 3)])
def test_examples_that_are_not_whole(tokens, marks):
    dataset = TokenizedDataset([Example([1] * tokens, [True] * marks, "a:1")])
    with pytest.raises(UserError, match=f"a:1: has {tokens} tokens and {marks} marks"):
        check_vocabulary(dataset, tiny_llama(vocab_size=8), None)


def test_a_head_with_fewer_rows_than_the_embedding_counts():
    model = tiny_llama(vocab_size=12, tie_word_embeddings=False)
    assert vocabulary_rows(model) == 12
    model.lm_head = nn.Linear(model.config.hidden_size, 10, bias=False)
    assert vocabulary_rows(model) == 10


def test_the_trainer_logs_what_it_does_not_read(tmp_path, caplog):
    tokenizer = make_byte_level()
    config = TrainConfig(output_dir=tmp_path / "out", max_steps=1, tokens_per_batch=64)
    rows = [{"text": "a", "score": 2}, {"text": ""}]
    with caplog.at_level(logging.WARNING, logger="lora_engine"):
        Trainer(model_of(len(tokenizer)), tokenizer, rows, [{"text": "b"}], config)
    assert [record.getMessage() for record in caplog.records] == [
        "train_data: 1 of 2 records are learned from\n"
        "  dropped, nothing to learn from: the answer is empty: 1 (record:1)\n"
        "  not read: score (1)"
    ]
