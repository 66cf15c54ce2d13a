"""Rows out of files, each with the place where it stands.

A row that cannot be parsed is yielded as a RowError and reading goes on, so that one pass finds
every malformed line. Lines end where each format says: JSON Lines at \\n alone, CSV at \\n, \\r\\n
or \\r outside quotes.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_engine.errors import UserError, reason

_JSON_BLANKS = " \t\r\n"
# What files begin with that are compressed, or text in another encoding.
_OTHER_FORMATS = {
    b"\x1f\x8b": "is compressed (gzip); unpack it first",
    b"BZh": "is compressed (bzip2); unpack it first",
    b"\xfd7zXZ\x00": "is compressed (xz); unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd); unpack it first",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"PAR1": "is a Parquet file; name it .parquet",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
}


@dataclass(frozen=True)
class Row:
    """A parsed row and its origin."""

    value: object
    origin: str


@dataclass(frozen=True)
class RowError:
    """A row that cannot be parsed, and why."""

    problem: str
    origin: str


def read_jsonl(path: Path) -> Iterator[Row | RowError]:
    """One JSON value per line; blank lines are skipped. Origins count lines from 1."""
    _check_format(path)
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            origin = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip(_JSON_BLANKS):
                    yield Row(_decoder.decode(line.rstrip("\r\n")), origin)
            except UnicodeDecodeError as error:
                yield RowError(f"is not UTF-8 text (byte {error.start + 1})", origin)
            except json.JSONDecodeError as error:
                yield RowError(f"is not valid JSON: {error.msg} (column {error.colno})", origin)
            except (ValueError, RecursionError) as error:
                yield RowError(_unusable(error), origin)


def read_json(path: Path) -> Iterator[Row | RowError]:
    """A JSON array of records. Origins are the lines where the records begin."""
    _check_format(path)
    text = _read_text(path)
    position = _skip(text, 0)
    if text[position : position + 1] != "[":
        raise UserError(f"{path}:1: expected a JSON list of records; one per line is .jsonl")
    position, line, counted = _skip(text, position + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        origin = f"{path}:{line}"
        # JSON has no mark to resume at: reading ends with the first broken record.
        try:
            value, position = _decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            yield RowError(
                f"is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})",
                origin,
            )
            return
        except (ValueError, RecursionError) as error:
            yield RowError(_unusable(error), origin)
            return
        yield Row(value, origin)
        position = _skip(text, position)
        separator = text[position : position + 1]
        if separator == ",":
            position = _skip(text, position + 1)
        elif separator != "]":
            yield RowError("is not followed by ',' or ']'", origin)
            return
    end = _skip(text, position + 1)
    if end < len(text):
        line += text.count("\n", counted, end)
        yield RowError("stands behind the end of the list", f"{path}:{line}")


def read_csv(path: Path) -> Iterator[Row | RowError]:
    """A CSV file with a header line. Origins are the lines where the records end."""
    _check_format(path)
    previous_limit = csv.field_size_limit(sys.maxsize)  # the default refuses 128 KiB cells
    try:
        # newline="" leaves line ends as they are, inside and outside quoted cells
        reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
        yield from _csv_rows(reader, path)
    finally:
        csv.field_size_limit(previous_limit)


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


def read_parquet(path: Path) -> Iterator[Row | RowError]:
    """A Parquet file. Origins count rows from 1."""
    import pyarrow
    import pyarrow.parquet

    # pyarrow raises the last three for damaged pages and for values that Python cannot hold.
    problems = (pyarrow.ArrowException, OSError, ValueError, OverflowError)
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for batch in file.iter_batches(batch_size=1024):
            try:
                values = batch.to_pylist()
            except problems:
                yield from _parquet_rows(batch, path, number, problems)
            else:
                for offset, value in enumerate(values, start=number + 1):
                    yield Row(value, f"{path}:{offset}")
            number += batch.num_rows
    except problems as error:
        after = f" after row {number}" if number else ""
        raise UserError(
            f"{path}: is not a readable Parquet file{after}, get it anew: {reason(error)}"
        ) from error


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
            yield Row(batch.slice(index, 1).to_pylist()[0], origin)
        except problems as error:
            yield RowError(f"holds a value that cannot be read: {reason(error)}", origin)


SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def read_file(path: Path) -> Iterator[Row | RowError]:
    """The rows of a file whose suffix is one of SUFFIXES."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return read_jsonl(path)
    if suffix == ".json":
        return read_json(path)
    return read_parquet(path) if suffix == ".parquet" else read_csv(path)


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


def _check_format(path: Path) -> None:
    """Raises UserError if `path` begins as no text in UTF-8 does."""
    with path.open("rb") as file:
        head = file.read(8)
    for magic, problem in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise UserError(f"{path}: {problem}")


def _read_text(path: Path) -> str:
    try:
        # newline="" keeps line ends as they are, which quoted CSV cells need
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: is not UTF-8 text") from error


def _skip(text: str, position: int) -> int:
    """The position of the next character that is not JSON whitespace."""
    while text[position : position + 1] and text[position] in _JSON_BLANKS:
        position += 1
    return position
