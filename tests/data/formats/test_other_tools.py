"""Records as the demo files and documents of other tools lay them out: read, and as what.

Ours in what they say; the fields, roles and nestings are those of LLaMA-Factory's, axolotl's,
Unsloth's, TRL's and OpenAI's.
"""

import json

import pytest

from lora_engine.data.records import read_records
from lora_engine.errors import UserError

TOOL = {
    "name": "rain",
    "description": "Whether it rains.",
    "parameters": {"type": "object", "properties": {"in": {"type": "string"}}, "required": ["in"]},
}
CALL = {"name": "rain", "arguments": {"in": "Bern"}}
SAID = {"id": "call_1", "type": "function", "function": {**CALL, "arguments": '{"in": "Bern"}'}}


def said(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def turn(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


ASKED, ANSWERED = said("user", "Hi"), said("assistant", "Hello.")
# (record, the format it is read by, its roles or kind, what is in a field of it)
LAYOUTS = {
    "LLaMA-Factory, alpaca": (
        {"instruction": "Sum up.", "input": "A text.", "output": "Short."},
        "alpaca",
        "user assistant",
    ),
    "LLaMA-Factory, alpaca with history": (
        {
            "instruction": "And?",
            "input": "",
            "output": "So.",
            "system": "Be terse.",
            "history": [["Why?", "Because."], ["Then?", "Thus."]],
        },
        "alpaca",
        "system user assistant user assistant user assistant",
    ),
    "LLaMA-Factory, tool calling": (
        {
            "conversations": [
                turn("human", "Wet in Bern?"),
                turn("function_call", json.dumps(CALL)),
                turn("observation", '{"rain": true}'),
                turn("gpt", "Yes."),
            ],
            "tools": json.dumps([TOOL]),
        },
        "sharegpt",
        "user assistant tool assistant",
    ),
    "LLaMA-Factory, tool calling without tools": (
        {"conversations": [turn("human", "Hi"), turn("gpt", "Hello.")], "tools": "[]"},
        "sharegpt",
        "user assistant",
    ),
    "LLaMA-Factory, DPO": (
        {
            "conversations": [turn("system", "Be terse."), turn("human", "Hi")],
            "chosen": turn("gpt", "Hello."),
            "rejected": turn("gpt", "Go away."),
        },
        "preference",
        "preference",
    ),
    "LLaMA-Factory, DPO as alpaca": (
        {"instruction": "Hi", "input": "", "chosen": "Hello.", "rejected": "Go away."},
        "preference",
        "preference",
    ),
    "LLaMA-Factory, KTO": ({"messages": [ASKED, ANSWERED], "label": True}, "unpaired", "unpaired"),
    "LLaMA-Factory, KTO as alpaca": (
        {"instruction": "Hi", "input": "", "output": "Go away.", "kto_tag": False},
        "unpaired",
        "unpaired",
    ),
    "LLaMA-Factory, pre-training": ({"text": "A document."}, "text", "text"),
    "LLaMA-Factory, OpenAI's layout": (
        {"messages": [said("system", "Be terse."), ASKED, ANSWERED]},
        "messages",
        "system user assistant",
    ),
    "LLaMA-Factory, reasoning": (
        {"messages": [ASKED, said("assistant", "<think>\nHm.\n</think>\n\nHello.")]},
        "messages",
        "user assistant",
    ),
    "axolotl, chat template": (
        {"messages": [ASKED, said("assistant", "Hello.", training=True)]},
        "messages",
        "user assistant",
    ),
    "axolotl, sharegpt": (
        {"conversations": [turn("human", "Hi"), turn("gpt", "Hello.")]},
        "sharegpt",
        "user assistant",
    ),
    "axolotl, completion": ({"text": "A document."}, "text", "text"),
    "axolotl, DPO by questions": (
        {"system": "Be terse.", "question": "Hi", "chosen": "Hello.", "rejected": "Go away."},
        "preference",
        "preference",
    ),
    "axolotl, DPO in messages": (
        {"messages": [ASKED], "chosen": ANSWERED, "rejected": said("assistant", "Go away.")},
        "preference",
        "preference",
    ),
    "axolotl, ORPO": (
        {
            "prompt": "Hi",
            "chosen": [ASKED, ANSWERED],
            "rejected": [ASKED, said("assistant", "No.")],
        },
        "preference",
        "preference",
    ),
    "axolotl, KTO": (
        {"prompt": "Hi", "completion": "Hello.", "label": True},
        "unpaired",
        "unpaired",
    ),
    "axolotl, pre-tokenised": (
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [-100, 2, 3]},
        "tokens",
        "tokens",
    ),
    "Unsloth, alpaca rendered beside": (
        {
            "instruction": "Sum up.",
            "input": "A text.",
            "output": "Short.",
            "text": "### Instruction:\nSum up.\n\n### Input:\nA text.\n\n### Response:\nShort.",
        },
        "alpaca",
        "user assistant",
    ),
    "Unsloth, FineTome": (
        {
            "conversations": [turn("human", "Hi"), turn("gpt", "Hello.")],
            "source": "made up",
            "score": 5.2,
        },
        "sharegpt",
        "user assistant",
    ),
    "Unsloth, mapped": ({"conversations": [ASKED, ANSWERED]}, "sharegpt", "user assistant"),
    "TRL, prompts and completions in messages": (
        {"prompt": [ASKED], "completion": [ANSWERED]},
        "prompt-completion",
        "user assistant",
    ),
    "TRL, implicit prompt": (
        {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, said("assistant", "No.")]},
        "preference",
        "preference",
    ),
    "TRL, tools": (
        {
            "messages": [
                said("user", "Wet?"),
                {
                    "role": "assistant",
                    "tool_calls": [{"type": "function", "function": CALL}],
                },
                said("tool", "yes", name="rain"),
                ANSWERED,
            ],
            "tools": [{"type": "function", "function": TOOL}],
        },
        "messages",
        "user assistant tool assistant",
    ),
    "TRL, prompts for rewards": ({"prompt": [ASKED], "answer": "7"}, "prompts", "prompt"),
    "UltraFeedback, binarized": (
        {
            "prompt": "Hi",
            "prompt_id": "f0",
            "chosen": [ASKED, ANSWERED],
            "rejected": [ASKED, said("assistant", "No.")],
            "messages": [ASKED, ANSWERED],
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        },
        "preference",
        "preference",
    ),
    "UltraFeedback": (
        {
            "instruction": "Hi",
            "models": ["a", "b"],
            "completions": [
                {"model": "a", "response": "Hello.", "overall_score": 8.0},
                {"model": "b", "response": "No.", "overall_score": 3.0},
            ],
        },
        "scored",
        "preference",
    ),
    "OpenAI, fine-tuning": (
        {
            "messages": [
                said("system", "Be terse."),
                ASKED,
                said("assistant", "No.", weight=0),
                said("user", "Please"),
                said("assistant", "Hello.", weight=1),
            ]
        },
        "messages",
        "system user assistant user assistant",
    ),
    "OpenAI, tools": (
        {
            "messages": [said("user", "Wet?"), {"role": "assistant", "tool_calls": [SAID]}],
            "parallel_tool_calls": False,
            "tools": [{"type": "function", "function": TOOL}],
        },
        "messages",
        "user assistant",
    ),
    "OpenAI, functions": (
        {
            "messages": [
                said("user", "Wet?"),
                {"role": "assistant", "function_call": {**CALL, "arguments": '{"in": "Bern"}'}},
            ],
            "functions": [TOOL],
        },
        "messages",
        "user assistant",
    ),
    "OpenAI, preference": (
        {
            "input": {"messages": [ASKED], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [ANSWERED],
            "non_preferred_output": [said("assistant", "No.")],
        },
        "openai-preference",
        "preference",
    ),
    "HH-RLHF": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: No.",
        },
        "preference",
        "preference",
    ),
    "Dolly": (
        {"instruction": "What?", "context": "", "response": "That.", "category": "open_qa"},
        "dolly",
        "user assistant",
    ),
}


