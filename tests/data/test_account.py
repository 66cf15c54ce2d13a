"""What happened to records is told, each thing once."""

import json

import chat_templates as templates
import pytest
from small_tokenizers import make_byte_level

from lora_engine.data.account import account, finding_lines, lines
from lora_engine.data.dataset import prepare
from lora_engine.data.listing import group, raise_listed
from lora_engine.data.records import read_records
from lora_engine.errors import UserError


def pair(prompt: str, completion: str, **more) -> dict:
    return {"prompt": prompt, "completion": completion, **more}


def chat(**keys) -> dict:
    """A chat whose answer has further keys."""
    answer = {"role": "assistant", "content": "b", **keys}
    return {"messages": [{"role": "user", "content": "a"}, answer]}


def test_many_of_the_same_are_one_line_with_a_count_and_three_places():
    with pytest.raises(UserError) as caught:
        raise_listed("a.jsonl", [(f"a.jsonl:{i}", "is wrong") for i in range(1, 387)], 400)
    assert str(caught.value) == (
        "a.jsonl: 386 of 400 records cannot be used, mend or remove them: "
        "a.jsonl:1, a.jsonl:2, a.jsonl:3 and 383 more: is wrong"
    )


def test_a_few_of_the_same_and_others_stand_in_their_order():
    problems = [("a:1", "x"), ("a:2", "y"), *((f"a:{i}", "z") for i in range(3, 9)), ("a:9", "x")]
    with pytest.raises(UserError) as caught:
        raise_listed("a", problems, 9)
    assert str(caught.value).splitlines()[1:] == [
        "  a:1: x",
        "  a:2: y",
        "  a:3, a:4, a:5 and 3 more: z",
        "  a:9: x",
    ]
    raise_listed("a", [], 9)


def test_problems_that_all_differ_are_cut_short():
    with pytest.raises(UserError) as caught:
        raise_listed("a", [(f"a:{i}", f"has {i}") for i in range(386)], 386)
    assert len(str(caught.value).splitlines()) == 22
    assert str(caught.value).endswith("\n  and 366 other problems")


def test_findings_of_one_kind_are_grouped():
    found = group([("a:1", "x"), ("a:2", "y"), ("a:3", "x"), ("a:4", "x"), ("a:5", "x")])
    assert [(f.text, f.count, f.places()) for f in found] == [
        ("x", 4, "a:1, a:3, a:4 and 1 more"),
        ("y", 1, "a:2"),
    ]


def test_fields_that_nothing_reads_are_counted_unless_they_are_empty(tokenizer):
    rows = [
        {"text": "a", "score": 0.5, "id": 1, "tags": []},
        {"text": "b", "score": 0, "source": "", "adapter": "one", "tools": None},
        {"text": "c", "label": False, "prompt": ""},
        {"text": "d e", "prompt": "d"},
        {"prompt": "a", "completion": "", "score": 1},
    ]
    assert dict(prepare(rows, tokenizer).ignored) == {
        "score": 3,
        "id": 1,
        "label": 1,
        "prompt": 1,
    }


def test_names_of_fields_can_be_shown_and_written(tokenizer):
    row = {"text": "a", "\ud83d": 1, "": 1, "a\nb": 1, "é": 1, "long" * 99: 1}
    about = account(prepare([row], tokenizer))
    json.dumps(about, ensure_ascii=False).encode()
    assert list(about["ignored"]) == [r"'\ud83d'", "''", r"'a\nb'", "é", f"'{'long' * 15}'"]
    many = account(prepare([{"text": "a", **{f"field {i}": i for i in range(99)}}], tokenizer))
    assert finding_lines(many)[0].endswith("field 19 (1) and 79 other fields")


def test_what_records_in_memory_ignore_is_kept(tokenizer):
    records = read_records([{"text": "a", "score": 1}])
    assert prepare(records, tokenizer).ignored == (("score", 1),)


@pytest.mark.parametrize(
    ("template", "unread"),
    [
        (templates.CHATML_DEFAULT_SYSTEM, {"messages.tool_calls": 1, "messages.name": 2}),
        (templates.CHATML_TOOLS, {"messages.name": 2}),
        ("{% for m in messages %}{{ m | tojson }}\n{% endfor %}", {}),
    ],
    ids=["reads-text", "reads-tool-calls", "reads-all"],
)
def test_keys_of_messages_that_the_template_leaves_out_are_counted(template, unread):
    rows = [chat(name="n", tool_calls=[{"name": "f"}]), chat(), chat(name="n")]
    dataset = prepare(rows, make_byte_level(template), loss_on="all")
    assert dict(dataset.ignored) == unread


def test_the_account_says_what_became_of_the_records(tokenizer):
    rows = [
        *(pair("a", "", score=1) for _ in range(5)),
        pair("a", "b" * 30),
        pair("c", "d"),
        pair("c", "d"),
        pair("<|im_end|>", "e"),
    ]
    about = account(prepare(rows, tokenizer, max_length=12))
    assert (about["name"], about["records"], about["examples"]) == ("data", 9, 4)
    assert about["ignored"] == {"score": 5}
    expected = [
        "dropped, nothing to learn from: the answer is empty: 5 "
        "(record:0, record:1, record:2 and 2 more)",
        "truncated to max_length: 1 (record:5)",
        "repeats an earlier example (kept): 1 (record:7)",
        "'<|im_end|>' in its text encoded as plain text, not as control tokens; "
        "a conversation rendered already belongs in 'messages' or 'text': 1 (record:8)",
        "not read: score (5)",
    ]
    assert finding_lines(about) == expected
    assert lines([about]) == [
        "data: 4 of 9 records are learned from",
        *(f"  {line}" for line in expected),
    ]


def test_where_nothing_happened_nothing_is_said(tokenizer):
    assert lines([account(prepare([pair("a", "b"), {"text": "c"}], tokenizer))]) == []


def test_records_are_not_taken_for_the_examples_that_they_become(tokenizer):
    rows = [{"text": "many words " * 20}, {"text": ""}, {"text": "a b"}]
    about = account(prepare(rows, tokenizer, max_length=12))
    assert about["examples"] > 3
    said = lines([about])[0]
    assert said == f"data: 2 of 3 records are learned from, as {about['examples']} examples"
