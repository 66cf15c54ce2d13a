"""Which strings of a record a tokenizer and a chat template can take."""

from collections.abc import Iterator, Mapping

from lora_engine.errors import UserError

DEEPEST = 64  # levels of lists and objects within one message
LONGEST_NAME = 60  # characters shown of a field's name


def surrogate_in(text: str) -> str | None:
    """The first lone surrogate of `text` as 'U+D83D', or None: JSON can spell half a character."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"U+{ord(text[error.start]):04X}"
    return None


def check_string(text: str, where: str) -> None:
    """Raises UserError for a lone surrogate in `text`; where: 'file:line: what it is'."""
    half = surrogate_in(text)
    if half:
        raise UserError(
            f"{where} holds half a character (the lone surrogate {half}), which cannot be "
            "tokenised; write the whole character, or leave it out"
        )


def check_strings(value: object, where: str, depth: int = 0) -> None:
    """`check_string` for every string in `value`, keys of objects included.

    Also raises UserError for keys that are not strings and for more than DEEPEST levels.
    """
    if isinstance(value, str):
        check_string(value, where)
    elif isinstance(value, Mapping | list | tuple):
        if depth == DEEPEST:
            raise UserError(f"{where} is nested more than {DEEPEST} levels deep")
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise UserError(f"{where} has the key {key!r:.60}, which is not a string")
                check_string(key, where)
                check_strings(inner, where, depth + 1)
        else:
            for inner in value:
                check_strings(inner, where, depth + 1)


def field_name(field: object) -> str:
    """A field's name as it can be shown and written; one that is long, blank or odd is quoted."""
    name = str(field)
    plain = name.isprintable() and name.strip() == name != "" and len(name) <= LONGEST_NAME
    return name if plain else f"{name[:LONGEST_NAME]!r}"


def strings_in(value: object) -> Iterator[str]:
    """Every string in `value`, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from strings_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings_in(inner)


def without_nulls(value: object) -> object:
    """A row of a columnar source without the fields of its objects, at any depth, that are null.

    Such a source gives every object the fields of all and spells an absent one as null. The row's
    own fields and the elements of lists stay.
    """
    if isinstance(value, Mapping):
        return {key: _pruned(inner) for key, inner in value.items()}
    return value


def _pruned(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_pruned(inner) for inner in value]
    return value
