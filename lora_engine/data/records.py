"""Read training records from files, the hub or memory, and check them before any work.

A record is one of three kinds, told by its fields (the first that matches counts):

- `messages`: a chat, a list of {"role": ..., "content": ...}
- `prompt` and `completion`: two strings
- `text`: one string

Any of them may name, in `adapter`, the one of several adapters that learns from it. Other fields
are not read; `Record.ignored` names them.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from lora_engine.data.listing import raise_listed, without_origin
from lora_engine.data.readers import SUFFIXES, Row, RowError, read_file
from lora_engine.data.strings import check_string, check_strings, field_name
from lora_engine.errors import UserError, nearest, reason

if TYPE_CHECKING:
    import datasets

Kind = Literal["messages", "completion", "text"]
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
    prompt, completion: for kind "completion".
    text: for kind "text".
    adapter: name of the adapter that learns from it ("": none named).
    origin: where it stands, "file:line" where there are lines.
    group: records of one group belong on one side of a train/held-out split ("": no group).
    ignored: fields that hold something and that nothing reads.
    """

    kind: Kind
    messages: tuple[Mapping[str, object], ...] = ()
    prompt: str = ""
    completion: str = ""
    text: str = ""
    adapter: str = ""
    origin: str = ""
    group: str = ""
    ignored: tuple[str, ...] = ()

    def has_answer(self) -> bool:
        """Whether the record has text to learn from; tokenization may still leave no target."""
        if self.kind == "messages":
            return any(
                message["role"] == "assistant"
                and (not _is_blank(message.get("content")) or message.get("tool_calls"))
                for message in self.messages
            )
        return bool((self.completion if self.kind == "completion" else self.text).strip())

    def content_key(self) -> str:
        """A digest that two records share only if their contents are the same."""
        content = (self.kind, self.messages, self.prompt, self.completion, self.text)
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
    check_string(record.prompt, f"{row.origin}: 'prompt'")
    check_string(record.completion, f"{row.origin}: 'completion'")
    check_string(record.text, f"{row.origin}: 'text'")
    check_string(record.adapter, f"{row.origin}: 'adapter'")
    check_strings(record.messages, f"{row.origin}: 'messages'")
    return record


def parse_record(row: object, origin: str) -> Record:
    """Check one row. Raises UserError "origin: what is wrong"."""
    if not isinstance(row, Mapping):
        raise UserError(f"{origin}: expected an object with fields, got {_name(row)}")
    present = {field for field in FIELDS if row.get(field) is not None}
    adapter = "" if row.get("adapter") is None else _string(row, "adapter", origin)
    if "messages" in present:
        return Record(
            "messages",
            _messages(row["messages"], origin),
            adapter=adapter,
            origin=origin,
            ignored=_ignored(row, ("messages",)),
        )
    if {"prompt", "completion"} <= present:
        return Record(
            "completion",
            prompt=_string(row, "prompt", origin),
            completion=_string(row, "completion", origin),
            adapter=adapter,
            origin=origin,
            ignored=_ignored(row, ("prompt", "completion")),
        )
    if "text" in present:
        return Record(
            "text",
            text=_string(row, "text", origin),
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


def _messages(value: object, origin: str) -> tuple[Mapping[str, object], ...]:
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{origin}: 'messages' must be a non-empty list, got {_name(value)}")
    return tuple(_message(m, f"{origin}: message {i}") for i, m in enumerate(value, start=1))


def _message(message: object, where: str) -> Mapping[str, object]:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: expected an object, got {_name(message)}")
    check_strings(message, where)
    # Columnar files spell an absent field as null.
    message = {key: value for key, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise UserError(f"{where}: 'role' must be a string such as 'user', got {_name(role)}")
    if content is None and message.get("tool_calls"):
        return message
    if not isinstance(content, str):
        raise UserError(f"{where}: 'content' must be a string, got {_name(content)}")
    return message


def _string(row: Mapping[str, object], field: str, origin: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise UserError(f"{origin}: {field!r} must be a string, got {_name(value)}")
    check_string(value, f"{origin}: {field!r}")
    return value


def _name(value: object) -> str:
    # Without the value, so that the same mistake in many records is told once.
    names = {str: "a string", list: "a list", dict: "an object", type(None): "nothing"}
    names |= {int: "a number", float: "a number", bool: "true or false"}
    if isinstance(value, list | tuple) and not value:
        return "an empty list"
    return names.get(type(value), f"{type(value).__name__} {value!r}"[:60])


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
        raise UserError(f"expected records, or where to read them, got {_name(source)}") from error
    for number, value in rows:
        origin = f"{prefix}:{number}"
        if isinstance(value, Record):
            origin = value.origin or origin
            value = value if value.origin else replace(value, origin=origin)
        yield Row(value, origin)
