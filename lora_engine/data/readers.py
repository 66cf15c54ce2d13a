"""Rows out of files, each with the place where it stands.

A row that cannot be parsed is yielded as a RowError and reading goes on, so that one pass finds
every malformed line.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.errors import UserError


@dataclass(frozen=True)
class Row:
    """A parsed row and its origin."""

    value: Any
    origin: str


@dataclass(frozen=True)
class RowError:
    """A row that cannot be parsed, and why."""

    problem: str
    origin: str


def read_jsonl(path: Path) -> Iterator[Row | RowError]:
    """One JSON value per line; blank lines are skipped. Origins count lines from 1."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            origin = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    yield Row(json.loads(line.rstrip("\r\n")), origin)
            except UnicodeDecodeError as error:
                yield RowError(f"is not UTF-8 text (byte {error.start + 1})", origin)
            except json.JSONDecodeError as error:
                yield RowError(f"is not valid JSON: {error.msg} (column {error.colno})", origin)


def read_json(path: Path) -> Iterator[Row | RowError]:
    """A JSON array of records. Origins are the lines where the records begin."""
    text = _read_text(path)
    decoder = json.JSONDecoder()
    position = _skip(text, 0)
    if text[position : position + 1] != "[":
        raise UserError(f"{path}:1: expected a JSON list of records; one per line is .jsonl")
    position, line, counted = _skip(text, position + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        origin = f"{path}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            # What follows cannot be told apart from the broken record: this one is the last.
            yield RowError(
                f"is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})",
                origin,
            )
            return
        yield Row(value, origin)
        position = _skip(text, position)
        separator = text[position : position + 1]
        if separator == ",":
            position = _skip(text, position + 1)
        elif separator != "]":
            yield RowError("is not followed by ',' or ']'", origin)
            return


def read_csv(path: Path) -> Iterator[Row | RowError]:
    """A CSV file with a header line. Origins are the lines where the records end."""
    previous_limit = csv.field_size_limit(sys.maxsize)  # the default refuses 128 KiB cells
    try:
        reader = csv.DictReader(_read_text(path).splitlines(keepends=True), strict=True)
        yield from _csv_rows(reader, path)
    finally:
        csv.field_size_limit(previous_limit)


def _csv_rows(reader: csv.DictReader, path: Path) -> Iterator[Row | RowError]:
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # DictReader's own count lags behind by the line that failed.
            yield RowError(f"is not valid CSV: {error}", f"{path}:{reader.reader.line_num}")
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

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(value, f"{path}:{number}")
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: is not a readable Parquet file: {reason}") from error


READERS: dict[str, Callable[[Path], Iterator[Row | RowError]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".csv": read_csv,
}


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
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position
