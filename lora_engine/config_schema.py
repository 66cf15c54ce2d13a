"""What the configuration models say about themselves: expected values, errors, the reference."""

import types
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from lora_engine.errors import nearest

FieldPath = tuple[str | int, ...]

NAME = "NAME"

_NAMES = {
    Any: "values",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
}


def dotted(path: FieldPath) -> str:
    """`train.max_steps` for ("train", "max_steps")."""
    return ".".join(map(str, path))


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as `TrainConfig` or `LoraConfig | None`."""
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None


def named_sections_of(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as `dict[str, AdapterConfig] | None`."""
    for member in _members(annotation):
        if get_origin(member) is dict and (section := section_of(get_args(member)[1])):
            return section
    return None


def fields(model: type[BaseModel], prefix: FieldPath = ()) -> Iterator[tuple[FieldPath, FieldInfo]]:
    """Every key of `model`, sections before their own keys; NAME stands for a name to be given."""
    for name, info in model.model_fields.items():
        yield (*prefix, name), info
        if section := section_of(info.annotation):
            yield from fields(section, (*prefix, name))
        elif section := named_sections_of(info.annotation):
            yield (*prefix, name, NAME), FieldInfo.from_annotation(section)
            yield from fields(section, (*prefix, name, NAME))


def field_at(
    model: type[BaseModel], loc: Sequence[str | int]
) -> tuple[FieldPath, FieldInfo | None]:
    """The key an error location is about, and its field (None: no such key).

    pydantic appends the branch of a union, the index in a list and, for a name, [key]; all are
    dropped.
    """
    path: FieldPath = ()
    info: FieldInfo | None = None
    section: type[BaseModel] | None = model
    for part in loc:
        named = named_sections_of(info.annotation) if info else None
        if (section is None and named is None) or part == "[key]":
            break
        path = (*path, part)
        if named is not None:
            info = FieldInfo.from_annotation(named)
        else:
            assert section is not None
            info = section.model_fields.get(str(part))
        if info is None:
            break
        section = section_of(info.annotation)
    return path, info


def expected(info: FieldInfo) -> str:
    """In words, the values a key takes: "a whole number ≥ 1 or null"."""
    members = list(dict.fromkeys(_member_name(m) for m in _members(info.annotation)))
    members.sort(key=lambda name: name == "null")
    limits = " and ".join(_limits(info))
    if limits:
        members[0] = f"{members[0]} {limits}"
    return " or ".join(members)


def describe_problems(
    model: type[BaseModel], problems: Sequence[ErrorDetails]
) -> tuple[FieldPath, str, int]:
    """Key path and line about the first of pydantic's errors; how many other keys have one.

    A missing key comes last: it is often there, misspelt, among the unknown ones.
    """
    path, message = _describe(model, min(problems, key=lambda p: p["type"] == "missing"))
    return path, message, len({field_at(model, p["loc"])[0] for p in problems}) - 1


def find_switch_for_number(
    model: type[BaseModel], values: dict[str, Any]
) -> tuple[FieldPath, str] | None:
    """A true/false (YAML's yes, no, on, off too) given for a number, which pydantic takes as 1, 0.

    Returns its key path and a line about it.
    """
    for key, info in fields(model):
        for path, value in _given(values, key):
            if isinstance(value, bool) and not {bool, str} & set(_members(info.annotation)):
                if section_of(info.annotation) or _choices(info.annotation):
                    continue  # pydantic refuses these by itself
                return path, _mismatch(path, info, value)
    return None


def _given(values: Any, path: FieldPath) -> Iterator[tuple[FieldPath, Any]]:
    """The values at `path`, NAME standing for any name, each with its own path."""
    if not path:
        yield (), values
    elif isinstance(values, dict):
        for key in values if path[0] == NAME else (path[0],):
            for rest, value in _given(values.get(key), path[1:]):
                yield (key, *rest), value


def _describe(model: type[BaseModel], problem: ErrorDetails) -> tuple[FieldPath, str]:
    path, info = field_at(model, problem["loc"])
    key = dotted(path)
    if problem["type"] == "extra_forbidden":
        return path, _unknown_key(model, path)
    if problem["type"] in ("value_error", "assertion_error"):
        message = str(problem["ctx"]["error"])
        return path, f"{key}: {message}" if key else message
    if info is None:
        return path, f"{key}: {problem['msg']}" if key else problem["msg"]
    if problem["type"] == "missing":
        return path, f"{key}: is required, expected {expected(info)}"
    return path, _mismatch(path, info, problem["input"])


