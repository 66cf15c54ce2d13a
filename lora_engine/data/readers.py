"""Rows out of files, each with the place where it stands.

A row that cannot be parsed is yielded as a RowError and reading goes on, so that one pass finds
every malformed line. Lines end where each format says: JSON Lines at \\n alone, CSV at \\n, \\r\\n
or \\r outside quotes. Text files may be compressed (see `unpack`).
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

from lora_engine.data.documents import NUL, Document
from lora_engine.data.json_list import JsonList, ListError
from lora_engine.data.strings import without_nulls
from lora_engine.data.unpack import COMPRESSED, Meter, opened
from lora_engine.errors import UserError, reason

if TYPE_CHECKING:
    import pyarrow

_JSON_BLANKS = " \t\r\n"


@dataclass(frozen=True)
class Row:
    """A parsed row and its origin. goes_on: its text does, in the next row."""

    value: object
    origin: str
    goes_on: bool = False


@dataclass(frozen=True)
class RowError:
    """A row that cannot be parsed, and why."""

    problem: str
    origin: str


def read_jsonl(path: Path, meter: Meter) -> Iterator[Row | RowError]:
    """One JSON value per line; blank lines are skipped. Origins count lines from 1."""
    with opened(path, meter) as file:
        for number, raw in enumerate(file, start=1):
            if (row := parse_line(raw, number, path)) is not None:
                yield row


def parse_line(raw: bytes, number: int, path: Path) -> Row | RowError | None:
    """The JSON value in line `number` of a file; None for a blank line."""
    origin = f"{path}:{number}"
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        if not line.strip(_JSON_BLANKS):
            return None
        return Row(_decoder.decode(line.rstrip("\r\n")), origin)
    except UnicodeDecodeError as error:
        return RowError(f"is not UTF-8 text (byte {error.start + 1})", origin)
    except json.JSONDecodeError as error:
        return RowError(f"is not valid JSON: {error.msg} (column {error.colno})", origin)
    except (ValueError, RecursionError) as error:
        return RowError(_unusable(error), origin)


def read_json(path: Path, meter: Meter) -> Iterator[Row | RowError]:
    """A JSON array of records. Origins are as in `JsonList`."""
    with opened(path, meter) as file:
        values = JsonList(file, path, _decoder)
        try:
            for value in values:
                yield Row(value, values.origin)
        except ListError as error:
            yield RowError(str(error), values.origin)
        except (ValueError, RecursionError) as error:
            yield RowError(_unusable(error), values.origin)


def read_csv(path: Path, meter: Meter) -> Iterator[Row | RowError]:
    """A CSV file with a header line, or a TSV one. Origins are the lines where records end."""
    previous_limit = csv.field_size_limit(sys.maxsize)  # the default refuses 128 KiB cells
    delimiter = "\t" if file_kind(path) == ".tsv" else ","
    try:
        with opened(path, meter) as file:
            reader = csv.DictReader(_lines(path, file), strict=True, delimiter=delimiter)
            yield from _csv_rows(reader, path)
    finally:
        csv.field_size_limit(previous_limit)


# A line with its end, of any kind that CSV knows.
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


def _lines(path: Path, file: BinaryIO) -> Iterator[str]:
    """Lines with their ends as they are, which quoted CSV cells need."""
    for number, raw in enumerate(file, start=1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            place = f"byte {error.start + 1}"
            raise UserError(f"{path}:{number}: is not UTF-8 text ({place})") from error
        if "\0" in text:
            raise UserError(f"{path}:{number}: {NUL}")
        yield from _LINE.findall(text)


def _csv_rows(reader: csv.DictReader, path: Path) -> Iterator[Row | RowError]:
    try:
        header = reader.fieldnames or ()
    except csv.Error as error:
        raise UserError(f"{path}:1: the header is not valid CSV: {error}") from error
    if reader.fieldnames is not None and not header:
        raise UserError(f"{path}:1: is empty; the first line has to name the columns")
    twice = {name for name in header if list(header).count(name) > 1}
    if twice:
        raise UserError(f"{path}:1: the header names {', '.join(map(repr, twice))} more than once")
    while True:
        first = reader.reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # DictReader's own count lags behind by the line that failed.
            last = reader.reader.line_num
            begun = f" (it begins in line {first})" if first < last else ""
            yield RowError(f"is not valid CSV: {error}{begun}", f"{path}:{last}")
            continue
        origin = f"{path}:{reader.line_num}"
        if None in row:
            yield RowError(f"has more cells than the header's {len(row) - 1}", origin)
        else:
            yield Row(row, origin)


def read_parquet(path: Path, meter: Meter) -> Iterator[Row | RowError]:
    """A Parquet file. Origins count rows from 1."""
    import pyarrow
    import pyarrow.parquet

    # pyarrow raises the last three for damaged pages and for values that Python cannot hold.
    problems = (pyarrow.ArrowException, OSError, ValueError, OverflowError)
    number = 0
    try:
        file, size = pyarrow.parquet.ParquetFile(path), path.stat().st_size
        for batch in file.iter_batches(batch_size=1024):
            try:
                values = batch.to_pylist()
            except problems:
                yield from _parquet_rows(batch, path, number, problems)
            else:
                for offset, value in enumerate(values, start=number + 1):
                    yield Row(without_nulls(value), f"{path}:{offset}")
            number += batch.num_rows
            meter.done = size * number // file.metadata.num_rows
    except problems as error:
        after = f" after row {number}" if number else ""
        raise UserError(
            f"{path}: is not a readable Parquet file{after}, get it anew: {reason(error)}"
        ) from error


def read_arrow(path: Path, meter: Meter) -> Iterator[Row | RowError]:
    """An Arrow file, in the file or the stream format. Origins count rows from 1."""
    number = 0
    with _arrow_batches(path, meter) as batches:
        for batch in batches:
            for offset in range(0, batch.num_rows, 1024):
                for value in batch.slice(offset, 1024).to_pylist():
                    number += 1
                    yield Row(without_nulls(value), f"{path}:{number}")


def num_rows(path: Path) -> int:
    """Rows of an Arrow file."""
    with _arrow_batches(path, Meter()) as batches:
        return sum(batch.num_rows for batch in batches)


@contextmanager
def _arrow_batches(path: Path, meter: Meter) -> Iterator[Iterator["_Batch"]]:
    """The batches of an Arrow file. Raises UserError for whatever is wrong with one."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                batches = _batches_of_file(pyarrow.ipc.open_file(source), source.size(), meter)
            else:
                meter.file = source
                batches = iter(pyarrow.ipc.open_stream(source))
            yield batches
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: is not a readable Arrow file, get it anew: {reason(error)}"
        ) from error


