"""Rows that compare answers, judge one or hold none, as records."""

import pytest

from lora_engine.data.records import Record, parse_record, read_records, split_heldout
from lora_engine.errors import UserError

USER = {"role": "user", "content": "What is 2 + 2?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("4", "5"))
SYSTEM = {"role": "system", "content": "Be brief."}


def parse(**row):
    return parse_record(row, "a.jsonl:1")


def parts(record):
    return record.prompt, record.chosen, record.rejected


def test_a_preference_of_texts():
    record = parse(prompt="Q: ", chosen="a", rejected="b", source="web", margin=2)
    assert record.kind == "preference"
    assert parts(record) == ("Q: ", "a", "b")
    assert record.columns == {"margin": 2.0}
    assert record.ignored == ("source",)


CHATS = {
    "three lists": {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
    "an implicit prompt": {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
    "the prompt repeated": {
        "prompt": [SYSTEM, USER],
        "chosen": [SYSTEM, USER, GOOD],
        "rejected": [SYSTEM, USER, BAD],
    },
    "its last text beside": {
        "prompt": USER["content"],
        "chosen": [SYSTEM, USER, GOOD],
        "rejected": [SYSTEM, USER, BAD],
    },
    "answers as texts": {"prompt": [SYSTEM, USER], "chosen": "4", "rejected": "5"},
}


@pytest.mark.parametrize("form", list(CHATS))
def test_a_preference_of_messages(form):
    record = parse(**CHATS[form])
    assert record.kind == "preference"
    assert parts(record) == ((SYSTEM, USER), (GOOD,), (BAD,))


def test_a_text_asked_and_messages_answered():
    record = parse(prompt=USER["content"], chosen=[GOOD], rejected=[BAD])
    assert parts(record) == ((USER,), (GOOD,), (BAD,))


def test_turns_after_the_first_that_differs_belong_to_the_answers():
    more = {"role": "user", "content": "Sure?"}
    record = parse(chosen=[USER, GOOD, more, GOOD], rejected=[USER, GOOD, more, BAD])
    assert parts(record) == ((USER, GOOD, more), (GOOD,), (BAD,))
    same = parse(chosen=[USER, GOOD], rejected=[USER, GOOD])
    assert parts(same) == ((USER,), (GOOD,), (GOOD,))


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Q: sky? A: blue", "Q: sky? A: blurry", ("Q: sky? A:", " blue", " blurry")),
        ("Q\n\nA yes", "Q\n\nB no", ("Q\n\n", "A yes", "B no")),
        ("Say  yes", "Say  no", ("Say", "  yes", "  no")),
        ("Say yes", "Say yes", ("Say", " yes", " yes")),
    ],
)
def test_the_implicit_prompt_of_texts_ends_between_words(chosen, rejected, expected):
    assert parts(parse(chosen=chosen, rejected=rejected)) == expected


def test_an_unpaired_record():
    record = parse(prompt="Q", completion="A", label=True)
    assert (record.kind, record.prompt, record.completion, record.label) == (
        *("unpaired", "Q", "A"),
        True,
    )
    assert record.has_answer() and not record.ignored
    chat = parse(prompt=[USER], completion=[BAD], label=False)
    assert (chat.prompt, chat.completion, chat.label) == ((USER,), (BAD,), False)


def test_a_prompt_keeps_every_column():
    record = parse(prompt=[USER], answer=4, tests=["a"], adapter="x")
    assert (record.kind, record.prompt, record.adapter) == ("prompt", (USER,), "x")
    assert record.columns == {"answer": 4, "tests": ["a"]}
    assert not record.has_answer() and not record.ignored


BAD_ROWS = {
    "no rejected": ({"chosen": "a"}, "has 'chosen', but no 'rejected' to compare it with"),
    "nothing in common": ({"chosen": "a", "rejected": "b"}, "no words in common; give 'prompt'"),
    "no message in common": ({"chosen": [GOOD], "rejected": [BAD]}, "no message in common"),
    "a number": ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' must be a string or a"),
    "a bad message": (
        {"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": "b"},
        "'chosen', message 1: 'content' must be a string, got nothing",
    ),
    "the user's last word": (
        {"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]},
        "'chosen' must end with a message of the assistant",
    ),
    "another prompt": (
        {"prompt": "3 + 3?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "the messages before the answers are not those of 'prompt'",
    ),
    "margin": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "large"},
        "'margin' must be a number, got a string",
    ),
    "half a character": ({"prompt": "a", "chosen": "b", "rejected": "\ud83d"}, "lone surrogate"),
}


@pytest.mark.parametrize("name", list(BAD_ROWS))
def test_a_mistake_is_one_line_with_its_place(name):
    row, message = BAD_ROWS[name]
    with pytest.raises(UserError) as caught:
        parse(**row)
    assert str(caught.value).startswith("a.jsonl:1: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_records_of_one_prompt_stay_on_one_side():
    rows = [
        {"prompt": f"Q{i // 3}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)
    ]
    train, heldout = split_heldout(read_records(rows), 0.2)
    assert len(heldout) == 12
    assert {r.prompt for r in train}.isdisjoint(r.prompt for r in heldout)


def test_contents_that_differ_in_a_new_field_differ():
    first, second = (Record("unpaired", prompt="a", completion="b", label=x) for x in (True, False))
    assert first.content_key() != second.content_key()
    assert not Record("preference", prompt="a", chosen="b", rejected=" ").has_answer()
