"""The form of messages that a chat template takes, found by rendering.

Templates differ in what they take: arguments of a call as JSON text or as a mapping, content as
text or as a list of parts, a call without content or with an empty one. The form that a record
has is tried first. A form is right if the template writes all that the messages say, and a
mapping neither as Python spells it nor text as JSON within JSON.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from lora_engine.data.inputs import TemplateInputs
from lora_engine.data.marks import (
    EVERY,
    NOTHING,
    SAID,
    UNNAMED,
    Leaf,
    Mark,
    Marked,
    Marker,
    read_marks,
)
from lora_engine.data.template import Message, Tokenizer, Undecided, render, try_render
from lora_engine.errors import UserError

_Form = Callable[[Message], Message]
# A part of a content as Python or JSON spells it.
_PART = re.compile(r"""(["'])type\1: *(["'])text\2""", re.IGNORECASE)


@dataclass(frozen=True)
class Written:
    """Messages in the form that the template takes, as it writes them.

    whole: the rendering.
    marked: the same with the marks; the places of leaves that `levels` leaves out are not known.
    leaves: what is marked, by its number.
    """

    messages: Sequence[Message]
    whole: str
    marked: Marked
    leaves: Sequence[Leaf]
    levels: Sequence[int]

    def unwritten(self, marks: Sequence[Mark] | None = None) -> list[Leaf]:
        """Leaves with text that `marks`, those of the whole rendering by default, do not show.

        The name of a function counts only where nothing else of its call is written.
        """
        seen = {mark.leaf for mark in (self.marked.marks if marks is None else marks)}
        called = {leaf[:3] for i, leaf in enumerate(self.leaves) if i in seen}
        return [
            leaf
            for i, leaf in enumerate(self.leaves)
            if i not in seen and not leaf.blank and not (leaf.is_name and leaf[:3] in called)
        ]


def write(
    messages: Sequence[Message], tokenizer: Tokenizer, inputs: TemplateInputs, origin: str
) -> Written:
    """The messages in the first form that the template writes well, or else most of.

    Raises the template's error of the first form that it refuses if it writes none rightly, or an
    Undecided where it refuses none.
    """
    found: list[Written] = []
    refused: UserError | None = None
    for candidate in _forms(messages):
        try:
            written = write_as_is(candidate, tokenizer, inputs, origin)
        except Undecided as error:
            refused = refused or error
            continue
        if not _unwritten(written) and not _is_misspelled(written):
            return written
        found.append(written)
    rightly = [written for written in found if not _is_misspelled(written)]
    if rightly:
        return min(rightly, key=_unwritten)
    raise refused or Undecided(
        f"{origin}: the chat template writes contents, or arguments of calls, as Python spells "
        "them, or as JSON within JSON; give another data.chat_template"
    )


def write_as_is(
    messages: Sequence[Message], tokenizer: Tokenizer, inputs: TemplateInputs, origin: str
) -> Written:
    """The rendering of the messages, with the places of as much of them as can be seen."""
    whole = render(messages, tokenizer, origin, inputs=inputs)

    def marked_by(levels: Sequence[int]) -> Written | None:
        marker = Marker(levels)
        rendered = try_render(marker.mark(messages), tokenizer, inputs=inputs)
        if rendered is None or (marked := read_marks(rendered)).text != whole:
            return None
        return Written(
            messages=messages, whole=whole, marked=marked, leaves=marker.leaves, levels=levels
        )

    count = len(messages)
    for level in (EVERY, UNNAMED, SAID):
        if written := marked_by([level] * count):
            return written
    levels = [NOTHING] * count  # the template looks at some text: each message by itself
    for i in range(count):
        for level in (EVERY, UNNAMED, SAID):
            if marked_by([level if j == i else NOTHING for j in range(count)]):
                levels[i] = level
                break
    none = [NOTHING] * count
    return marked_by(levels) or Written(
        messages=messages, whole=whole, marked=Marked(whole, ()), leaves=(), levels=none
    )


def _unwritten(written: Written) -> int:
    """How much of what is said, reasoning aside, the template leaves out or writes unseen."""
    unseen = sum(
        level == NOTHING and _says_something(message)
        for level, message in zip(written.levels, written.messages, strict=True)
    )
    return unseen + sum(leaf.part != "reasoning" for leaf in written.unwritten())


def _says_something(message: Message) -> bool:
    content = message.get("content")
    said = content.strip() if isinstance(content, str) else content
    return bool(said or message.get("tool_calls"))


def _is_misspelled(written: Written) -> bool:
    """Whether the template writes parts of contents, or arguments, as if they were the other."""
    for message in written.messages:
        if isinstance(message.get("content"), list | tuple) and _PART.search(written.whole):
            return True
        for arguments in _arguments_in(message):
            if any(spelled in written.whole for spelled in _misspelled(arguments)):
                return True
    return False


def _misspelled(arguments: object) -> Iterator[str]:
    """What a template writes that takes the other form of these arguments."""
    if isinstance(arguments, Mapping) and arguments:
        yield str(arguments)
    elif isinstance(arguments, str) and '"' in arguments:
        yield json.dumps(arguments)[1:-1]
        yield json.dumps(arguments, ensure_ascii=False)[1:-1]


def _forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The messages as they are, then in other forms, without repeating one."""
    seen: list[list[Message]] = []
    arguments: list[_Form] = [
        _as_is,
        partial(_with_arguments, as_text=False),
        partial(_with_arguments, as_text=True),
    ]
    contents: list[_Form] = [_as_is, _with_text, _with_parts]
    absents: list[_Form] = [_as_is, _with_content]
    choices = product(enumerate(arguments), enumerate(contents), enumerate(absents))
    nearest = sorted(choices, key=lambda of: sum(place for place, _ in of))
    for (_, of_arguments), (_, of_content), (_, of_absent) in nearest:
        candidate = [of_absent(of_content(of_arguments(message))) for message in messages]
        if candidate not in seen:
            seen.append(candidate)
            yield candidate


def _as_is(message: Message) -> Message:
    return message


def _with_text(message: Message) -> Message:
    """Parts that are all text, as one text."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        return message
    return {**message, "content": "".join(map(str, texts))}


def _with_parts(message: Message) -> Message:
    """A text as a list of one part."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _with_content(message: Message) -> Message:
    """A call without text, as one with an empty text."""
    return {"content": "", **message} if message.get("tool_calls") else message


def _with_arguments(message: Message, *, as_text: bool) -> Message:
    """Arguments of calls as JSON text, or as a mapping."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return message
    return {**message, "tool_calls": [_call(call, as_text) for call in calls]}


def _call(call: object, as_text: bool) -> object:
    if not isinstance(call, Mapping):
        return call
    if isinstance(function := call.get("function"), Mapping):
        return {**call, "function": _call(function, as_text)}
    if "name" not in call:
        return call
    arguments = call.get("arguments")
    if as_text and not isinstance(arguments, str):
        return {**call, "arguments": json.dumps(arguments or {}, ensure_ascii=False)}
    if not as_text and not isinstance(arguments, Mapping):
        mapping = _mapping(arguments)
        return call if mapping is None else {**call, "arguments": mapping}
    return call


def _mapping(arguments: object) -> Mapping[str, object] | None:
    """What JSON text of an object says; none for text that is not one."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, Mapping) else None


def _arguments_in(message: Message) -> Iterator[object]:
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list | tuple) else ():
        if isinstance(call, Mapping):
            function = call.get("function")
            yield (function if isinstance(function, Mapping) else call).get("arguments")
