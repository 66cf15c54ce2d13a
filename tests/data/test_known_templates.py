"""What is learned of conversations of ten shapes by the templates of well-known models.

Most are the files that TRL brings, the others small ones of the same structure.
"""

from pathlib import Path

import pytest
from known_turns import SHAPES, TOOLS, known_tokenizer, learned

from lora_engine.data.inputs import TemplateInputs
from lora_engine.data.records import Record
from lora_engine.data.render import tokenize
from lora_engine.data.template import Undecided

# What a shape is refused for.
NOT_ORDER = "roles must alternate"
NO_TEXT, NO_CALLS, NO_REASONING = (
    f"does not write the {what} of message" for what in ("text", "tool calls", "reasoning")
)


def texts(end: str, begin: str = "", last: str | None = None) -> dict[str, list[str] | str]:
    """The shapes without calls and reasoning.

    begin, end: of what is learned of each turn. last: the beginning in the last turn.
    """
    last = begin if last is None else last
    only = [f"{last}Hello.{end}"]
    return {
        "turns": [f"{begin}Hello.{end}", f"{last}Ciao.{end}"],
        "system": only,
        "no system": only,
        "waits": [f"{begin}Hello.{end}"],
        "two answers": [f"{begin}Hello.{end}", f"{last}Still here?{end}"],
    }


UNCALLED = dict.fromkeys(("call", "chain", "parallel"), NO_CALLS)
UNREASONED = dict.fromkeys(("reasoning", "reasoning earlier"), NO_REASONING)
CHATML = {**texts("<|im_end|>"), **UNCALLED, **UNREASONED}
BERN, BASEL = (
    f'<tool_call>\n{{"name": "rain", "arguments": {{"in": "{where}"}}}}\n</tool_call>'
    for where in ("Bern", "Basel")
)
QWEN = {
    **texts("<|im_end|>"),
    "call": [f"Let me see.\n{BERN}<|im_end|>"],
    "chain": [f"{BERN}<|im_end|>", f"{BASEL}<|im_end|>", "Partly.<|im_end|>", "No.<|im_end|>"],
    "parallel": [f"{BERN}\n{BASEL}<|im_end|>", "Partly.<|im_end|>"],
    **UNREASONED,
}
NOTHING = "<think>\n\n</think>\n\n"
XBERN, XBASEL = (
    f"<tool_call>\n<function=rain>\n<parameter=in>\n{where}\n</parameter>\n</function>\n</tool_call>"
    for where in ("Bern", "Basel")
)
GBERN, GBASEL = (
    f"\n<think></think>\n<tool_call>rain\n<arg_key>in</arg_key>\n<arg_value>{where}</arg_value>\n"
    "</tool_call><|observation|>"
    for where in ("Bern", "Basel")
)
GLM = {
    **texts("<|user|>", "\n<think></think>\n"),
    "call": [GBERN.replace("<tool_call>", "Let me see.\n<tool_call>")],
    "chain": [GBERN, GBASEL, *(f"\n<think></think>\n{t}<|user|>" for t in ("Partly.", "No."))],
    "parallel": [
        GBERN.removesuffix("<|observation|>") + GBASEL.removeprefix("\n<think></think>"),
        "\n<think></think>\nPartly.<|user|>",
    ],
    "reasoning": ["\n<think>Easy.</think>\n2<|user|>"],
    "reasoning earlier": ["\n<think></think>\n2<|user|>", "\n<think>Hm.</think>\n3<|user|>"],
}
JBERN, JBASEL = (
    f'{{"name": "rain", "parameters": {{"in": "{w}"}}}}<|eot_id|>' for w in ("Bern", "Basel")
)
OBERN, OBASEL = (
    f' to=functions.rain<|channel|>commentary json<|message|>{{"in": "{where}"}}<|call|>'
    for where in ("Bern", "Basel")
)
FINAL, RETURN = "<|channel|>final<|message|>", "<|return|>"
THINKS = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
DBEGIN, DEND = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
DBERN, DBASEL = (
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>rain\n```json\n"
    f'{{"in": "{where}"}}\n```<｜tool▁call▁end｜>'
    for where in ("Bern", "Basel")
)
DEEPSEEK = {**texts("<｜end▁of▁sentence｜>"), **UNCALLED, **UNREASONED}
RBERN, RBASEL = (
    f'<|tool_call>call:rain{{in:<|"|>{where}<|"|>}}<tool_call|>' for where in ("Bern", "Basel")
)
MBERN, MBASEL = (
    f'{{"name": "rain", "arguments": {{"in": "{where}"}}, "id": "call0000{i}"}}'
    for i, where in ((1, "Bern"), (2, "Basel"))
)
GEMMA = {
    **texts("<end_of_turn>"),
    "two answers": NOT_ORDER,
    "call": NO_CALLS,
    "chain": NOT_ORDER,
    "parallel": NOT_ORDER,
    **UNREASONED,
}
# A second answer follows the first one's end without a beginning; a call ends in what its result
# begins with.
GEMMA4 = {
    **texts("<turn|>"),
    "two answers": "message 3 so that its tokens cannot be told from the rest",
    "call": [f"{RBERN}Let me see.<|tool_response>"],
    "chain": [
        *(f"{t}<|tool_response>" for t in (RBERN, RBASEL)),
        *(f"{t}<turn|>" for t in ("Partly.", "No.")),
    ],
    "parallel": [f"{RBERN}{RBASEL}<|tool_response>", "Partly.<turn|>"],
    **UNREASONED,
}
PHI = {
    **texts("<|end|>"),
    "call": NO_CALLS,
    "chain": "does not write what message 3 says",
    "parallel": "does not write what message 3 says",
    **UNREASONED,
}

