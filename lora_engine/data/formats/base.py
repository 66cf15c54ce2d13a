"""What a format is, and what the formats share: fields that hold something, text, problems."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from lora_engine.data.fields import kind_of
from lora_engine.errors import UserError

Fields: TypeAlias = Mapping[str, object]

# Read beside the fields of any format.
COMMON = ("adapter", "weight")
# As the fields of a format: those that it does not know are kept for rewards.
EVERY = ("*",)
# What a chat template takes beside the messages.
FOR_TEMPLATES = ("tools", "documents", "chat_template_kwargs")
_TRUTH = {
    **dict.fromkeys(("true", "yes", "1", "1.0"), True),
    **dict.fromkeys(("false", "no", "0", "0.0"), False),
}


@dataclass(frozen=True)
class Format:
    """One shape of records.

    name: as `data.format` gives it.
    needs: its fields, in words.
    fits: whether a row, of which only the fields that hold something are given, has this shape.
    read: the row as one of the kinds. Raises UserError, without the row's place.
    fields: those that `read` looks at; others of a row are named as not read.
    over: formats that may fit the same row and of which this one reads all fields, and more.
    """

    name: str
    needs: str
    fits: Callable[[Fields], bool]
    read: Callable[[Fields], dict[str, object]]
    fields: tuple[str, ...]
    over: tuple[str, ...] = ()


def is_empty(value: object) -> bool:
    """Whether a cell holds nothing: null, or a string, list or object of no length."""
    return value is None or (isinstance(value, str | bytes | list | tuple | Mapping) and not value)


def text_field(row: Fields, field: str) -> str:
    """The string in `field`; "" where it holds nothing."""
    value = row.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{field!r} must be a string, got {kind_of(value)}")
    return value


def truth(value: object) -> bool | None:
    """A value that says yes or no, as CSV, Parquet and JSON spell it; None for any other."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    return _TRUTH.get(value.strip().lower()) if isinstance(value, str) else None


def parse_json(text: str, what: str) -> object:
    """The value that a JSON text in a field spells."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is text that is not valid JSON") from error


def joined(*parts: str) -> str:
    """The parts that hold something, a line end between them."""
    return "\n".join(part for part in parts if part)