def _mismatch(path: FieldPath, info: FieldInfo, value: Any) -> str:
    message = f"{dotted(path)}: expected {expected(info)}, got {_shown(value)}"
    if isinstance(value, str) and (close := nearest(value, _choices(info.annotation))):
        message += f"; did you mean {close}?"
    if _is_text(info.annotation) and any(map(_is_other_scalar, _items(value))):
        message += "; text that YAML reads as something else needs quotes"
    return message


def _is_text(annotation: Any) -> bool:
    return any(str in (member, *get_args(member)) for member in _members(annotation))


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_other_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | date)


def markdown_reference(model: type[BaseModel]) -> str:
    """A Markdown section per section of `model`: a table of keys, values, defaults, meanings."""
    parts = [_markdown_table(model, ())]
    for path, info in fields(model):
        if section := section_of(info.annotation):
            parts.append(f"## `{dotted(path)}`\n\n{_first_line(section)}\n")
            parts.append(_markdown_table(section, path))
    return "\n".join(parts)


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")


def _markdown_table(model: type[BaseModel], prefix: FieldPath) -> str:
    rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, info in model.model_fields.items():
        cells = (
            f"`{dotted((*prefix, name))}`",
            expected(info),
            _default(info),
            info.description or "",
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if section_of(info.annotation):
        return "as below"
    value = info.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "`null`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _unknown_key(model: type[BaseModel], path: FieldPath) -> str:
    """Suggest a sibling, then a key of that name in another section, then list the siblings."""
    name, key = str(path[-1]), dotted(path)
    parent: type[BaseModel] = model
    if len(path) > 1:
        info = field_at(model, path[:-1])[1]
        section = section_of(info.annotation) if info else None
        assert section is not None, path
        parent = section
    if close := nearest(name, parent.model_fields):
        return f"{key}: unknown key; did you mean {dotted((*path[:-1], close))}?"
    elsewhere = {str(p[-1]): p for p, _ in reversed(list(fields(model))) if NAME not in p}
    if close := nearest(name, elsewhere, likeness=0.8):  # lora.rank does not mean data.train
        return f"{key}: unknown key; did you mean {dotted(elsewhere[close])}?"
    where = dotted(path[:-1]) or "the top level"
    return f"{key}: unknown key; {where} takes {', '.join(parent.model_fields)}"


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for member in get_args(annotation) for inner in _members(member))
    return (annotation,)


def _member_name(member: Any) -> str:
    if get_origin(member) is Literal:
        return " or ".join(map(str, get_args(member)))
    if get_origin(member) in (list, tuple, Sequence):
        items = (item for inner in get_args(member) for item in _members(inner))
        names = " or ".join(map(_member_name, items))
        return f"a list of {names.replace('values by name', 'objects')}"
    if member is type(None):
        return "null"
    if section_of(member):
        return "a section of keys"
    if named_sections_of(member):
        return "sections by name"
    if get_origin(member) is dict:
        return f"{expected(FieldInfo.from_annotation(get_args(member)[1]))} by name"
    return _NAMES.get(member, "text")


def _limits(info: FieldInfo) -> Iterator[str]:
    least = next((c.ge for c in info.metadata if isinstance(c, annotated_types.Ge)), None)
    most = next((c.le for c in info.metadata if isinstance(c, annotated_types.Le)), None)
    if least is not None and most is not None:
        yield f"from {least:,} to {most:,}"
        return
    for constraint in info.metadata:
        match constraint:
            case annotated_types.Gt(gt=value):
                yield f"> {value:,}"
            case annotated_types.Ge(ge=value):
                yield f"≥ {value:,}"
            case annotated_types.Lt(lt=value):
                yield f"< {value:,}"
            case annotated_types.Le(le=value):
                yield f"≤ {value:,}"


def _choices(annotation: Any) -> list[str]:
    return [
        str(choice)
        for member in _members(annotation)
        if get_origin(member) is Literal
        for choice in get_args(member)
    ]


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python spells out no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "…"