EXPECTED = {
    "qwen2_5": QWEN,
    "qwen3_instruct_2507": QWEN,
    "qwen3": {
        **texts("<|im_end|>", "", NOTHING),
        "call": [f"{NOTHING}Let me see.\n{BERN}<|im_end|>"],
        "chain": [*QWEN["chain"][:3], f"{NOTHING}No.<|im_end|>"],
        "parallel": [f"{BERN}\n{BASEL}<|im_end|>", f"{NOTHING}Partly.<|im_end|>"],
        "reasoning": ["<think>\nEasy.\n</think>\n\n2<|im_end|>"],
        "reasoning earlier": ["2<|im_end|>", "<think>\nHm.\n</think>\n\n3<|im_end|>"],
    },
    # The generation prompt writes an empty thought, which an author's own replaces.
    "qwen3_5_nothink": {
        **texts("<|im_end|>"),
        "call": [f"Let me see.\n\n{XBERN}<|im_end|>"],
        "chain": [f"{XBERN}<|im_end|>", f"{XBASEL}<|im_end|>", *QWEN["chain"][2:]],
        "parallel": [f"{XBERN}\n{XBASEL}<|im_end|>", "Partly.<|im_end|>"],
        "reasoning": ["Easy.\n</think>\n\n2<|im_end|>"],
        "reasoning earlier": ["2<|im_end|>", "Hm.\n</think>\n\n3<|im_end|>"],
    },
    # The generation prompt opens a thought; earlier answers stand without one.
    "qwen3_5_think": {
        **texts("<|im_end|>", "", "\n</think>\n\n"),
        "two answers": [f"\n</think>\n\n{t}<|im_end|>" for t in ("Hello.", "Still here?")],
        "call": [f"\n</think>\n\nLet me see.\n\n{XBERN}<|im_end|>"],
        "chain": [
            *(f"{t}<|im_end|>" for t in (XBERN, XBASEL, "Partly.")),
            "\n</think>\n\nNo.<|im_end|>",
        ],
        "parallel": [f"\n</think>\n\n{t}<|im_end|>" for t in (f"{XBERN}\n{XBASEL}", "Partly.")],
        "reasoning": ["Easy.\n</think>\n\n2<|im_end|>"],
        "reasoning earlier": ["2<|im_end|>", "Hm.\n</think>\n\n3<|im_end|>"],
    },
    "llama3": {**texts("<|eot_id|>"), **UNCALLED, **UNREASONED},
    "llama3_1": {
        **texts("<|eot_id|>"),
        "call": NO_TEXT,
        "chain": [JBERN, JBASEL, "Partly.<|eot_id|>", "No.<|eot_id|>"],
        "parallel": "only supports single tool-calls",
        **UNREASONED,
    },
    "gemma": {**GEMMA, "system": "System role not supported", "no system": "System role not"},
    "gemma3": GEMMA,
    **dict.fromkeys(("gemma4", "gemma4_v3", "gemma4_v4"), GEMMA4),
    # As it was published: a call ends in what every turn does.
    "gemma4_v2": {
        **GEMMA4,
        "two answers": ["Hello.<turn|>", "Still here?<turn|>"],
        "call": [f"{RBERN}Let me see.<turn|>"],
        "chain": [f"{t}<turn|>" for t in (RBERN, RBASEL, "Partly.", "No.")],
        "parallel": [f"{RBERN}{RBASEL}<turn|>", "Partly.<turn|>"],
    },
    # Two answers are one turn, and reasoning is written without a call, too.
    "gemma4_v5": {
        **GEMMA4,
        "two answers": ["Hello.Still here?<turn|>"],
        "reasoning": ["<|channel>thought\nEasy.\n<channel|>2<turn|>"],
        "reasoning earlier": ["2<turn|>", "<|channel>thought\nHm.\n<channel|>3<turn|>"],
    },
    # The next role's mark ends a turn, unless it is the generation prompt.
    "glm4moe": {
        **GLM,
        "two answers": ["\n<think></think>\nHello.", "\n<think></think>\nStill here?<|user|>"],
    },
    "glm4moe_training": GLM,
    # An answer ends in <|end|> where more follows; there the model has to write <|return|>.
    "gptoss": {
        **texts(RETURN, FINAL),
        "call": [f"{THINKS.format('Let me see.')}{OBERN}"],
        "chain": [OBERN, OBASEL, f"{FINAL}Partly.{RETURN}", f"{FINAL}No.{RETURN}"],
        "parallel": NO_CALLS,
        "reasoning": [f"{THINKS.format('Easy.')}{FINAL}2{RETURN}"],
        "reasoning earlier": [f"{FINAL}2{RETURN}", f"{THINKS.format('Hm.')}{FINAL}3{RETURN}"],
    },
    # Of two calls in a row of turns the second is written without a beginning.
    "deepseekv3": {
        **DEEPSEEK,
        "call": [f"Let me see.{DBEGIN}{DBERN}{DEND}"],
        "chain": "message 4 so that its tokens cannot be told from the rest",
        "parallel": [f"{DBEGIN}{DBERN}\n{DBASEL}{DEND}", "Partly.<｜end▁of▁sentence｜>"],
    },
    "deepseek_r1_distill": DEEPSEEK,
    "phi3": PHI,
    "phi3_5": PHI,
    "phi3_training": {
        **PHI,
        **texts("<|end|>\n</s>"),
        "turns": ["Hello.<|end|>\n", "Ciao.<|end|>\n</s>"],
        "waits": ["Hello.<|end|>\n"],
        "two answers": ["Hello.<|end|>\n", "Still here?<|end|>\n</s>"],
    },
    "cohere2": {
        **GEMMA,
        **texts("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        "two answers": NOT_ORDER,
    },
    # The generation prompt opens a thought that an answer without one only closes.
    "nemotron_3_nano": {
        **texts("<|im_end|>", "</think>"),
        "call": [f"</think>Let me see.\n{XBERN}\n<|im_end|>"],
        "chain": [
            *(f"</think>\n{t}\n<|im_end|>" for t in (XBERN, XBASEL)),
            *(f"</think>{t}<|im_end|>" for t in ("Partly.", "No.")),
        ],
        "parallel": [f"</think>\n{XBERN}\n{XBASEL}\n<|im_end|>", "</think>Partly.<|im_end|>"],
        "reasoning": ["Easy.\n</think>\n2<|im_end|>"],
        "reasoning earlier": ["</think>\n2<|im_end|>", "Hm.\n</think>\n3<|im_end|>"],
    },
    "lfm2": CHATML,
    "lfm2_v2": {
        **texts("<|im_end|>"),
        "call": ["Let me see.<|tool_call_start|>[rain(in='Bern')]<|tool_call_end|><|im_end|>"],
        "chain": [
            "<|tool_call_start|>[rain(in='Bern')]<|tool_call_end|><|im_end|>",
            "<|tool_call_start|>[rain(in='Basel')]<|tool_call_end|><|im_end|>",
            "Partly.<|im_end|>",
            "No.<|im_end|>",
        ],
        "parallel": [
            "<|tool_call_start|>[rain(in='Bern'), rain(in='Basel')]<|tool_call_end|><|im_end|>",
            "Partly.<|im_end|>",
        ],
        **UNREASONED,
    },
    "CHATML_DEFAULT_SYSTEM": CHATML,
    "ZEPHYR": {**CHATML, **texts("</s>")},
    "MISTRAL": {
        **texts("</s>", " "),
        "two answers": [" Hello.</s> Still here?</s>"],
        "call": NO_TEXT,
        "chain": [
            *(f"[TOOL_CALLS] [{t}]</s>" for t in (MBERN, MBASEL)),
            *(" Partly.</s>", " No.</s>"),
        ],
        "parallel": [f"[TOOL_CALLS] [{MBERN}, {MBASEL}]</s>", " Partly.</s>"],
        **UNREASONED,
    },
    "CLOSES_ONLY": {
        **texts("<|end|>"),
        **UNCALLED,
        "reasoning": ["<think>Easy.</think>2<|end|>"],
        "reasoning earlier": ["2<|end|>", "<think>Hm.</think>3<|end|>"],
    },
    "SMOLLM3": {**CHATML, **texts("<|im_end|>\n")},
    "PARTS_ONLY": {**CHATML, **texts("<|end|>")},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_learned(name, shape):
    tokenizer, expected = known_tokenizer(name), EXPECTED[name][shape]
    record = Record("messages", tuple(SHAPES[shape]), origin="chats.jsonl:1")
    if isinstance(expected, str):
        with pytest.raises(Undecided, match=r"^chats\.jsonl:1: ") as refused:
            tokenize(record, tokenizer)
        assert expected in str(refused.value)
    else:
        assert learned(tokenize(record, tokenizer), tokenizer) == expected


def others() -> list[str]:
    """The templates that TRL brings of which no expectation is written here."""
    trl = pytest.importorskip("trl")
    names = sorted(path.stem for path in Path(trl.__file__).parent.glob("chat_templates/*.jinja"))
    return [name for name in names if name not in EXPECTED]


@pytest.mark.slow
def test_by_every_other_template_all_of_an_answer_is_learned_and_nothing_of_a_question():
    learns = 0
    for name in others():
        tokenizer = known_tokenizer(name)
        for shape, messages in SHAPES.items():
            try:
                example = tokenize(Record("messages", tuple(messages), origin="a:1"), tokenizer)
            except Undecided as refused:
                assert str(refused).startswith("a:1: the chat template "), (name, shape)
                continue
            stretches = learned(example, tokenizer)
            text, position = "".join(stretches), 0
            for said in answers(messages):
                position = text.find(said, position)
                assert position >= 0, (name, shape, said)
            asked = [m["content"] for m in messages if m["role"] in ("user", "system")]
            assert not any(len(said) > 1 and said in text for said in asked), (name, shape)
            learns += 1
    assert learns > 250


def answers(messages) -> list[str]:
    """What assistants say, and what they call with, but for the order of the two in one message."""
    said: list[str] = []
    for message in messages:
        if message["role"] == "assistant":
            calls = message.get("tool_calls", [])
            said += [call["function"]["arguments"]["in"] for call in calls]
            said += [message["content"]] if message["content"] and not calls else []
    return said


WRITE_TOOLS = {
    *("qwen2_5", "qwen3", "qwen3_5_think", "llama3_1", "gemma4_v5", "glm4moe", "gptoss"),
    *("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4"),
    *("nemotron_3_nano", "lfm2", "lfm2_v2", "MISTRAL", "SMOLLM3", "qwen3_instruct_2507"),
    *("qwen3_5_nothink", "glm4moe_training"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_tools_are_written_or_the_record_is_refused(name):
    tokenizer = known_tokenizer(name)
    messages = tuple(SHAPES["turns"][:2])
    record = Record("messages", messages, given=TemplateInputs(TOOLS), origin="a:1")
    if name in WRITE_TOOLS:
        example = tokenize(record, tokenizer)
        assert "Whether it rains." in tokenizer.decode(example.input_ids)
        assert "Whether it rains." not in "".join(learned(example, tokenizer))
    else:
        with pytest.raises(Undecided, match=r"^a:1: the chat template does not write the record's"):
            tokenize(record, tokenizer)


@pytest.mark.parametrize(
    ("name", "variables", "expected"),
    [
        ("qwen3", {"enable_thinking": False}, ["Hello.<|im_end|>", "Ciao.<|im_end|>"]),
        ("qwen3_5_think", {"enable_thinking": False}, ["Hello.<|im_end|>", "Ciao.<|im_end|>"]),
        ("CLOSES_ONLY", {"thinking": True}, ["</think>Hello.<|end|>", "</think>Ciao.<|end|>"]),
        ("SMOLLM3", {"enable_thinking": False}, ["Hello.<|im_end|>\n", "Ciao.<|im_end|>\n"]),
    ],
)
def test_what_the_prompt_writes_by_a_variable_is_not_learned(name, variables, expected):
    tokenizer = known_tokenizer(name)
    record = Record(
        "messages", tuple(SHAPES["turns"]), given=TemplateInputs(variables=variables), origin="a:1"
    )
    assert learned(tokenize(record, tokenizer), tokenizer) == expected
