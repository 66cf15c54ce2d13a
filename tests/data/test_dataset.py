import chat_templates as templates
import pytest
from small_tokenizers import make_byte_level

from lora_engine.data.dataset import Dropped, prepare
from lora_engine.data.leakage import Duplicate, find_leakage
from lora_engine.data.recipe import NO_ANSWER, NO_ASSISTANT, NOT_LEARNED, TOO_LONG
from lora_engine.data.render import Example
from lora_engine.errors import UserError


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def test_counts_and_lengths(tokenizer):
    dataset = prepare([pair("a", "b"), {"text": "Hello there"}], tokenizer)
    assert len(dataset) == dataset.num_records == 2
    assert dataset.kinds == (("completion", 1), ("text", 1))
    assert dataset.lengths.tolist() == [len(dataset[0]), len(dataset[1])]
    assert dataset.num_tokens == sum(len(example) for example in dataset)
    # the first token of a plain text has nothing before it that could predict it
    assert dataset.num_targets == 2 + len(dataset[1]) - 1
    assert prepare(dataset, tokenizer) is dataset


def test_every_dropped_record_has_a_reason(tokenizer):
    long = "a b c d e f g h"
    dataset = prepare(
        [
            pair("a", "b"),
            pair("a", "  "),
            pair(long, "b"),
            {"messages": [{"role": "user", "content": "a"}]},
            pair("a", long),
            {"messages": [{"role": "system", "content": "a"}]},
            {"messages": [{"role": "assistant", "content": " "}]},
        ],
        tokenizer,
        max_length=8,
    )
    assert dataset.dropped == (
        Dropped("record:1", NO_ANSWER),
        Dropped("record:3", NO_ASSISTANT),
        Dropped("record:5", NO_ASSISTANT),
        Dropped("record:6", NO_ANSWER),
    )
    assert dataset.truncated == ("record:2", "record:4")
    assert [example.origin for example in dataset] == ["record:0", "record:2", "record:4"]
    assert dataset.num_records == 7


def test_a_template_that_leaves_the_answer_out():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    asks_only = "{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}"
    tokenizer = make_byte_level(asks_only)
    records = [{"messages": messages}, pair("a", "b")]
    with pytest.raises(UserError, match="record:0: the chat template does not write the text of"):
        prepare(records, tokenizer)
    (dropped,) = prepare(records, tokenizer, on_undecidable="drop").dropped
    assert dropped.origin == "record:0"
    assert dropped.reason.startswith("the chat template does not write the text of message 2")


def test_an_answer_of_which_nothing_is_to_be_learned(tokenizer):
    asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"messages": [asked, {**answer, "weight": weight}]} for weight in (0, 1)]
    dataset = prepare(rows, tokenizer)
    assert dataset.dropped == (Dropped("record:0", NOT_LEARNED),)
    assert [example.origin for example in dataset] == ["record:1"]


def test_too_long_examples_can_be_dropped_instead_of_cut(tokenizer):
    records = [pair("a", "b"), pair("a", "a b c d e f g h")]
    dataset = prepare(records, tokenizer, max_length=8, on_too_long="drop")
    assert dataset.dropped == (Dropped("record:1", TOO_LONG),)
    assert dataset.truncated == ()


def test_no_limit_cuts_nothing(tokenizer):
    dataset = prepare([{"text": "word " * 3000}], tokenizer, max_length=None)
    assert len(dataset[0]) > 3000 and not dataset.truncated


def test_duplicates_are_counted_and_kept(tokenizer):
    dataset = prepare([pair("a", "b"), pair("a", "c"), pair("a", "b"), pair("a", "b")], tokenizer)
    assert len(dataset) == 4
    assert dataset.duplicates == (
        Duplicate("record:2", "record:0"),
        Duplicate("record:3", "record:0"),
    )


def test_the_same_tokens_with_another_mask_are_no_duplicate(tokenizer):
    dataset = prepare([pair("a", "b"), {"text": "ab"}], tokenizer)
    assert dataset[0].input_ids == dataset[1].input_ids
    assert dataset.duplicates == ()


def test_what_another_adapter_learns_from_is_no_duplicate_and_gives_nothing_away(tokenizer):
    rows = [{**pair("a", "b"), "adapter": name} for name in ("one", "two", "one")]
    dataset = prepare(rows, tokenizer)
    assert [example.adapter for example in dataset] == ["one", "two", "one"]
    assert dataset.duplicates == (Duplicate("record:2", "record:0"),)
    leakage = find_leakage(dataset[:1], dataset[1:])
    assert leakage.examples == (("record:2", "record:0"),)
    assert leakage.prompts == ()


def test_limit_takes_the_first_records(tokenizer):
    dataset = prepare([pair("a", str(i)) for i in range(9)], tokenizer, limit=4)
    assert [example.origin for example in dataset] == [f"record:{i}" for i in range(4)]


def test_leakage_tells_whole_examples_from_prompts(tokenizer):
    train = prepare([pair("a", "b"), pair("Hello", "b"), {"text": "Hello"}], tokenizer)
    evaluation = prepare(
        [pair("x", "b"), pair("a", "b"), pair("Hello", "c"), {"text": "there"}], tokenizer
    )
    leakage = find_leakage(train, evaluation)
    assert leakage.examples == (("record:1", "record:0"),)
    assert leakage.prompts == (("record:2", "record:1"),)


def test_leakage_of_nothing():
    assert find_leakage([Example([1, 2], [False, True], "a")], []).examples == ()


def test_nothing_left_says_why(tokenizer):
    with pytest.raises(
        UserError, match="no example is left to learn from, give other data: 2 times nothing"
    ):
        prepare([pair("a", ""), pair("b", "")], tokenizer)


def test_max_length_must_leave_a_token_to_predict(tokenizer):
    with pytest.raises(UserError, match="max_length must be at least 2"):
        prepare([pair("a", "b")], tokenizer, max_length=1)


def test_all_records_that_cannot_be_rendered_are_listed():
    tokenizer = make_byte_level(templates.LLAMA2, "</s>")
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "system", "content": "a"}, *good["messages"]]}
    with pytest.raises(UserError) as caught:
        prepare([good, bad, good, bad], tokenizer)
    first, *rest = str(caught.value).splitlines()
    assert first == "data: 2 of 4 records cannot be used, mend or remove them:"
    assert [line.split(": ")[0].strip() for line in rest] == ["record:1", "record:3"]
