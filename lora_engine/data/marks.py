"""Marks around what messages say, to see in a rendering where a template writes it.

A mark is a number, which no filter of a template changes, at the beginning or the end of a run of
text: a stretch without a tag such as `</think>`, which templates look for, and without the white
space around it, which they strip. A rendering without its marks has to be the rendering of the
messages without them; otherwise the template looks at the text, and the marks show nothing.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lora_engine.data.template import Message

Part = Literal["text", "reasoning", "call"]
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_HEAD, _TAIL = "61803398874989484820", "27182845"
_MARK = re.compile(f"{_HEAD}([0-9]{{6}})([01]){_TAIL}")
_MOST_RUNS = 200  # of one string; one with more is marked as a whole
TAG = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]{2,40}\]")
END_OF_REASONING = re.compile(
    r"</[\w:]*(?:think|thought|reason)\w*>|\[/THINK\]|<channel\|>|<\|END_THINKING\|>", re.IGNORECASE
)


# What of a message is marked: every string; not the names of functions, which templates look up;
# nor texts that are empty, nor where a text ends in a tag; nothing.
EVERY, UNNAMED, SAID, NOTHING = 3, 2, 1, 0


class Leaf(NamedTuple):
    """A run of text of a message.

    call: which of its calls, of part "call". is_name: it is the name of the function.
    blank: it is empty.
    """

    message: int
    part: Part
    call: int = 0
    is_name: bool = False
    blank: bool = False


class Mark(NamedTuple):
    """Where a leaf, by its number, begins (`opens`) or ends in a rendering without marks."""

    position: int
    leaf: int
    opens: bool


@dataclass(frozen=True)
class Marked:
    """A rendering without its marks, and the marks in their order."""

    text: str
    marks: tuple[Mark, ...]


class Marker:
    """Marks messages; numbers what it marks.

    levels: what is marked of each message: EVERY, UNNAMED, SAID or NOTHING.
    leaves: what has been marked, by number.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        self._levels = levels
        self.leaves: list[Leaf] = []

    def mark(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with marks in what they say, and in the arguments of calls."""
        self.leaves = []
        return [self._message(i, message) for i, message in enumerate(messages)]

    def _message(self, index: int, message: Message) -> Message:
        if not self._levels[index]:
            return message
        made = dict(message)
        for key in REASONING_KEYS:
            if isinstance(text := message.get(key), str):
                made[key] = self._string(text, Leaf(index, "reasoning"))
        content = message.get("content")
        if isinstance(content, str):
            ends = message.get("role") == "assistant" and self._levels[index] > SAID
            made["content"] = self._string(content, Leaf(index, "text"), ends=ends)
        elif isinstance(content, list | tuple):
            made["content"] = [self._content_part(part, index) for part in content]
        calls = message.get("tool_calls")
        if isinstance(calls, list | tuple):
            made["tool_calls"] = [self._call(call, index, i) for i, call in enumerate(calls)]
        if isinstance(call := message.get("function_call"), Mapping):
            made["function_call"] = self._call(call, index, 0)
        return made

    def _content_part(self, part: object, index: int) -> object:
        if isinstance(part, Mapping) and isinstance(text := part.get("text"), str):
            return {**part, "text": self._string(text, Leaf(index, "text"))}
        return part

    def _call(self, call: object, index: int, number: int) -> object:
        if not isinstance(call, Mapping):
            return call
        if isinstance(function := call.get("function"), Mapping):
            return {**call, "function": self._call(function, index, number)}
        leaf = Leaf(index, "call", number)
        return {
            key: self._value(value, leaf._replace(is_name=key == "name"))
            if key in ("arguments", "parameters")
            or (key == "name" and self._levels[index] == EVERY)
            else value
            for key, value in call.items()
        }

    def _value(self, value: object, leaf: Leaf) -> object:
        if isinstance(value, str):
            return self._string(value, leaf) if value.strip() else value
        if isinstance(value, Mapping):
            return {key: self._value(inner, leaf) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(inner, leaf) for inner in value]
        return value

    def _string(self, text: str, leaf: Leaf, *, ends: bool = False) -> str:
        """The text with marks; ends: with an empty leaf behind a tag at its end."""
        if not text.strip():
            if self._levels[leaf.message] <= SAID:
                return text
            return text + self._around("", leaf._replace(blank=True))
        thought_end = 0
        if leaf.part == "text":
            thought_end = max((m.end() for m in END_OF_REASONING.finditer(text)), default=0)
        made, end = [], 0
        for start, stop in _runs(text):
            part: Part = "reasoning" if stop <= thought_end else leaf.part
            made += [text[end:start], self._around(text[start:stop], leaf._replace(part=part))]
            end = stop
        rest = text[end:]
        if ends and rest.strip():
            blank = len(rest) - len(rest.rstrip())
            made.append(rest[: len(rest) - blank])
            made.append(self._around("", leaf._replace(blank=True)))
            rest = rest[len(rest) - blank :]
        return "".join([*made, rest])

    def _around(self, text: str, leaf: Leaf) -> str:
        number = len(self.leaves)
        self.leaves.append(leaf)
        return f"{_HEAD}{number:06}0{_TAIL}{text}{_HEAD}{number:06}1{_TAIL}"


def read_marks(rendered: str) -> Marked:
    """A rendering of marked messages, without its marks, and where they stood."""
    pieces = _MARK.split(rendered)  # text, number, side, text, number, side, ..., text
    texts, marks, position = [pieces[0]], [], len(pieces[0])
    for i in range(1, len(pieces), 3):
        marks.append(Mark(position, int(pieces[i]), pieces[i + 1] == "0"))
        texts.append(pieces[i + 2])
        position += len(pieces[i + 2])
    return Marked("".join(texts), tuple(marks))


def _runs(text: str) -> Iterator[tuple[int, int]]:
    """Begin and end of what is to be marked in a text that is not blank."""
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
    found, position = [], begin
    for tag in TAG.finditer(text, begin, end):
        found.append((position, tag.start()))
        position = tag.end()
    found.append((position, end))
    cores = [_core(text, *span) for span in found]
    runs = [(start, stop) for start, stop in cores if start < stop]
    yield from runs if 0 < len(runs) <= _MOST_RUNS else [(begin, end)]


def _core(text: str, start: int, stop: int) -> tuple[int, int]:
    inner = text[start:stop]
    return start + len(inner) - len(inner.lstrip()), stop - len(inner) + len(inner.rstrip())
