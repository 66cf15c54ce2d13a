"""Every format: a record in, its tokens and what of them is learned out; and which format it is."""

import json
import re
from itertools import groupby
from typing import get_args

import pytest

from lora_engine.data.dataset import prepare
from lora_engine.data.formats.columns import Layout
from lora_engine.data.formats.recognise import FORMATS, FormatName, recognise
from lora_engine.data.records import read_records
from lora_engine.errors import UserError


def chatml(*turns: str) -> str:
    """'user: Hi' as the tests' template writes it."""
    said = [turn.partition(": ") for turn in turns]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, _, text in said)


SYSTEM = "system: Be brief."
ASKED = chatml(SYSTEM, "user: Hi")
DEFAULT = chatml("system: You are a helpful AI assistant.", "user: Hi")
ANSWER = "Yes<|im_end|>"
END = "<|im_end|>"
SHARED = {"system": "Be brief."}

# name of the format, record, its whole text, the stretches of it that are learned
GOLDEN = {
    "messages": (
        "messages",
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]},
        DEFAULT,
        [ANSWER],
    ),
    "messages with a system field": (
        "messages",
        {"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Yes"}]}
        | SHARED,
        ASKED,
        [ANSWER],
    ),
    "parts of text": (
        "messages",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}],
                },
                {"role": "assistant", "content": "Yes"},
            ]
        }
        | SHARED,
        ASKED,
        [ANSWER],
    ),
    "messages as JSON text in a table": (
        "messages",
        {
            "messages": json.dumps(
                [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
            )
        }
        | SHARED,
        ASKED,
        [ANSWER],
    ),
    "ShareGPT": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}
        | SHARED,
        ASKED,
        [ANSWER],
    ),
    "ShareGPT with its own system": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "user", "value": "Hi"},
                {"from": "assistant", "value": "Yes"},
            ]
        },
        ASKED,
        [ANSWER],
    ),
    "Alpaca": (
        "alpaca",
        {"instruction": "Hi", "input": "", "output": "Yes"} | SHARED,
        ASKED,
        [ANSWER],
    ),
    "Alpaca with input and history": (
        "alpaca",
        {"instruction": "Add", "input": "1 2", "output": "3", "history": [["Hi", "Yes"]]} | SHARED,
        ASKED + chatml("assistant: Yes", "user: Add\n1 2", "assistant: 3"),
        [ANSWER, "3" + END],
    ),
    "Alpaca with its rendering": (
        "alpaca",
        {"instruction": "Hi", "input": "", "output": "Yes", "text": "### Hi\n### Yes"},
        DEFAULT,
        [ANSWER],
    ),
    "Dolly": (
        "dolly",
        {"instruction": "Add", "context": "1 2", "response": "3", "category": "sum"} | SHARED,
        chatml(SYSTEM, "user: Add\n1 2"),
        ["3" + END],
    ),
    "question and answer": (
        "question-answer",
        {"question": "Hi", "answer": "Yes"} | SHARED,
        ASKED,
        [ANSWER],
    ),
    "prompt and completion": (
        "prompt-completion",
        {"prompt": "Hi", "completion": " Yes"},
        "Hi Yes" + END,
        [" Yes" + END],
    ),
    "prompt and completion as messages": (
        "prompt-completion",
        {
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes"},
                {"role": "user", "content": "Add"},
            ],
            "completion": [{"role": "assistant", "content": "3"}],
        },
        ASKED + chatml("assistant: Yes", "user: Add", "assistant: 3"),
        ["3" + END],
    ),
    "text": ("text", {"text": "Hello there"}, "Hello there" + END, ["Hello there" + END]),
}


def stretches(example, tokenizer) -> list[str]:
    """The runs of learned tokens as text."""
    runs = groupby(
        zip(example.input_ids, example.supervised, strict=True), key=lambda pair: pair[1]
    )
    return [tokenizer.decode([token for token, _ in run]) for learned, run in runs if learned]


@pytest.mark.parametrize(("format", "record", "whole", "learned"), GOLDEN.values(), ids=GOLDEN)
def test_tokens_and_mask(tokenizer, format, record, whole, learned):
    example = prepare([record], tokenizer)[0]
    text = tokenizer.decode(example.input_ids)
    assert text.startswith(whole) and text.rstrip().endswith(learned[-1])
    assert stretches(example, tokenizer) == learned
    assert read_records([record])[0].format == format


