"""Read training records from files, the hub or memory, and check them before any work.

A record is of one kind, told by its fields once its format is known (see `formats`):

- preference: `chosen` and `rejected`, with `prompt` or with a beginning in common
- `messages`: a chat, a list of {"role": ..., "content": ...}
- unpaired: `prompt`, `completion` and `label`, true or false
- `prompt` and `completion`: two strings
- `text`: one string
- `prompt` alone, and any other fields
- `input_ids` and `supervised`: token ids, and which of them are learned

What a preference, an unpaired record or a prompt holds are strings or messages.

Any of them may name, in `adapter`, the one of several adapters that learns from it, and say in
`weight` how much its part of the loss counts; so may messages. Other fields are not read;
`Record.ignored` names them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

from lora_engine.data.fields import Messages, kind_of, messages_of, string_of
from lora_engine.data.formats.base import COMMON, is_empty
from lora_engine.data.formats.columns import RECOGNISED, Layout
from lora_engine.data.formats.recognise import recognise
from lora_engine.data.heldout import choose_heldout, digest
from lora_engine.data.inputs import INPUT_FIELDS, NO_INPUTS, TemplateInputs, inputs_of
from lora_engine.data.listing import raise_listed, without_origin
from lora_engine.data.preferences import is_preference, preference_of
from lora_engine.data.readers import Row, RowError
from lora_engine.data.sources import open_source
from lora_engine.data.strings import check_strings, field_name
from lora_engine.data.weights import message_weights, record_weight
from lora_engine.errors import UserError

if TYPE_CHECKING:
    import datasets

Kind = Literal["messages", "completion", "text", "preference", "unpaired", "prompt", "tokens"]
InMemory: TypeAlias = "Sequence[Mapping[str, object]] | Sequence[Record] | datasets.Dataset"
Source: TypeAlias = "str | Path | Sequence[str | Path] | InMemory"

FIELDS = ("messages", "prompt", "completion", "text", "input_ids")
NAMED = 12  # fields named of a record without an answer


@dataclass(frozen=True)
class Record:
    """One checked training record.

    kind: which of the fields below are set.
    messages: the chat, for kind "messages".
    prompt, completion: for kind "completion"; messages too for "unpaired", as is the prompt of
        "preference" and "prompt".
    text: for kind "text". goes_on: whether the next record's text continues it.
    chosen, rejected: two answers to the prompt, for kind "preference".
    label: whether the completion is wanted, for kind "unpaired".
    columns: other fields that something reads: of "prompt" all of them, of "preference" `margin`.
    tokens, supervised: token ids and whether each is learned, for kind "tokens".
    weight: what multiplies its part of the loss. message_weights: the same for each of its
        messages; empty: all 1.
    given: what the chat template is given beside messages.
    format: the name of the format it was read by; "" for one made in memory.
    drop: why nothing can be learned from it ("": something can).
    adapter: name of the adapter that learns from it ("": none named).
    origin: where it stands, "file:line" where there are lines.
    group: records of one group belong on one side of a train/held-out split ("": no group).
    ignored: fields that hold something and that nothing reads.
    """

    kind: Kind
    messages: Messages = ()
    prompt: str | Messages = ""
    completion: str | Messages = ""
    text: str = ""
    goes_on: bool = False
    chosen: str | Messages = ""
    rejected: str | Messages = ""
    label: bool | None = None
    columns: Mapping[str, object] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    supervised: tuple[bool, ...] = ()
    weight: float = 1.0
    message_weights: tuple[float, ...] = ()
    given: TemplateInputs = NO_INPUTS
    format: str = ""
    drop: str = ""
    adapter: str = ""
    origin: str = ""
    group: str = ""
    ignored: tuple[str, ...] = ()

    def has_answer(self) -> bool:
        """Whether the record has text to learn from; tokenization may still leave no target."""
        match self.kind:
            case "messages":
                return _answers(self.messages)
            case "preference":
                return _answers(self.chosen) and _answers(self.rejected)
            case "completion" | "unpaired":
                return _answers(self.completion)
            case "text":
                return _answers(self.text)
            case "tokens":
                return any(self.supervised[1:])
            case "prompt":
                return False

    def content_key(self) -> str:
        """A digest that two records share only if their contents are the same."""
        content: tuple[object, ...] = (
            *(self.kind, self.messages, self.prompt, self.completion, self.text),
        )
        if self.kind in ("preference", "unpaired", "prompt"):
            content += (self.chosen, self.rejected, self.label, self.columns)
        if self.kind == "tokens":
            content += (self.tokens, self.supervised)
        if self.given != NO_INPUTS:
            content += (self.given.tools, self.given.documents, self.given.variables)
        encoded = json.dumps(content, sort_keys=True, default=str).encode()
        return hashlib.sha256(encoded).hexdigest()


def read_records(
    source: "Source", *, split: str | None = None, layout: Layout = RECOGNISED
) -> list[Record]:
    """Every record of `source`, checked.

    source: a file, folder, glob or several of them (see `sources` and `readers`), a hub dataset id,
    "docstrings" (the Python standard library, see `docstrings.py`), a list of dicts or Records, or
    a datasets.Dataset.
    split: which split of a folder, a hub dataset or a DatasetDict ("train" if None).
    layout: the format, columns and template of its records, where they are not to be recognised.

    Raises UserError for a missing source, and one UserError that lists every malformed record
    with its file and line.
    """
    name, rows = open_source(source, split)
    records: list[Record] = []
    problems: list[tuple[str, str]] = []
    try:
        for item in rows:
            if isinstance(item, RowError):
                problems.append((item.origin, item.problem))
                continue
            try:
                records.append(record_of(item, layout))
            except UserError as error:
                problems.append(without_origin(error, item.origin))
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from error
    raise_listed(name, problems, len(records) + len(problems))
    if not records:
        raise UserError(f"{name}: holds no records; give a source that has some")
    return records


def record_of(row: Row, layout: Layout) -> Record:
    """The record in a row, checked. Raises UserError "origin: what is wrong"."""
    if isinstance(row.value, Record):
        return _checked_again(row.value, row.origin)
    if not isinstance(row.value, Mapping):
        return parse_record(row.value, row.origin)
    try:
        reading = recognise(row.value, layout)
    except UserError as error:
        raise UserError(f"{row.origin}: {error}") from error
    record = parse_record(reading.fields, row.origin, reading.format, reading.ignored)
    return replace(record, goes_on=True) if row.goes_on else record


def _checked_again(record: Record, origin: str) -> Record:
    """A record made in memory, whose strings nobody has looked at."""
    written = {
        "messages": record.messages,
        "prompt": record.prompt,
        "completion": record.completion,
        "text": record.text,
        "chosen": record.chosen,
        "rejected": record.rejected,
        "adapter": record.adapter,
    }
    for name, value in written.items():
        check_strings(value, f"{origin}: {name!r}")
    return record if record.origin else replace(record, origin=origin)


class _Shared(TypedDict):
    """What records of every kind have."""

    adapter: str
    weight: float
    origin: str
    format: str


def parse_record(
    row: object, origin: str, format: str = "", unread: tuple[str, ...] = ()
) -> Record:
    """Check one row. Raises UserError "origin: what is wrong".

    format, unread: what the row was read by, and fields that this left out.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{origin}: expected an object with fields, got {kind_of(row)}")
    present = {field for field in FIELDS if row.get(field) is not None}
    shared: _Shared = {
        "adapter": "" if row.get("adapter") is None else string_of(row, "adapter", origin),
        "weight": record_weight(row, origin),
        "origin": origin,
        "format": format,
    }
    if row.get("drop"):
        return Record("text", drop=str(row["drop"]), ignored=unread, **shared)
    if is_preference(row):
        kind, parts, read = preference_of(row, origin)
        group = digest(0, json.dumps(parts["prompt"], sort_keys=True, default=str))
        given = NO_INPUTS if isinstance(parts["prompt"], str) else inputs_of(row, origin)
        read = read if given == NO_INPUTS else (*read, *INPUT_FIELDS)
        ignored = unread if kind == "prompt" else (*unread, *_ignored(row, read))
        return Record(kind, **parts, given=given, group=group, ignored=ignored, **shared)
    if "input_ids" in present:
        tokens, supervised = row["input_ids"], row["supervised"]
        return Record(
            "tokens",
            tokens=tuple(tokens),
            supervised=tuple(supervised),
            ignored=unread,
            **shared,
        )
    if "messages" in present:
        messages = messages_of(row["messages"], origin)
        weights = message_weights(messages, origin)
        given = inputs_of(row, origin)
        ignored = (*unread, *_ignored(row, ("messages", *INPUT_FIELDS)))
        return Record(
            "messages",
            messages,
            message_weights=weights,
            given=given,
            ignored=ignored,
            **shared,
        )
    if {"prompt", "completion"} <= present:
        return Record(
            "completion",
            prompt=string_of(row, "prompt", origin),
            completion=string_of(row, "completion", origin),
            ignored=(*unread, *_ignored(row, ("prompt", "completion"))),
            **shared,
        )
    if "text" in present:
        text = string_of(row, "text", origin)
        return Record("text", text=text, ignored=(*unread, *_ignored(row, ("text",))), **shared)
    fields = ", ".join(map(repr, list(row)[:NAMED])) or "no fields"
    raise UserError(f"{origin}: holds nothing to learn from in {fields}")


