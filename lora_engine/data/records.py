"""Read training records from files, the hub or memory, and check them before any work.

A record is of one kind, told by its fields (the first that matches counts):

- preference: `chosen` and `rejected`, with `prompt` or with a beginning in common
- `messages`: a chat, a list of {"role": ..., "content": ...}
- unpaired: `prompt`, `completion` and `label`, true or false
- `prompt` and `completion`: two strings
- `text`: one string
- `prompt` alone, and any other fields

What a preference, an unpaired record or a prompt holds are strings or messages.

Any of them may name, in `adapter`, the one of several adapters that learns from it. Other fields
are not read; `Record.ignored` names them.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from lora_engine.data.fields import Messages, kind_of, messages_of, string_of
from lora_engine.data.listing import raise_listed, without_origin
from lora_engine.data.preferences import is_preference, preference_of
from lora_engine.data.readers import SUFFIXES, Row, RowError, read_file
from lora_engine.data.strings import check_strings, field_name
from lora_engine.errors import UserError, nearest, reason

if TYPE_CHECKING:
    import datasets

Kind = Literal["messages", "completion", "text", "preference", "unpaired", "prompt"]
InMemory: TypeAlias = "Sequence[Mapping[str, object]] | Sequence[Record] | datasets.Dataset"
Source: TypeAlias = "str | Path | InMemory"

FIELDS = ("messages", "prompt", "completion", "text")
# Sources that come with the package, by name.
BUILT_IN = ("docstrings",)
NAMED = 12  # fields named of a record that has none of those above


@dataclass(frozen=True)
class Record:
    """One checked training record.

    kind: which of the fields below are set.
    messages: the chat, for kind "messages".
    prompt, completion: for kind "completion"; messages too for "unpaired", as is the prompt of
        "preference" and "prompt".
    text: for kind "text".
    chosen, rejected: two answers to the prompt, for kind "preference".
    label: whether the completion is wanted, for kind "unpaired".
    columns: other fields that something reads: of "prompt" all of them, of "preference" `margin`.
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
    chosen: str | Messages = ""
    rejected: str | Messages = ""
    label: bool | None = None
    columns: Mapping[str, object] = field(default_factory=dict)
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
            case "prompt":
                return False

    def content_key(self) -> str:
        """A digest that two records share only if their contents are the same."""
        content: tuple[object, ...] = (
            *(self.kind, self.messages, self.prompt, self.completion, self.text),
        )
        if self.kind in ("preference", "unpaired", "prompt"):
            content += (self.chosen, self.rejected, self.label, self.columns)
        encoded = json.dumps(content, sort_keys=True, default=str).encode()
        return hashlib.sha256(encoded).hexdigest()


def read_records(source: "Source", *, split: str | None = None) -> list[Record]:
    """Every record of `source`, checked.

    source: a .jsonl, .json, .parquet or .csv file, a hub dataset id, "docstrings" (the Python
    standard library, see `docstrings.py`), a list of dicts or Records, or a datasets.Dataset.
    split: which split of a hub dataset or DatasetDict ("train" if None).

    Raises UserError for a missing source, and one UserError that lists every malformed record
    with its file and line.
    """
    if isinstance(source, str | Path):
        if str(source) in BUILT_IN:
            return _built_in(split)
        name, rows = _open(source, split)
    else:
        name, rows = "data", _rows_in_memory(source, split)
    records: list[Record] = []
    problems: list[tuple[str, str]] = []
    try:
        for item in rows:
            if isinstance(item, RowError):
                problems.append((item.origin, item.problem))
                continue
            try:
                records.append(_checked(item))
            except UserError as error:
                problems.append(without_origin(error, item.origin))
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from error
    raise_listed(name, problems, len(records) + len(problems))
    if not records:
        raise UserError(f"{name}: holds no records; give a source that has some")
    return records


def _checked(row: Row) -> Record:
    if not isinstance(row.value, Record):
        return parse_record(row.value, row.origin)
    record = row.value
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
        check_strings(value, f"{row.origin}: {name!r}")
    return record


def parse_record(row: object, origin: str) -> Record:
    """Check one row. Raises UserError "origin: what is wrong"."""
    if not isinstance(row, Mapping):
        raise UserError(f"{origin}: expected an object with fields, got {kind_of(row)}")
    present = {field for field in FIELDS if row.get(field) is not None}
    adapter = "" if row.get("adapter") is None else string_of(row, "adapter", origin)
    if is_preference(row):
        kind, parts, read = preference_of(row, origin)
        group = _digest(0, json.dumps(parts["prompt"], sort_keys=True, default=str))
        ignored = () if kind == "prompt" else _ignored(row, read)
        return Record(kind, **parts, adapter=adapter, origin=origin, group=group, ignored=ignored)
    if "messages" in present:
        return Record(
            "messages",
            messages_of(row["messages"], origin),
            adapter=adapter,
            origin=origin,
            ignored=_ignored(row, ("messages",)),
        )
    if {"prompt", "completion"} <= present:
        return Record(
            "completion",
            prompt=string_of(row, "prompt", origin),
            completion=string_of(row, "completion", origin),
            adapter=adapter,
            origin=origin,
            ignored=_ignored(row, ("prompt", "completion")),
        )
    if "text" in present:
        return Record(
            "text",
            text=string_of(row, "text", origin),
            adapter=adapter,
            origin=origin,
            ignored=_ignored(row, ("text",)),
        )
    fields = [repr(field) for field in row if row[field] is not None]
    empty = [repr(field) for field in FIELDS if field in row and row[field] is None]
    more = f" and {len(fields) - NAMED} more" if len(fields) > NAMED else ""
    holds = [f"{', '.join(fields[:NAMED])}{more}"] if fields else []
    holds += [f"nothing in {', '.join(empty)}"] if empty else []
    raise UserError(
        f"{origin}: needs 'messages', 'prompt' and 'completion', or 'text'; "
        f"has {', but '.join(holds) or 'no fields'}"
    )


