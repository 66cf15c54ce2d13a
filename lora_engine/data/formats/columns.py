"""The user's own columns: `data.columns` says which is what, `data.template` makes text of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_engine.data.fields import kind_of
from lora_engine.data.formats.base import COMMON, FOR_TEMPLATES, Fields
from lora_engine.data.strings import field_name
from lora_engine.errors import UserError, nearest

# What a template can write, and columns that hold the answer to what it asks.
WRITTEN = ("text", "prompt", "completion", "user", "assistant", "system")
_ANSWERS = ("answer", "response", "output", "completion", "assistant")
# "{column}", or a doubled brace that stands for one.
_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Layout:
    """What the user says of records; None leaves it to be recognised.

    format: name of a format.
    columns: from what a field is called here to the column that holds it. A dot steps into an
        object or, with a number, into a list.
    template: text with "{column}" in it, of the field that it makes; a text alone is what the user
        says, or the prompt or text that `format` has.
    """

    format: str | None = None
    columns: Mapping[str, str] | None = None
    template: str | Mapping[str, str] | None = None

    def templates(self) -> Mapping[str, str]:
        """The templates by the field that they make."""
        if self.template is None or not isinstance(self.template, str):
            return self.template or {}
        of_format = {"text": "text", "prompt-completion": "prompt", "prompts": "prompt"}
        return {of_format.get(self.format or "", "user"): self.template}

    def check(self, fields: Sequence[str]) -> None:
        """Raises UserError for a field that no format has, and for a broken template."""
        for field in self.columns or ():
            if field not in fields:
                close = nearest(field, fields)
                meant = f"; did you mean {close}?" if close else f"; it takes {', '.join(fields)}"
                raise UserError(f"columns: {field!r} is no field of any format{meant}")
        for field, template in self.templates().items():
            if field not in WRITTEN:
                raise UserError(f"template: makes {field!r}, expected one of {', '.join(WRITTEN)}")
            if field in (self.columns or {}):
                raise UserError(f"give {field!r} either in columns or in template, not both")
            if not columns_in(template):
                raise UserError(
                    f"template: names no column, expected {{column}} in {template!r:.60}"
                )


# Nothing is said: formats are recognised.
RECOGNISED = Layout()


def columns_in(template: str) -> list[str]:
    """The columns that a template names."""
    return [match[1] for match in _PLACE.finditer(template) if match[1] is not None]


def laid_out(row: Fields, layout: Layout) -> tuple[dict[str, object], set[str]]:
    """The row's fields by the names that formats know, and the columns they come from."""
    columns = dict(layout.columns or {})
    used = set(columns.values())
    made: dict[str, object] = {}
    for field, template in layout.templates().items():
        made[field] = fill(template, row)
        used |= set(columns_in(template))
    if "user" in made or "prompt" in made:
        answer = "assistant" if "user" in made else "completion"
        wanted = layout.format != "prompts" and answer not in made and answer not in columns
        if wanted:
            columns[answer] = _answer_column(row, used, answer)
            used.add(columns[answer])
    for field, column in columns.items():
        if (value := look_up(row, column)) is not None:
            made[field] = value
    for field in (*COMMON, *FOR_TEMPLATES, *(["system"] if "user" in made else [])):
        if field not in made and row.get(field) is not None:
            made[field] = row[field]
            used.add(field)
    return made, used | {column.partition(".")[0] for column in used}


def _answer_column(row: Fields, used: set[str], answer: str) -> str:
    there = [name for name in _ANSWERS if row.get(name) is not None and name not in used]
    if len(there) != 1:
        found = f"has {' and '.join(map(repr, there))}" if there else "none is called so"
        raise UserError(
            f"which column answers data.template? {found}; say data.columns: {{{answer}: COLUMN}}, "
            "or data.format: text to learn all that the template writes"
        )
    return there[0]


def fill(template: str, row: Fields) -> str:
    """The template with its columns' values: text, numbers, and nothing for null."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0][0]
        if name not in row and look_up(row, name) is None:
            there = ", ".join(map(field_name, row))
            close = nearest(name, map(str, row))
            meant = f"did you mean {close}?" if close else f"there is {there}"
            raise UserError(f"data.template names the column {name!r}, which it lacks; {meant}")
        found = look_up(row, name)
        if found is None:
            return ""
        if not isinstance(found, str | int | float):
            raise UserError(f"data.template: column {name!r} must be text, got {kind_of(found)}")
        return str(found)

    return _PLACE.sub(value, template)


def look_up(row: Fields, column: str) -> object:
    """The value of a column; "a.0.b" steps into objects and lists. None where there is none."""
    if column in row:
        return row[column]
    value: object = row
    for part in column.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list | tuple) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value
