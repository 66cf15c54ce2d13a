"""Records as well-known datasets on the hub lay them out: read, and as what, or refused in a line.

Ours in what they say; the fields, roles and nestings are those that their cards describe.
"""

import json

import pytest

from lora_engine.data.dataset import prepare
from lora_engine.data.formats.columns import Layout
from lora_engine.data.records import read_records
from lora_engine.errors import UserError

ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
WORSE = {"role": "assistant", "content": "Go away."}
PAIR = {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, WORSE]}


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": value} for speaker, value in said]


CALL = '{"name": "rain", "arguments": {"in": "Bern"}}'
HUMAN = turns(("human", "Hi"), ("gpt", "Hello."))
# (record, the format it is read by, its roles, or its kind if it is no chat)
READ = {
    "Capybara": (
        {"source": "x", "conversation": [{"input": "Hi", "output": "Hello."}] * 2},
        "sharegpt",
        "user assistant user assistant",
    ),
    "Glaive's calls in ShareGPT's layout": (
        {
            "system": "Be brief.",
            "conversations": turns(
                *(("human", "Wet?"), ("function-call", CALL), ("function-response", "{}")),
                *(("gpt", "Yes."),),
            ),
        },
        "sharegpt",
        "system user assistant tool assistant",
    ),
    "Hermes' calls": (
        {
            "id": "a",
            "conversations": turns(
                *(("system", "You call."), ("human", "Wet?"), ("gpt", f"<tool_call>{CALL}")),
                *(("tool", "{}"), ("gpt", "Yes.")),
            ),
            "tools": '[{"type": "function", "function": {"name": "rain", "parameters": {}}}]',
            "category": "weather",
        },
        "sharegpt",
        "system user assistant tool assistant",
    ),
    "SlimOrca": (
        {"conversations": [{**turn, "weight": i} for i, turn in enumerate(HUMAN)]},
        "sharegpt",
        "user assistant",
    ),
    "OpenHermes": (
        {"conversations": HUMAN, "system_prompt": None, "skip_prompt_formatting": False},
        "sharegpt",
        "user assistant",
    ),
    "Magpie": (
        {"instruction": "Hi", "response": "Hello.", "conversations": HUMAN, "reward": 1.5},
        "sharegpt",
        "user assistant",
    ),
    "Tulu": ({"id": "a", "messages": [ASKED, ANSWERED], "source": "x"}, "messages", None),
    "UltraChat": (
        {"prompt": "Hi", "prompt_id": "a", "messages": [ASKED, ANSWERED]},
        "messages",
        "user assistant",
    ),
    "WildChat": (
        {"conversation": [{**ASKED, "toxic": False}, {**ANSWERED, "toxic": False}], "turn": 1},
        "sharegpt",
        "user assistant",
    ),
    "GSM8K": ({"question": "1 + 1?", "answer": "Two.\n#### 2"}, "question-answer", None),
    "Dolly": (
        {"instruction": "Hi", "context": "", "response": "Hello.", "category": "open_qa"},
        "dolly",
        "user assistant",
    ),
    "UltraFeedback, binarised": (
        {
            "prompt": "Hi",
            **PAIR,
            "messages": PAIR["chosen"],
            "score_chosen": 9,
            "score_rejected": 3,
        },
        "preference",
        "preference",
    ),
    "UltraFeedback": (
        {
            "instruction": "Hi",
            "models": ["a", "b"],
            "completions": [
                {"response": "Hello.", "overall_score": 7.5, "fine-grained_score": 4.0},
                {"response": "Go away.", "overall_score": 3.0, "fine-grained_score": 2.0},
            ],
        },
        "scored",
        "preference",
    ),
    "HH": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Go away.",
        },
        "preference",
        "preference",
    ),
    "LIMA": (
        {"conversations": ["Hi", "Hello.", "And?", "So."], "source": "x"},
        "sharegpt",
        "user assistant user assistant",
    ),
    "Cohere's roles": (
        {
            "messages": [
                {"role": "System", "content": "Be brief."},
                {"role": "User", "content": "Hi"},
                {"role": "Chatbot", "content": "Hello."},
            ]
        },
        "messages",
        "system user assistant",
    ),
    "Gemini": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
            "contents": [
                {"role": "user", "parts": [{"text": "Hi"}]},
                {"role": "model", "parts": [{"text": "Hello."}]},
            ],
        },
        "sharegpt",
        "system user assistant",
    ),
    "Bedrock": (
        {
            "schemaVersion": "bedrock-conversation-2024",
            "system": [{"text": "Be brief."}],
            "messages": [
                {"role": "user", "content": [{"text": "Hi"}]},
                {"role": "assistant", "content": [{"text": "Hello."}]},
            ],
        },
        "messages",
        "system user assistant",
    ),
    "code, with its rendering as a prompt": (
        {
            "instruction": "Add.",
            "input": "[1, 2]",
            "output": "print(3)",
            "prompt": "### Instruction:\nAdd.\n\n### Input:\n[1, 2]\n\n### Output:\nprint(3)",
        },
        "alpaca",
        "user assistant",
    ),
    "rewards that are checked": (
        {"prompt": [ASKED], "reward_model": {"ground_truth": "2", "style": "rule"}},
        "prompts",
        "prompt",
    ),
}
REFUSED = {
    "OpenAssistant, a message a record": (
        {"message_id": "a", "parent_id": None, "text": "Hi", "role": "prompter", "lang": "en"},
        "is one message, of the role 'prompter', of a conversation that other records go on with",
    ),
    "OpenAssistant, trees": (
        {"prompt": {"text": "Hi", "role": "prompter", "replies": []}, "tree_state": "ready"},
        "is a tree of messages and their 'replies'; make a record of each conversation that is",
    ),
    "OpenOrca": (
        {"system_prompt": "Be brief.", "question": "Hi", "response": "Hello."},
        "say data.columns: {system: system_prompt, user: question, assistant: response}",
    ),
    # The answers begin with a word in common, which is no prompt.
    "pairs by Orca": (
        {"system": "", "input": "Hi", "chosen": "The one.", "rejected": "The other."},
        "may be in 'input'; say so with data.columns: {system: system, question: input, chosen: ch",
    ),
    "UltraInteract's pairs": (
        {"trajectory": HUMAN[:1], "chosen": "The one.", "rejected": "The other."},
        "may be in 'trajectory'; say so with data.columns: {prompt: trajectory, chosen: chosen",
    ),
    "pairs with a system message": (
        {"system": "Be brief.", "prompt": "Hi", "chosen": "Hello.", "rejected": "No."},
        "data.columns: {system: system, question: prompt, chosen: chosen, rejected: rejected}",
    ),
    "LIMO": (
        {"question": "1 + 1?", "solution": "One and one are two.", "answer": "2"},
        "'solution' beside 'question' and 'answer', and it may be the answer; say data.columns: "
        "{user: question, assistant: solution}, or data.format: question-answer to leave it out",
    ),
    "MBPP": (
        {"task_id": 1, "text": "Write a sum.", "code": "print(3)", "test_list": []},
        "'code' beside 'text', and it may be the answer; say data.columns: {user: text, assistant: "
        "code}, or data.format: text",
    ),
    "HelpSteer": (
        {"prompt": "Hi", "response": "Hello.", "helpfulness": 4},
        "if that is 'response', say data.columns: {user: prompt, assistant: response}",
    ),
    "OpenAI's batches": (
        {"custom_id": "a", "url": "/v1", "body": {"model": "m", "messages": [ASKED]}},
        "if 'body.messages' is the conversation, say data.columns: {messages: body.messages}",
    ),
    "Nemotron": (
        {"input": [ASKED], "output": "Hello.", "category": "chat"},
        "if 'input' is the conversation, say data.columns: {prompt: input, completion: output}",
    ),
    "arenas": (
        {"conversation_a": PAIR["rejected"], "conversation_b": PAIR["chosen"], "winner": "b"},
        "say what they are with data.columns, as in",
    ),
    "Anthropic's calls": (
        {"messages": [ASKED, {"role": "assistant", "content": [{"type": "tool_use"}]}]},
        "message 2: has a part 'tool_use'; write it as 'tool_calls' of the message",
    ),
    "speakers": (
        {"conversations": [{"speaker": "user", "text": "Hi"}]},
        "'role' must be a string such as 'user', got nothing; it has 'speaker' and 'text'",
    ),
    "SQuAD": (
        {"id": "5", "context": "A text.", "question": "Why?", "answers": {"text": ["So."]}},
        "say what they are with data.columns, as in {user: COLUMN, assistant: COLUMN}",
    ),
    "BoolQ": ({"question": "Is it?", "passage": "A text.", "answer": True}, "must be a string"),
    "Magicoder": (
        {"lang": "python", "problem": "Write.", "solution": "print()"},
        "say data.columns: {user: problem, assistant: solution}",
    ),
    "LLaVA": ({"image": "a.jpg", "conversations": HUMAN}, "holds 'image', and only text"),
}


