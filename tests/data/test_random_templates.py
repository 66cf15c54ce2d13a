"""Random conversations by random templates: what is supervised is exactly what was asked for.

A style is written twice: as a template, and as Python that says what is learned of each message.
"""

import json
from dataclasses import dataclass

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from known_turns import learned, make_bytewise

from lora_engine.data.chat import LossOn
from lora_engine.data.encode import Encoder
from lora_engine.data.records import Record
from lora_engine.data.render import tokenize
from lora_engine.data.template import Undecided

OPEN, CLOSED = "<think>\n", "<think>\n\n</think>\n\n"
CONTROL = ("<|user|>", "<|bot|>", "<|tool|>", "<|system|>", "<|end|>", "<|close|>", "<|stop|>")


@dataclass(frozen=True)
class Style:
    """How a template writes.

    end: what ends a turn; "": the next role's mark.
    trims: contents without the white space around them.
    thinks: in which answers a thought is shown: "last" are those behind the last question.
    empty: whether an answer without a thought behind the last question has an empty one.
    prompt: what the generation prompt writes behind the role's mark.
    greets: whether a system message is written where the conversation has none.
    text_calls: whether arguments are written as text is, or as JSON.
    """

    end: str
    trims: bool
    thinks: str
    empty: bool
    prompt: str
    greets: bool
    text_calls: bool

    def template(self) -> str:
        """The style as Jinja."""
        content = "(m['content'] or '')" + (" | trim" if self.trims else "")
        shown = {"never": "false", "last": "loop.index0 > ns.last", "always": "true"}[self.thinks]
        arguments = "f['arguments']" + ("" if self.text_calls else " | tojson")
        end = json.dumps(self.end)
        empty = f"{{{{ {json.dumps(CLOSED)} }}}}" if self.empty else ""
        greeting = "{% if messages[0]['role'] != 'system' %}<|system|>Hello.{{ end }}{% endif %}"
        return (
            f"{{% set end = {end} %}}{{% set ns = namespace(last=-1) %}}{{% for m in messages %}}"
            "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
            + (greeting if self.greets else "")
            + "{% for m in messages %}{% if m['role'] == 'assistant' %}<|bot|>"
            f"{{% if m['reasoning_content'] and {shown} %}}"
            "{{ '<think>\n' + m['reasoning_content'] + '\n</think>\n\n' }}"
            f"{{% elif loop.index0 > ns.last %}}{empty}{{% endif %}}{{{{ {content} }}}}"
            "{% for c in m['tool_calls'] or [] %}{% set f = c['function'] %}"
            f"{{{{ '<call>' + f['name'] + ' ' + {arguments} + '</call>' }}}}{{% endfor %}}"
            f"{{% else %}}<|{{{{ m['role'] }}}}|>{{{{ {content} }}}}{{% endif %}}{{{{ end }}}}"
            "{% endfor %}{% if add_generation_prompt %}"
            f"{{{{ '<|bot|>' + {json.dumps(self.prompt)} }}}}{{% endif %}}"
        )

    def said(self, messages: list[dict], index: int) -> str:
        """What the assistant writes in a message, but for the end."""
        message = messages[index]
        is_last = all(m["role"] != "user" for m in messages[index:])
        thought, shown = message.get("reasoning_content"), self.thinks == "always" or is_last
        said = self.content(message)
        if thought and shown and self.thinks != "never":
            said = f"<think>\n{thought}\n</think>\n\n{said}"
        elif is_last and self.empty:
            said = CLOSED + said
        for each in message.get("tool_calls") or []:
            function = each["function"]
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            said += f"<call>{function['name']} {arguments}</call>"
        return said

    def content(self, message: dict) -> str:
        """A content as it is written."""
        return message["content"].strip() if self.trims else message["content"]

    def learns(self, messages: list[dict], index: int) -> str:
        """What is learned of a message: without what the prompt writes, with what ends it."""
        said = self.said(messages, index)
        for prompt in (self.prompt, OPEN if self.prompt else ""):
            if said.startswith(prompt):
                said = said.removeprefix(prompt)
                break
        if self.end:
            return said + self.end.rstrip()
        role = messages[index + 1]["role"] if index + 1 < len(messages) else "user"
        if index + 1 == len(messages) and messages[index].get("tool_calls"):
            role = "tool"
        return said if role == "assistant" else f"{said}<|{role}|>"

    def whole(self, messages: list[dict]) -> str:
        """The rendering."""
        made = f"<|system|>Hello.{self.end}" if self.greets and not is_system(messages[0]) else ""
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                made += f"<|bot|>{self.said(messages, index)}{self.end}"
            else:
                made += f"<|{message['role']}|>{self.content(message)}{self.end}"
        return made