def _batches_of_file(
    reader: "pyarrow.ipc.RecordBatchFileReader", size: int, meter: Meter
) -> Iterator["_Batch"]:
    count = reader.num_record_batches
    for number in range(count):
        meter.done = size * number // count
        yield reader.get_batch(number)


def read_document(path: Path, meter: Meter) -> Iterator[Row | RowError]:
    """A plain text as one record, `text`, a long one as several. Origins are as in `Document`."""
    with opened(path, meter) as file:
        document = Document(file, path)
        for text, is_last in document:
            yield Row({"text": text}, document.origin, goes_on=not is_last)


class _Batch(Protocol):
    """What is used of a pyarrow.RecordBatch."""

    num_rows: int

    def slice(self, offset: int, length: int) -> "_Batch": ...
    def to_pylist(self) -> list[object]: ...


def _parquet_rows(
    batch: _Batch, path: Path, before: int, problems: tuple[type[Exception], ...]
) -> Iterator[Row | RowError]:
    """The rows of a batch that cannot be converted as a whole, one at a time."""
    for index in range(batch.num_rows):
        origin = f"{path}:{before + index + 1}"
        try:
            yield Row(without_nulls(batch.slice(index, 1).to_pylist()[0]), origin)
        except problems as error:
            yield RowError(f"holds a value that cannot be read: {reason(error)}", origin)


class _Kind(NamedTuple):
    """What reads files whose names end so."""

    suffixes: tuple[str, ...]
    read: Callable[[Path, Meter], Iterator[Row | RowError]]


_KINDS = (
    _Kind((".jsonl", ".ndjson"), read_jsonl),
    _Kind((".json",), read_json),
    _Kind((".parquet",), read_parquet),
    _Kind((".csv", ".tsv"), read_csv),
    _Kind((".txt", ".md", ".markdown"), read_document),
    _Kind((".arrow",), read_arrow),
)
_BINARY = (".parquet", ".arrow")


def file_kind(path: Path) -> str:
    """The suffix that says what a file holds, in small letters: ".jsonl" of a.JSONL.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        kind = suffixes[0] if len(suffixes) == 2 else ""
        return "" if kind in _BINARY else kind
    return suffixes[-1] if suffixes else ""


def is_readable(path: Path) -> bool:
    """Whether the file's name says that it holds records."""
    return _kind_of(path) is not None


def readable_suffixes() -> str:
    """The suffixes of files that can be read, for people."""
    suffixes = ", ".join(suffix for kind in _KINDS for suffix in kind.suffixes)
    return f"{suffixes}, all but {' and '.join(_BINARY)} also with .gz or .zst behind"


def read_file(path: Path, meter: Meter | None = None) -> Iterator[Row | RowError]:
    """The rows of a file that `is_readable`. meter: is told how far it is read."""
    kind = _kind_of(path)
    assert kind is not None
    return kind.read(path, meter or Meter())


def _kind_of(path: Path) -> _Kind | None:
    suffix = file_kind(path)
    return next((kind for kind in _KINDS if suffix in kind.suffixes), None)


class _RepeatedKey(ValueError):
    """An object that names a key twice, of which only one value would be read."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKey(f"names the key {repeated!r:.60} twice")
    return made


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def _unusable(error: Exception) -> str:
    """Why a value of valid JSON syntax cannot be read."""
    if isinstance(error, _RepeatedKey):
        return str(error)
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return "holds a number with too many digits"