@pytest.mark.parametrize(("row", "format", "shape"), READ.values(), ids=READ)
def test_a_dataset_is_read(row, format, shape):
    (record,) = read_records([row])
    assert record.format == format
    roles = " ".join(str(message["role"]) for message in record.messages)
    assert (roles or record.kind) == (shape or "user assistant")
    if record.kind == "preference":
        assert "Hi" in str(record.prompt)
        assert "Hello." in str(record.chosen) and "Hello." not in str(record.rejected)


@pytest.mark.parametrize(("row", "words"), REFUSED.values(), ids=REFUSED)
def test_a_dataset_is_refused_in_one_line(row, words, tmp_path, tokenizer):
    path = tmp_path / "hub.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as refused:
        prepare(path, tokenizer)
    (line,) = str(refused.value).splitlines()
    assert "hub.jsonl:1: " in line and words in line


def test_what_is_said_of_pairs_helps():
    row, _ = REFUSED["pairs by Orca"]
    columns = {"system": "system", "question": "input", "chosen": "chosen", "rejected": "rejected"}
    (record,) = read_records([{**row, "system": "Be brief."}], layout=Layout(columns=columns))
    assert [message["content"] for message in record.prompt] == ["Be brief.", "Hi"]
    said = [answer[-1]["content"] for answer in (record.chosen, record.rejected)]
    assert said == ["The one.", "The other."]


def test_an_answer_that_the_text_says_is_not_asked_about():
    (record,) = read_records([{"text": "Q: 1 + 1? A: 2", "answer": "2"}])
    assert (record.format, record.ignored) == ("text", ("answer",))
    (record,) = read_records([{"text": "Rain.", "summary": "x"}], layout=Layout("text"))
    assert record.text == "Rain."


def test_calls_with_hyphens_are_calls():
    (record,) = read_records([READ["Glaive's calls in ShareGPT's layout"][0]])
    (call,) = record.messages[2]["tool_calls"]
    assert call["function"] == json.loads(CALL) and record.messages[2]["content"] == ""