def is_system(message: dict) -> bool:
    return message["role"] == "system"


STYLES = st.builds(
    Style,
    end=st.sampled_from(
        ["<|end|>\n", "<|close|><|stop|>", "</s>", " </s>\n", "### END\n", "<done>\n", ""]
    ),
    trims=st.booleans(),
    thinks=st.sampled_from(["never", "last", "always"]),
    empty=st.booleans(),
    prompt=st.sampled_from(["", OPEN, CLOSED]),
    greets=st.booleans(),
    text_calls=st.booleans(),
)
# Few texts, of which many are alike and look like what templates write around them.
PIECES = [
    "a",
    "Yes.",
    " ",
    "\n",
    "é🙂漢",
    "7",
    "<b>",
    "</b>",
    "### END",
    "<call>",
    "x < y",
    "{",
    '"',
]
TEXTS = st.lists(st.sampled_from([*PIECES, *CONTROL, "</s>"]), max_size=4).map("".join)
THOUGHTS = TEXTS.map(lambda text: f"hm {text} so")
ARGUMENTS = st.dictionaries(st.sampled_from(["in", "at"]), st.sampled_from([1, True, "Bern", "é"]))
CALLS = st.lists(
    st.builds(
        lambda arguments: {"type": "function", "function": {"name": "f", "arguments": arguments}},
        ARGUMENTS,
    ),
    max_size=2,
)


@st.composite
def conversations(draw) -> list[dict]:
    """Messages of any roles in any order, with an answer among them."""
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    roles = st.sampled_from(["user", "assistant", "assistant", "tool"])
    for role in draw(st.lists(roles, min_size=1, max_size=6).filter(lambda r: "assistant" in r)):
        message = {"role": role, "content": draw(TEXTS)}
        if role == "assistant":
            if thought := draw(st.none() | THOUGHTS):
                message["reasoning_content"] = thought
            if calls := draw(CALLS):
                message["tool_calls"] = calls
            # An answer that ends itself is no text to be spelled out; see test_control.
            message["content"] = message["content"].rstrip() + draw(
                st.sampled_from(["", ".", ". "])
            )
            assume(not message["content"].rstrip().endswith((*CONTROL, "</s>")))
        messages.append(message)
    return messages


TOKENIZERS: dict[Style, Encoder] = {}


def encoder_of(style: Style) -> Encoder:
    if style not in TOKENIZERS:
        TOKENIZERS[style] = Encoder(make_bytewise(style.template(), CONTROL))
    return TOKENIZERS[style]


@settings(max_examples=250, deadline=None)
@given(style=STYLES, messages=conversations(), loss_on=st.sampled_from(["assistant", "completion"]))
def test_exactly_what_was_asked_for_is_learned(style, messages, loss_on: LossOn):
    encoder = encoder_of(style)
    tokenizer = encoder.tokenizer
    record = Record("messages", tuple(messages), origin="a:1")
    asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if loss_on == "completion":
        answers = [i for i in answers if i > asked]
    hidden = [i for i in answers if i > asked and messages[i].get("reasoning_content")]
    try:
        example = tokenize(record, tokenizer, encoder=encoder, loss_on=loss_on)
    except Undecided as refused:
        assert style.thinks == "never" and hidden, refused
        return
    assert style.thinks != "never" or not hidden
    whole = style.whole(messages)
    added, last = "", len(messages) - 1
    if not style.end and last in answers:
        added = style.learns(messages, last)[-len("<|user|>") :]
    assert tokenizer.decode(example.input_ids) == whole + added
    assert "".join(learned(example, tokenizer)) == "".join(
        style.learns(messages, i) for i in answers
    )
