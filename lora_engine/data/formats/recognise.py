"""Which format a record has, told by its fields; where two fit, a rule, or a refusal.

1. `data.format`, where it is given, and the columns that `data.columns` names.
2. Else the formats whose fields the record has.
3. One that reads all fields of another and more goes before it: a pair of answers before a prompt,
   a judged answer before an answer to learn.
4. One whose fields are empty gives way to one whose fields are not.
5. A text that says all that another format's fields say, one after the other, is a rendering of
   them and not read; so is a prompt that does and ends in their answer, that is one of their
   messages, or that a text begins with. Of formats that all say the same the first is read.
6. What is left must be one, or one that the objective learns from. Otherwise the record is refused;
   so is a text, or a question with its answer, beside a field that is called as an answer is.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from lora_engine.data.formats import chat, instructions, plain, preference
from lora_engine.data.formats.base import COMMON, EVERY, Fields, Format, is_empty
from lora_engine.data.formats.columns import Layout, laid_out
from lora_engine.data.formats.hints import answer_in, hint
from lora_engine.data.strings import field_name
from lora_engine.errors import UserError

FormatName = Literal[
    "messages",
    "sharegpt",
    "alpaca",
    "dolly",
    "question-answer",
    "turn",
    "prompt-completion",
    "text",
    "preference",
    "openai-preference",
    "scored",
    "unpaired",
    "prompts",
    "tokens",
]
FORMATS = (*chat.FORMATS, *preference.FORMATS, *instructions.FORMATS, *plain.FORMATS)
# Those whose one field, of their own name, no other format has.
_ALONE = tuple(format for format in FORMATS if format.name in ("messages", "text"))
# Every field that a format reads, which is what `data.columns` may name.
FIELDS = tuple(
    dict.fromkeys(field for f in FORMATS for field in (*f.fields, *COMMON) if field != "*")
)
# Those whose answer is learned, unless something beside it says that it is a bad one.
_ANSWERED = tuple(
    f for f in FORMATS if f.name in preference.UNPAIRED.over and f is not preference.PROMPTS
)
# Those beside which another field may hold the answer that is meant.
_UNSURE = ("text", "question-answer")
_NAMED = 12  # fields named of a record that has no format


class Reading(NamedTuple):
    """A record as one of the kinds: by which format, and its fields that nothing reads."""

    format: str
    fields: dict[str, object]
    ignored: tuple[str, ...]


def recognise(row: Fields, layout: Layout) -> Reading:
    """The row by the format that it has.

    Raises UserError, without the row's place, for a row of no format or of several, and for values
    that are not what its format has.
    """
    used: set[str] | None = None
    given = {key: value for key, value in row.items() if value is not None}
    fields = given
    if layout.columns or layout.template:
        fields, used = laid_out(given, layout)
    else:
        for key in chat.MEDIA:
            if not is_empty(given.get(key)):
                raise UserError(chat.media_problem(key))
    format = _plainly(fields, layout) or _format(fields, layout)
    if layout.format is None and format in _ANSWERED:
        _check_verdict(row if used is None else layout.columns or {}, fields, format)
    if layout.format is None and used is None and format.name in _UNSURE and len(fields) > 1:
        _check_answer(fields, format)
    made = format.read(fields)
    for field in COMMON:
        if field in fields:
            made[field] = fields[field]
    known = {*format.fields, *COMMON}
    if used is None:
        used = set(given) if format.fields == EVERY else known
    elif format.fields != EVERY:
        for field in layout.columns or ():
            if field not in known:
                raise UserError(
                    f"data.columns names {field!r}, which records of the format {format.name} "
                    f"do not have; they have {', '.join(format.fields)}"
                )
    left = [key for key in given if key not in used and not is_empty(given[key])]
    return Reading(format.name, made, tuple(map(field_name, left)))


def _plainly(fields: Fields, layout: Layout) -> Format | None:
    """The format of a row that has a field of one format alone, which most rows have."""
    if layout.format is not None or len(fields) != 1:
        return None
    return _named(next(iter(fields)), _ALONE)


def _check_verdict(named: Iterable[str], fields: Fields, format: Format) -> None:
    """Raises UserError where a verdict on the answer is among the names and is not filled in."""
    for field in preference.VERDICTS:
        if field in named and is_empty(fields.get(field)):
            raise UserError(
                f"{field!r} is empty, and might have said that the answer is a bad one; fill it "
                f"in, leave it out, or say data.format: {format.name} to learn the answer"
            )


def _check_answer(fields: Fields, format: Format) -> None:
    """Raises UserError where another field than those of the format may hold the answer."""
    answer = answer_in(fields, format.fields)
    if answer is None or _in_order([str(fields[answer])], " ".join(_said(format, fields))):
        return
    asked = format.fields[0]
    raise UserError(
        f"has {answer!r} beside {format.needs}, and it may be the answer; say data.columns: "
        f"{{user: {asked}, assistant: {answer}}}, or data.format: {format.name} to leave it out"
    )


def _named(name: str, formats: Iterable[Format]) -> Format | None:
    return next((format for format in formats if format.name == name), None)


def _format(fields: Fields, layout: Layout) -> Format:
    if layout.format is not None:
        format = _named(layout.format, FORMATS)
        assert format is not None
        if not format.fits(fields):
            raise UserError(
                f"data.format is {format.name}, which needs {format.needs}; {_has(fields)}"
            )
        return format
    fit = [format for format in FORMATS if format.fits(fields)]
    if not fit:
        raise UserError(_unknown(fields, layout))
    fit = [f for f in fit if not any(f.name in other.over for other in fit)]
    if len(fit) > 1:
        filled = {key: value for key, value in fields.items() if not is_empty(value)}
        fit = [format for format in fit if format.fits(filled)] or fit
    if len(fit) > 1:
        fit = _without_renderings(fit, fields)
    if len(fit) > 1:
        names = [f"{format.name} ({format.needs})" for format in fit]
        raise UserError(
            f"fits {' and '.join(names)}; say which with data.format, or name the columns that "
            "count with data.columns"
        )
    return fit[0]


def _without_renderings(fit: list[Format], fields: Fields) -> list[Format]:
    """The formats but a text or prompt that says what another one says, and the first of those
    that all say the same."""
    said = {format.name: _said(format, fields) for format in fit}
    text, prompt = said.pop("text", None), said.pop("prompts", None)
    if text and any(_in_order(other, text[0]) for other in said.values()):
        text = None
    if prompt and any(set(prompt) <= set(other) for other in said.values()):
        prompt = None
    if prompt and any(_ends(prompt[0], o) for o in said.values()):
        prompt = None
    if text and prompt and text[0].startswith(prompt[0]):
        prompt = None
    same = list(said)[1:] if len({tuple(each) for each in said.values()}) == 1 else []
    said = {name: texts for name, texts in said.items() if name not in same}
    kept = {*said, *(["text"] if text else []), *(["prompts"] if prompt else [])}
    return [format for format in fit if format.name in kept]


def _said(format: Format, fields: Fields) -> list[str]:
    """What a reading says, without the names of roles and what it gives to templates."""
    try:
        read = format.read(fields)
    except UserError:
        return []
    said = ("messages", "prompt", "completion", "text", "chosen", "rejected")
    texts = (text for field in said for text in _texts(read.get(field)))
    return [text.strip() for text in texts if text.strip()]


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in ("role", "type"):
                yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _in_order(texts: list[str], whole: str) -> bool:
    """Whether the texts' lines stand in `whole` one after the other: between them, as between a
    question and what it is about, a rendering may write anything."""
    position = 0
    for line in (line.strip() for text in texts for line in text.splitlines()):
        place = whole.find(line, position)
        if place < 0:
            return False
        position = place + len(line)
    return bool(texts)


def _ends(whole: str, texts: list[str]) -> bool:
    """Whether `whole` says all of the texts and ends with the last."""
    return _in_order(texts, whole) and whole.endswith(texts[-1])


def _has(fields: Fields) -> str:
    """'has 'a', 'b', but nothing in 'c''."""
    held = [repr(field_name(field)) for field in fields]
    more = f" and {len(held) - _NAMED} more" if len(held) > _NAMED else ""
    return f"has {', '.join(held[:_NAMED])}{more}" if held else "has no fields that hold anything"


def _unknown(fields: Fields, layout: Layout) -> str:
    if layout.columns or layout.template:
        return f"is of no known format with data.columns and data.template applied; {_has(fields)}"
    if "prompt" in fields and is_empty(fields["prompt"]):
        return "the prompt is empty; give some text"
    said = f"is of no known format: {_has(fields)}"
    return f"{said}; {hint(fields)}" if fields else said
