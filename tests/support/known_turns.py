"""Conversations of ten shapes, and tokenizers that have a template and all tokens it writes."""

import re
from functools import cache
from itertools import groupby
from pathlib import Path

import chat_templates
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_engine.data.render import TARGET, Example

_CONTROL = re.compile(
    r"<[|｜][^<>|｜\s]+[|｜]>|<\|?(?:start_of_turn|end_of_turn|turn|s|/s)\|?>|<turn\|>|\[gMASK\]|<sop>"
)


@cache
def byte_tokens() -> Tokenizer:
    """Each byte is a token, so that any boundary is one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    return tokens


def make_bytewise(template: str, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Bytes are the tokens, and what the template writes that looks like a control token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_tokens().to_str()),
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=sorted({*_CONTROL.findall(template), *special}),
        chat_template=template,
    )


@cache
def known_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """By the name of a template of ours, in capitals, or of a file that TRL brings."""
    if name.isupper():
        return make_bytewise(getattr(chat_templates, name))
    trl = pytest.importorskip("trl")
    return make_bytewise((Path(trl.__file__).parent / f"chat_templates/{name}.jinja").read_text())


def learned(example: Example, tokenizer) -> list[str]:
    """The stretches of text that the loss is taken over."""
    ids = list(example.input_ids)
    places = [i for i in range(1, len(ids)) if example.supervised[i]]
    for place, token in zip(places, example.columns.get(TARGET, ()), strict=False):
        ids[place] = token if token >= 0 else ids[place]
    pairs = zip(ids, example.supervised, strict=True)
    return [
        tokenizer.decode([token for token, _ in run])
        for on, run in groupby(pairs, key=lambda pair: pair[1])
        if on
    ]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(where, number=1):
    function = {"name": "rain", "arguments": {"in": where}}
    return {"type": "function", "id": f"call0000{number}", "function": function}


def tool(content, number=1):
    return {"role": "tool", "content": content, "name": "rain", "tool_call_id": f"call0000{number}"}


PLACE = {"type": "string", "description": "Where."}
PARAMETERS = {"type": "object", "properties": {"in": {**PLACE}}, "required": ["in"]}
FUNCTION = {"name": "rain", "description": "Whether it rains.", "parameters": PARAMETERS}
TOOLS = ({"type": "function", "function": FUNCTION},)

SHAPES = {
    "turns": [user("Hi"), assistant("Hello."), user("Bye"), assistant("Ciao.")],
    "system": [{"role": "system", "content": "Be terse."}, user("Hi"), assistant("Hello.")],
    "no system": [{"role": "system", "content": ""}, user("Hi"), assistant("Hello.")],
    "waits": [user("Hi"), assistant("Hello."), user("Bye")],
    "two answers": [user("Hi"), assistant("Hello."), assistant("Still here?")],
    "call": [user("Wet?"), assistant("Let me see.", tool_calls=[call("Bern")])],
    "chain": [
        user("Wet?"),
        assistant("", tool_calls=[call("Bern")]),
        tool("1"),
        assistant("", tool_calls=[call("Basel", 2)]),
        tool("0", 2),
        assistant("Partly."),
        user("Now?"),
        assistant("No."),
    ],
    "parallel": [
        user("Wet?"),
        assistant("", tool_calls=[call("Bern"), call("Basel", 2)]),
        tool("1"),
        tool("0", 2),
        assistant("Partly."),
    ],
    "reasoning": [user("1+1?"), assistant("2", reasoning_content="Easy.")],
    "reasoning earlier": [
        user("1+1?"),
        assistant("2", reasoning_content="Easy."),
        user("1+2?"),
        assistant("3", reasoning_content="Hm."),
    ],
}
