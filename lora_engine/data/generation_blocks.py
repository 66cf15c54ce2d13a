"""The `{% generation %}` blocks of a chat template: its own word on what the assistant writes."""

import re
from typing import NamedTuple

from lora_engine.data.forms import Written
from lora_engine.data.inputs import TemplateInputs
from lora_engine.data.template import Tokenizer, Undecided, render

_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
_HEAD, _TAIL = "14142135623730950488", "16887242"
_MARK = re.compile(f"{_HEAD}([01]){_TAIL}")
_NAME = "lora_engine_generation_block"
# The newline goes with the tag before it, so that the template begins at the start of a line.
_MACRO = (
    f"{{% macro {_NAME}() %}}{_HEAD}0{_TAIL}{{{{ caller() }}}}{_HEAD}1{_TAIL}{{% endmacro %}}\n"
)


class Block(NamedTuple):
    """Characters [start, end) of a rendering, written for a message."""

    start: int
    end: int
    message: int


def template_with_blocks(tokenizer: Tokenizer, inputs: TemplateInputs) -> str | None:
    """The template, if it has such blocks."""
    template = tokenizer.chat_template
    if isinstance(template, str):
        return template if _TAG.search(template) else None
    try:
        chosen = tokenizer.get_chat_template(None, list(inputs.tools) or None)
    except Exception:  # rendering says what is wrong with it
        return None
    return chosen if isinstance(chosen, str) and _TAG.search(chosen) else None


def with_marks(template: str) -> str:
    """The template with marks around what its blocks write."""
    return _MACRO + _TAG.sub(_call, template)


def find_blocks(
    template: str, written: Written, tokenizer: Tokenizer, inputs: TemplateInputs, origin: str
) -> list[Block]:
    """The blocks of the rendering in `written`, found by marks that each writes around itself."""
    called = with_marks(template)
    rendered = render(written.messages, tokenizer, origin, inputs=inputs, chat_template=called)
    pieces = _MARK.split(rendered)  # text, side, text, side, ..., text
    if "".join(pieces[::2]) != written.whole:
        raise Undecided(
            f"{origin}: the chat template writes this conversation otherwise where its "
            "{% generation %} blocks are looked at; give another data.chat_template"
        )
    blocks: list[Block] = []
    position, open_at, depth = 0, 0, 0
    for text, side in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        position += len(text)
        if side == "0":
            open_at = open_at if depth else position
            depth += 1
        elif side == "1":
            depth -= 1
            if not depth and position > open_at:
                message = _message_in(written, open_at, position)
                if message is None:
                    message = blocks[-1].message if blocks else _first_answer(written)
                blocks.append(Block(open_at, position, message))
    return blocks


def _message_in(written: Written, start: int, end: int) -> int | None:
    """The assistant's message with text in [start, end)."""
    for mark in written.marked.marks:
        message = written.leaves[mark.leaf].message
        is_answer = written.messages[message]["role"] == "assistant"
        if is_answer and mark.opens and start <= mark.position < end:
            return message
    return None


def _first_answer(written: Written) -> int:
    roles = [message["role"] for message in written.messages]
    return roles.index("assistant") if "assistant" in roles else 0


def _call(tag: re.Match[str]) -> str:
    return f"{tag[1]}{'endcall' if tag[2] else f'call {_NAME}()'}{tag[3]}"