def test_tool_calls_of_sharegpt():
    call = {"name": "rain", "arguments": {"in": "Bern"}}
    record = {
        "conversations": [
            {"from": "human", "value": "wet?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "Yes"},
        ],
        "tools": json.dumps([{"name": "rain", "description": "", "parameters": {}}]),
    }
    fields = recognise(record, Layout()).fields
    assert fields["tools"] == [
        {"type": "function", "function": {"name": "rain", "description": "", "parameters": {}}}
    ]
    assert fields["messages"] == [
        {"role": "user", "content": "wet?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call}],
        },
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "Yes"},
    ]


def test_old_functions_of_openai():
    called = {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}
    record = {"messages": [called], "functions": [{"name": "f", "parameters": {}}]}
    fields = recognise(record, Layout()).fields
    assert fields["tools"] == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert fields["messages"][0]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    ]


CHAT = [{"role": "user", "content": "Hi"}]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Yes", "No"))
PAIR = (tuple(CHAT), (GOOD,), (BAD,))
PREFERENCES = {
    "strings": (
        "preference",
        {"prompt": "Hi", "chosen": " Yes", "rejected": " No"},
        ("Hi", " Yes", " No"),
    ),
    "implicit prompt": ("preference", {"chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]}, PAIR),
    "prompt repeated in answers": (
        "preference",
        {
            "prompt": "Hi",
            "chosen": [*CHAT, GOOD],
            "rejected": [*CHAT, BAD],
            "messages": [*CHAT, GOOD],
        },
        PAIR,
    ),
    "ShareGPT's": (
        "preference",
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Yes"},
            "rejected": {"from": "gpt", "value": "No"},
        },
        PAIR,
    ),
    "Alpaca's": (
        "preference",
        {"instruction": "Hi", "input": "", "chosen": "Yes", "rejected": "No"},
        PAIR,
    ),
    "OpenAI's": (
        "openai-preference",
        {
            "input": {"messages": CHAT, "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        PAIR,
    ),
    "UltraFeedback's": (
        "scored",
        {
            "instruction": "Hi",
            "completions": [
                {"response": "No", "overall_score": 1.5},
                {"response": "Yes", "overall_score": 8.0},
                {"response": "Maybe", "overall_score": 8.0},
            ],
        },
        PAIR,
    ),
    "scores beside answers": (
        "scored",
        {"prompt": "Hi", "responses": ["a", "b", "c"], "scores": [2, 3, 1]},
        ("Hi", "b", "c"),
    ),
}


@pytest.mark.parametrize(("format", "record", "parts"), PREFERENCES.values(), ids=PREFERENCES)
def test_preferences(format, record, parts):
    (read,) = read_records([record])
    assert (read.kind, read.format) == ("preference", format)
    assert (read.prompt, read.chosen, read.rejected) == parts


def test_answers_of_one_score_are_dropped_and_counted(tokenizer):
    tied = {"prompt": "Hi", "responses": ["a", "b"], "scores": [2, 2]}
    dataset = prepare(
        [tied, {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 2]}], tokenizer
    )
    assert [drop.reason for drop in dataset.dropped] == ["all its answers have the same score"]
    assert len(dataset) == 1


VERDICTS = {
    "TRL's": ({"prompt": "Hi", "completion": " No", "label": False}, "Hi", " No"),
    "of a CSV file": ({"prompt": "Hi", "completion": " No", "label": "False"}, "Hi", " No"),
    "yes and no": ({"prompt": "Hi", "completion": " No", "label": "No "}, "Hi", " No"),
    "a float": ({"prompt": "Hi", "completion": " No", "label": 0.0}, "Hi", " No"),
    "0 and 1": ({"prompt": "Hi", "completion": " No", "label": 0}, "Hi", " No"),
    "messages": ({"messages": [*CHAT, BAD], "label": False}, tuple(CHAT), (BAD,)),
    "ShareGPT's": (
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No"}],
            "kto_tag": False,
        },
        tuple(CHAT),
        (BAD,),
    ),
    "Alpaca's": ({"instruction": "Hi", "output": "No", "kto_tag": False}, tuple(CHAT), (BAD,)),
}


@pytest.mark.parametrize(("record", "prompt", "completion"), VERDICTS.values(), ids=VERDICTS)
def test_verdicts(record, prompt, completion):
    """A bad answer must not be learned as if it were a good one."""
    (read,) = read_records([record])
    assert (read.kind, read.format, read.label) == ("unpaired", "unpaired", False)
    assert (read.prompt, read.completion) == (prompt, completion)


@pytest.mark.parametrize(
    "answered",
    [
        {"prompt": "Hi", "completion": " No"},
        {"messages": [*CHAT, BAD]},
        {"instruction": "Hi", "output": "No"},
        {"question": "Hi", "answer": "No"},
    ],
    ids=lambda row: next(iter(row)),
)
@pytest.mark.parametrize("label", ["maybe", "politics", 2, -1, 0.5, [True], "unacceptable " * 9])
def test_a_label_of_another_kind_is_refused(answered, label, tmp_path):
    """An answer that a verdict may be against must not be learned as if it were a good one."""
    path = tmp_path / "judged.jsonl"
    rows = [{**answered, "label": True}, {**answered, "label": label}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = "a string" if isinstance(label, str) and len(label) > 30 else re.escape(repr(label))
    with pytest.raises(UserError, match=rf"judged\.jsonl:2: 'label' must say .*, got {given}; if"):
        read_records(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("null.jsonl", '{"prompt": "Hi", "completion": " No", "label": null}'),
        ("empty.jsonl", '{"messages": [{"role": "user", "content": "a"}], "label": ""}'),
        ("tag.jsonl", '{"instruction": "Hi", "output": "No", "kto_tag": null}'),
        ("empty.csv", "question,answer,label\nHi,No,"),
    ],
)
def test_an_empty_label_is_refused(name, text, tmp_path):
    """It does not say that the answer is a good one."""
    (tmp_path / name).write_text(text + "\n")
    place = rf"{re.escape(name)}:{text.count(chr(10)) + 1}"
    with pytest.raises(UserError, match=rf"{place}: '(label|kto_tag)' is empty, and might have"):
        read_records(tmp_path / name)


def test_an_empty_label_counts_where_it_is_named_and_not_where_the_format_is_given():
    row = {"q": "Hi", "a": "No", "label": None, "verdict": None}
    columns = {"prompt": "q", "completion": "a"}
    (read,) = read_records([row], layout=Layout(columns=columns))
    assert (read.kind, read.ignored) == ("completion", ())
    with pytest.raises(UserError, match="'label' is empty"):
        read_records([row], layout=Layout(columns={**columns, "label": "verdict"}))
    row = {"prompt": "Hi", "completion": " No", "label": None}
    (read,) = read_records([row], layout=Layout(format="prompt-completion"))
    assert (read.kind, read.completion) == ("completion", " No")
    (read,) = read_records([{**row, "kto_tag": False}])
    assert (read.kind, read.label) == ("unpaired", False)


def test_a_label_is_no_verdict_where_the_format_is_given():
    row = {"prompt": "Hi", "completion": " No", "label": "politics"}
    (read,) = read_records([row], layout=Layout(format="prompt-completion"))
    assert (read.kind, read.ignored) == ("completion", ("label",))


def test_prompts_keep_their_other_fields():
    (read,) = read_records([{"prompt": "1+1", "answer": "2", "level": 3}])
    assert (read.kind, read.format, read.prompt) == ("prompt", "prompts", "1+1")
    assert read.columns == {"answer": "2", "level": 3}


IDS = [5, 6, 7, 8]
TOKENS = {
    "labels": ({"labels": [-100, -100, 7, 8]}, IDS, [False, False, True, True]),
    "a mask": ({"assistant_masks": [0, 1, 0, 1]}, IDS, [False, True, False, True]),
    "neither": ({}, IDS, [True] * 4),
    "padding right": ({"attention_mask": [1, 1, 1, 0]}, IDS[:3], [True] * 3),
    "padding left": (
        {"attention_mask": [0, 1, 1, 1], "labels": [-100, -100, 7, 8]},
        IDS[1:],
        [False, True, True],
    ),
}


@pytest.mark.parametrize(("more", "ids", "supervised"), TOKENS.values(), ids=TOKENS)
def test_tokens_of_another_tool(tokenizer, more, ids, supervised):
    example = prepare([{"input_ids": IDS, **more}], tokenizer)[0]
    assert (example.input_ids, example.supervised) == (ids, supervised)


# record, what the one line about it says
REFUSED = {
    "moved labels": (
        {"input_ids": IDS, "labels": [6, 7, 8, -100]},
        "'labels' must repeat 'input_ids'",
    ),
    "short labels": ({"input_ids": IDS, "labels": [5]}, "'labels' has 1 entries, 'input_ids' 4"),
    "labels and a mask": (
        {"input_ids": IDS, "labels": IDS, "loss_mask": IDS},
        "has both 'labels' and 'loss_mask'",
    ),
    "odd mask": ({"input_ids": IDS, "loss_mask": [0, 1, 2, 1]}, "must hold 0 and 1 alone"),
    "hole in the mask": ({"input_ids": IDS, "attention_mask": [1, 0, 1, 1]}, "has a 0 between"),
    "images": ({"messages": [*CHAT, GOOD], "images": ["a.png"]}, "holds 'images', and only text"),
    "an image part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, GOOD]},
        "message 1: holds 'image_url', and only text",
    ),
    "a prompt and a text": (
        {"prompt": "Who?", "text": "Me."},
        "fits prompts ('prompt') and text ('text'); say which with data.format",
    ),
    "two answers": (
        {"instruction": "Hi", "output": "Yes", "response": "No"},
        "fits alpaca ('instruction' and 'output') and dolly ('instruction' and 'response')",
    ),
    "messages and another text": (
        {"messages": [*CHAT, GOOD], "text": "something else"},
        "fits messages ('messages') and text ('text')",
    ),
    "two systems": (
        {"messages": [{"role": "system", "content": "a"}, *CHAT, GOOD], "system": "b"},
        "has a system message and, in 'system', another",
    ),
    "a system beside a plain prompt": (
        {"system": "a", "prompt": "b", "completion": "c"},
        "has 'system' beside a plain prompt; say data.template",
    ),
    "unknown speaker": (
        {"conversations": [{"from": "narrator", "value": "a"}]},
        "message 1: is from 'narrator', expected one of system",
    ),
    "two roles": (
        {"messages": [{"role": "user", "from": "gpt", "content": "a"}]},
        "message 1: has both 'role' and 'from'",
    ),
    "a broken call": (
        {"conversations": [{"from": "function_call", "value": "{oops"}]},
        "message 1: its function call is text that is not valid JSON",
    ),
    "broken tools": ({"messages": [*CHAT, GOOD], "tools": "{oops"}, "'tools' is text that is not"),
    "broken history": (
        {"instruction": "a", "output": "b", "history": [["a"]]},
        "'history' must hold pairs of a question and an answer",
    ),
    "a weight that is none": (
        {"messages": [*CHAT, {**GOOD, "weight": -1}]},
        "message 2: 'weight' must be a number of 0 or more",
    ),
    "a weight of a record": ({"text": "a", "weight": "heavy"}, "'weight' must be a number of 0 or"),
    "missing scores": (
        {"prompt": "Hi", "responses": ["a", "b"], "scores": [1]},
        "needs a score for each of its 2 answers",
    ),
    "unknown fields": (
        {"frage": "a", "antwort": "b"},
        "is of no known format: has 'frage', 'antwort'",
    ),
    "nothing": ({"text": None}, "has no fields that hold anything"),
    "near": ({"mesages": []}, "did you mean messages?"),
}


@pytest.mark.parametrize(("record", "line"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_told_is_refused_with_its_place(record, line):
    with pytest.raises(UserError) as caught:
        read_records([record])
    assert "record:0: " in str(caught.value) and line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_formats_in_one_file_are_each_recognised():
    records = read_records([row for _, row, _, _ in GOLDEN.values()])
    assert [record.format for record in records] == [format for format, *_ in GOLDEN.values()]


def test_what_is_said_wins_over_what_is_recognised():
    both = {"prompt": "Who?", "text": "Me."}
    assert read_records([both], layout=Layout("text"))[0].text == "Me."
    assert read_records([both], layout=Layout(columns={"text": "prompt"}))[0].text == "Who?"
    with pytest.raises(
        UserError, match=r"record:0: data.format is alpaca, which needs 'instruction'"
    ):
        read_records([both], layout=Layout("alpaca"))


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_formats_are_consistent(format):
    assert format.name in get_args(FormatName) and len(get_args(FormatName)) == len(FORMATS)
    names = [other.name for other in FORMATS]
    assert names.count(format.name) == 1
    assert set(format.over) <= set(names)
    assert not format.fits({})
