"""The fields of one row as what a record holds: strings and messages, or a line about a mistake."""

from collections.abc import Mapping
from typing import TypeAlias

from lora_engine.data.strings import check_string, check_strings, field_name
from lora_engine.errors import UserError

Messages: TypeAlias = tuple[Mapping[str, object], ...]
_NAMED = 4  # fields named of a message that lacks one
_PLAIN, _ROLES = {"role", "content"}, ("system", "user", "assistant", "tool")


def messages_of(value: object, origin: str, field: str = "messages") -> Messages:
    """A field's chat, checked. Raises UserError "origin: what is wrong"."""
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{origin}: {field!r} must be a non-empty list, got {kind_of(value)}")
    of = "" if field == "messages" else f"{field!r}, "
    return tuple(_message(m, f"{origin}: {of}message {i}") for i, m in enumerate(value, start=1))


def _message(message: object, where: str) -> Mapping[str, object]:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: expected an object, got {kind_of(message)}")
    is_plain = message.keys() == _PLAIN and message["role"] in _ROLES
    if is_plain and isinstance(content := message["content"], str):  # as most are
        check_string(content, where)
        return message
    check_strings(message, where)
    # Columnar files spell an absent field as null.
    message = {key: value for key, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise UserError(
            f"{where}: 'role' must be a string such as 'user', got {kind_of(role)}{_has(message)}"
        )
    if content is None and message.get("tool_calls"):
        return message
    if not isinstance(content, str):
        raise UserError(
            f"{where}: 'content' must be a string, got {kind_of(content)}{_has(message)}"
        )
    return message


def _has(message: Mapping[str, object]) -> str:
    """'; it has 'speaker' and 'text'': what may have been meant instead."""
    others = [repr(field_name(key)) for key in message if key not in _PLAIN]
    return f"; it has {' and '.join(others)}" if 0 < len(others) <= _NAMED else ""


def string_of(row: Mapping[str, object], field: str, origin: str) -> str:
    """A field's text, checked. Raises UserError "origin: what is wrong"."""
    value = row[field]
    if not isinstance(value, str):
        raise UserError(f"{origin}: {field!r} must be a string, got {kind_of(value)}")
    check_string(value, f"{origin}: {field!r}")
    return value


def kind_of(value: object) -> str:
    """What a value is, without the value: the same mistake in many records is told once."""
    names = {str: "a string", list: "a list", dict: "an object", type(None): "nothing"}
    names |= {int: "a number", float: "a number", bool: "true or false"}
    if isinstance(value, list | tuple) and not value:
        return "an empty list"
    return names.get(type(value), f"{type(value).__name__} {value!r}"[:60])