def _ignored(row: Mapping[str, object], read: tuple[str, ...]) -> tuple[str, ...]:
    """The fields that hold something beside those that are read."""
    by = " and ".join(field for field in read if field not in INPUT_FIELDS)
    beside = (field for field in row if field not in read and field not in COMMON)
    return tuple(
        f"{field} (beside {by})" if field in FIELDS else field_name(field)
        for field in beside
        if not is_empty(row[field])
    )


def _answers(said: str | Messages) -> bool:
    """Whether a text, or what an assistant says in messages, holds more than white space."""
    if isinstance(said, str):
        return bool(said.strip())
    return any(
        message["role"] == "assistant"
        and (not _is_blank(message.get("content")) or bool(message.get("tool_calls")))
        for message in said
    )


def _is_blank(content: object) -> bool:
    """Whether a message's content is no text but white space."""
    return not (content.strip() if isinstance(content, str) else content)


def split_heldout(
    records: Sequence[Record], fraction: float, *, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Hold out about `fraction` of the records; returns (train, held out).

    Records of one group, and records of the same content, stay on one side. The choice depends
    on the contents and the seed only, not on the order. Train keeps the order of `records`;
    the held-out records are shuffled, so that the first few are a fair sample.
    """
    contents = [record.content_key() for record in records]
    heldout = choose_heldout(contents, [r.group for r in records], fraction, seed=seed)
    chosen = set(heldout)
    train = [record for i, record in enumerate(records) if i not in chosen]
    return train, [records[i] for i in heldout]