@pytest.mark.parametrize(("row", "format", "shape"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_is_read(tmp_path, row, format, shape):
    path = tmp_path / "demo.json"
    path.write_text(json.dumps([row, row]))
    for record in read_records(path):
        assert record.format == format
        roles = " ".join(str(message["role"]) for message in record.messages)
        assert (roles or record.kind) == shape
        if record.kind == "preference":
            assert "Hi" in str(record.prompt)
            assert "Hello." in str(record.chosen) and "Hello." not in str(record.rejected)


def test_tools_and_calls_arrive_whole(tmp_path):
    for name in ("LLaMA-Factory, tool calling", "OpenAI, tools", "OpenAI, functions", "TRL, tools"):
        (record,) = read_records([LAYOUTS[name][0]])
        assert record.given.tools == ({"type": "function", "function": TOOL},)
        (call,) = record.messages[1]["tool_calls"]
        arguments = call["function"]["arguments"]
        assert (json.loads(arguments) if isinstance(arguments, str) else arguments) == {
            "in": "Bern"
        }


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [ASKED, ANSWERED], "images": ["a.jpg"]}, "holds 'images', and only text"),
        ({"messages": [ASKED, ANSWERED], "videos": ["a.mp4"]}, "holds 'videos', and only text"),
        ({"segments": [{"label": True, "text": "a"}]}, "is of no known format"),
        ({"conversations": [turn("human", "Hi"), turn("narrator", "x")]}, "is from 'narrator'"),
    ],
)
def test_what_is_not_read_is_said(tmp_path, row, words):
    path = tmp_path / "demo.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=words):
        read_records(path)