def _ignored(row: Mapping[str, object], read: tuple[str, ...]) -> tuple[str, ...]:
    """The fields that hold something beside those that are read."""
    if len(row) == len(read):
        return ()
    beside = (field for field in row if field not in read and field != "adapter")
    return tuple(
        f"{field} (beside {' and '.join(read)})" if field in FIELDS else field_name(field)
        for field in beside
        if not _is_empty(row[field])
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


def _is_empty(value: object) -> bool:
    """Whether a cell holds nothing: null, or a string, list or object of no length."""
    return value is None or (isinstance(value, str | bytes | list | tuple | Mapping) and not value)


def split_heldout(
    records: Sequence[Record], fraction: float, *, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Hold out about `fraction` of the records; returns (train, held out).

    Records of one group, and records of the same content, stay on one side. The choice depends
    on the contents and the seed only, not on the order. Train keeps the order of `records`;
    the held-out records are shuffled, so that the first few are a fair sample.
    """
    if not 0 < fraction < 1:
        raise UserError(f"held-out fraction must lie between 0 and 1, got {fraction}")
    contents = [record.content_key() for record in records]
    keys = _side_keys(records, contents)
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    target, taken = max(1, round(fraction * len(records))), 0
    heldout_keys: set[str] = set()
    for key in sorted(sizes, key=lambda key: _digest(seed, key)):
        if taken + sizes[key] <= target:
            heldout_keys.add(key)
            taken += sizes[key]
    if not heldout_keys or len(heldout_keys) == len(sizes):
        raise UserError(
            f"cannot hold out {fraction:.0%} of the records ({len(records)}, or {len(sizes)} where "
            "those of the same content or group count as one); give another fraction, more records "
            "or an eval file"
        )
    train = [r for r, key in zip(records, keys, strict=True) if key not in heldout_keys]
    heldout = sorted(
        (i for i, key in enumerate(keys) if key in heldout_keys),
        key=lambda i: (_digest(seed, contents[i]), i),
    )
    return train, [records[i] for i in heldout]


def _side_keys(records: Sequence[Record], contents: Sequence[str]) -> list[str]:
    """The key by which each record is assigned to a side.

    A record without a group goes by its content. A content that appears in several groups would
    tie them together, so it goes with the first of them.
    """
    first_group: dict[str, str] = {}
    for record, content in zip(records, contents, strict=True):
        first_group.setdefault(content, record.group)
    return [first_group[content] or content for content in contents]


def _digest(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()


def _built_in(split: str | None) -> list[Record]:
    from lora_engine.data.docstrings import docstring_records

    if split is not None:
        raise UserError(f"docstrings: has no split {split!r}; leave the split out")
    return docstring_records()


def _open(source: str | Path, split: str | None) -> tuple[str, Iterable[Row | RowError]]:
    try:
        path = Path(source).expanduser()
        is_file, exists = path.is_file(), path.exists() or path.is_symlink()
    except (OSError, RuntimeError) as error:  # a name too long; a home that does not exist
        raise UserError(f"{source}: is not a path that can be read: {reason(error)}") from error
    if is_file:
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"{source}: cannot read {path.suffix or 'a file without a suffix'}; "
                f"use {', '.join(SUFFIXES)}"
            )
        return str(source), read_file(path)
    if path.is_dir():
        raise UserError(f"{source}: is a folder; name one of its files ({', '.join(SUFFIXES)})")
    if exists:
        raise UserError(f"{source}: is neither a file nor a link to one; save the data to a file")
    if isinstance(source, Path) or path.suffix in SUFFIXES or not _looks_like_hub_id(source):
        raise UserError(f"{source}: no such file{_alternative(path) or '; check the path'}")
    if "/" not in source and (close := nearest(source, BUILT_IN)):
        raise UserError(f"{source}: no such file; did you mean {close}?")
    return source, _rows_in_memory(_load_hub(source, split), split, prefix=source)


def _looks_like_hub_id(source: str) -> bool:
    return source.count("/") <= 1 and not source.startswith((".", "/", "~"))


def _alternative(path: Path) -> str:
    try:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:  # a folder that may not be listed
        beside = []
    close = nearest(path.name, beside)
    return f"; did you mean {path.parent / close}?" if close else ""


def _load_hub(name: str, split: str | None) -> "datasets.Dataset":
    import datasets

    try:
        return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{name}: no such file, and not loadable from the Hugging Face hub: {reason(error)}"
        ) from error


def _rows_in_memory(
    source: Iterable[object] | Mapping[str, Iterable[object]],
    split: str | None,
    prefix: str = "record",
) -> Iterator[Row | RowError]:
    if isinstance(source, Mapping):  # datasets.DatasetDict
        if (split := split or "train") not in source:
            raise UserError(f"the data has no split {split!r}; it has {', '.join(source)}")
        source = source[split]
    try:
        rows = enumerate(source)
    except TypeError as error:
        raise UserError(
            f"expected records, or where to read them, got {kind_of(source)}"
        ) from error
    for number, value in rows:
        origin = f"{prefix}:{number}"
        if isinstance(value, Record):
            origin = value.origin or origin
            value = value if value.origin else replace(value, origin=origin)
        yield Row(value, origin)
