"""What is said of a row that has no format, or whose answer may stand in a field that nobody reads.

A guess is only told: what a field's name means is the user's to say, with `data.columns`.
"""

from collections.abc import Iterator, Mapping, Sequence

from lora_engine.data.formats.base import Fields, is_empty
from lora_engine.data.formats.chat import ROLES, is_conversation
from lora_engine.data.strings import field_name
from lora_engine.errors import nearest

# Names in small letters of what is asked and of what answers it, the likeliest first.
ASKING = (
    *("instruction", "question", "query", "problem", "prompt", "user", "input", "inputs"),
    *("input_text", "dialogue", "document", "article", "source_text"),
)
ANSWERING = (
    *("response", "output", "completion", "solution", "answer", "assistant", "target", "targets"),
    *("output_text", "code", "summary", "highlights", "answers", "ideal", "canonical_solution"),
)
_LIKE = 0.8  # of a name that was meant for another
_DEEP = 4  # levels of objects and lists in which a conversation is looked for


def hint(fields: Fields) -> str:
    """How to say what the fields of a row of no format are."""
    inside = dict(_conversations(fields, ""))
    asking, answering = _named(fields, ASKING), _named(fields, ANSWERING)
    if len(inside) == 1:
        ((place, messages),) = inside.items()
        columns = f"messages: {place}"
        if answering and not _has_answer(messages):
            columns = f"prompt: {place}, completion: {answering}"
        return f"if {place!r} is the conversation, say data.columns: {{{columns}}}"
    for name, value in fields.items():
        close = nearest(str(name), ("messages", "conversations", "completion", "text"), _LIKE)
        kind = str if close in ("completion", "text") else list
        if close and close != name and isinstance(value, kind) and not inside:
            shown = field_name(name)
            return f"did you mean {close}? Or data.columns: {{{close}: {shown}}}"
    if asking and answering:
        system = _named(fields, ("system", "system_prompt"))
        first = f"system: {system}, " if system else ""
        return f"say data.columns: {{{first}user: {asking}, assistant: {answering}}}, if it is that"
    return (
        "say what they are with data.columns, as in {user: COLUMN, assistant: COLUMN}, or "
        "{text: COLUMN} to learn a text as it stands"
    )


def answer_in(fields: Fields, read: tuple[str, ...] = ()) -> str | None:
    """The field beside those that are read whose name says that it holds an answer."""
    return _named({k: v for k, v in fields.items() if k not in read}, ANSWERING)


def _named(fields: Fields, names: tuple[str, ...]) -> str | None:
    """The field with text of one of the names."""
    there = {
        str(field).lower(): field_name(field)
        for field, value in fields.items()
        if isinstance(value, str) and value.strip()
    }
    return next((there[name] for name in names if name in there), None)


def _has_answer(messages: Sequence[Fields]) -> bool:
    """Whether the assistant says one of the messages."""
    roles = (str(message.get("role") or message.get("from")).lower() for message in messages)
    return any(ROLES.get(role, role) == "assistant" for role in roles)


def _conversations(value: object, path: str) -> Iterator[tuple[str, Sequence[Fields]]]:
    """Lists of messages, and where they stand, as `data.columns` names the place."""
    if path and isinstance(value, list | tuple) and is_conversation(value):
        yield field_name(path), value
    elif path.count(".") < _DEEP:
        inner: Iterator[tuple[object, object]] = iter(())
        if isinstance(value, Mapping):
            inner = iter(value.items())
        elif isinstance(value, list | tuple):
            inner = iter(enumerate(value[:1]))
        for key, held in inner:
            if not is_empty(held):
                yield from _conversations(held, f"{path}.{key}" if path else str(key))
