"""Prompts alone: what is read of a record, what is held out together, what is dropped."""

import pytest

from lora_engine.data.prompts import joined_prompts, prepare_prompts, split_prompts
from lora_engine.data.records import Record, read_records
from lora_engine.errors import UserError
from lora_engine.testing import byte_tokenizer

TOKENIZER = byte_tokenizer()


def ids(text):
    return TOKENIZER(text)["input_ids"]


def test_a_prompt_keeps_its_columns_and_nothing_of_it_is_learned():
    data = prepare_prompts([{"prompt": "1 + 1 =", "answer": "2", "level": 3}], TOKENIZER)
    (example,) = data
    assert example.input_ids == ids("1 + 1 =")
    assert example.num_targets == 0
    assert data.prompts[0].asked == "1 + 1 ="
    assert dict(data.prompts[0].columns) == {"answer": "2", "level": 3}


def test_messages_end_where_the_assistant_begins():
    asked = [{"role": "user", "content": "hello"}]
    data = prepare_prompts([{"prompt": asked}], TOKENIZER)
    assert TOKENIZER.decode(data[0].input_ids) == "<user>hello<end><assistant>"
    assert list(data.prompts[0].asked) == asked


def test_prompts_that_are_too_long_are_dropped_whole():
    rows = [{"prompt": "short"}, {"prompt": "a prompt of more than ten bytes"}]
    data = prepare_prompts(rows, TOKENIZER, max_length=10)
    assert [prompt.asked for prompt in data.prompts] == ["short"]
    assert [dropped.reason for dropped in data.dropped] == ["longer than max_length"]
    assert data.num_records == 2
    with pytest.raises(UserError, match="all 1 prompts are longer than max_length; give"):
        prepare_prompts(rows[1:], TOKENIZER, max_length=10)


def test_records_with_answers_are_listed():
    rows = [{"prompt": "a"}, {"prompt": "b", "completion": "c"}, {"text": "d"}]
    with pytest.raises(UserError, match="2 of 3 records cannot be used") as caught:
        prepare_prompts(rows, TOKENIZER)
    assert "record:1: is read as 'completion', expected 'prompt' and no answer" in str(caught.value)


def test_what_is_held_out_is_of_other_groups():
    data = prepare_prompts("sums", TOKENIZER, max_length=None)
    train, heldout = split_prompts(data, 0.1, seed=1)
    assert len(train) + len(heldout) == len(data) == 400
    assert 30 <= len(heldout) <= 40
    assert not set(train.groups) & set(heldout.groups)
    assert split_prompts(data, 0.1, seed=1)[1].keys == heldout.keys
    assert split_prompts(data, 0.1, seed=2)[1].keys != heldout.keys
    both = joined_prompts([train, heldout], "both")
    assert sorted(both.keys) == sorted(data.keys)
    for example, prompt in zip(heldout, heldout.prompts, strict=True):
        a, b = example.origin.split(" + ")
        assert prompt.columns["answer"] == str(int(a) + int(b))


def test_sums_are_prompts():
    records = read_records("sums")
    assert {record.kind for record in records} == {"prompt"}
    assert isinstance(records[0], Record)
    with pytest.raises(UserError, match="did you mean sums"):
        read_records("sum")
