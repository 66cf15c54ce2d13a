"""A source in chunks of rows, small enough to hold and large enough to hand to another process.

Lines of JSON stay bytes until whoever works on the chunk parses them.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lora_engine.data.readers import Row, RowError, file_kind, parse_line, read_file
from lora_engine.data.sources import Part, files_among, open_parts
from lora_engine.data.unpack import Meter, opened
from lora_engine.errors import UserError

ROWS = 256
BYTES = 1 << 20


class Read(NamedTuple):
    """A row, or a line as it stands. size: bytes that were read for it."""

    row: bytes | Row | RowError
    size: int


@dataclass(frozen=True)
class Chunk:
    """A stretch of a source.

    rows: its rows, or, of a file of JSON lines, `lines` as they stand and the number of the first.
    size: bytes that were read for it; 0 of what is no file.
    """

    rows: tuple[Row | RowError, ...] = ()
    path: Path | None = None
    lines: tuple[bytes, ...] = ()
    first: int = 1
    size: int = 0

    def parsed(self) -> Iterator[Row | RowError]:
        """The rows, the lines parsed."""
        if self.path is None:
            yield from self.rows
            return
        for number, line in enumerate(self.lines, start=self.first):
            if (row := parse_line(line, number, self.path)) is not None:
                yield row


def chunks_of(source: object, split: str | None) -> tuple[str, Iterator[Chunk]]:
    """What the source is called in messages, and its chunks. Raises as `sources.open_parts`."""
    name, parts = open_parts(source, split)
    return name, _of_parts(name, parts)


def _of_parts(name: str, parts: Iterable[Part]) -> Iterator[Chunk]:
    try:
        for part in parts:
            yield from _chunks(part)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from error


def _chunks(part: Part) -> Iterator[Chunk]:
    if isinstance(part, Path) and file_kind(part) in (".jsonl", ".ndjson"):
        yield from lines_of(part)
        return
    if isinstance(part, Path):
        left, rows = part.stat().st_size, rows_of(part)
    else:
        left, rows = 0, (Read(row, 0) for row in part)
    while some := some_of(rows, ROWS, BYTES):
        chunk = chunk_of(some)
        left -= chunk.size
        yield chunk
    yield Chunk(size=left)


def rows_of(path: Path, first: int = 0) -> Generator[Read, None, None]:
    """A file's rows from that number on, which counts from 0."""
    meter = Meter()
    rows = read_file(path, meter)
    for _ in islice(rows, first):
        pass
    before = meter.tell()
    for row in rows:
        now = meter.tell()
        yield Read(row, now - before)
        before = now


def some_of(reads: Iterator[Read], count: int, most: int) -> list[Read]:
    """The next `count`, or as many as have `most` bytes together."""
    some: list[Read] = []
    size = 0
    for read in reads:
        some.append(read)
        size += read.size
        if len(some) >= count or size >= most:
            break
    return some


def chunk_of(reads: Sequence[Read], path: Path | None = None, first: int = 1) -> Chunk:
    """The chunk of rows, or of lines of `path`, the first of which has the number `first`."""
    size = sum(read.size for read in reads)
    lines = tuple(read.row for read in reads if isinstance(read.row, bytes))
    if lines:
        return Chunk(rows=(), path=path, lines=lines, first=first, size=size)
    return Chunk(tuple(read.row for read in reads if not isinstance(read.row, bytes)), size=size)


def lines_of(path: Path) -> Iterator[Chunk]:
    """A file's lines in chunks."""
    meter, done, first = Meter(), 0, 1
    with opened(path, meter) as file:
        while lines := file.readlines(BYTES):
            now = meter.tell()
            yield Chunk(rows=(), path=path, lines=tuple(lines), first=first, size=now - done)
            first, done = first + len(lines), now


def first_rows(chunks: Iterable[Chunk], count: int) -> Iterator[Chunk]:
    """The chunks with the first `count` rows."""
    left = count
    for chunk in chunks:
        rows = tuple(islice(chunk.parsed(), left))
        left -= len(rows)
        yield Chunk(rows, size=chunk.size)
        if left <= 0:
            return


def source_size(source: object, split: str | None) -> int:
    """Bytes of the source's files as they are on disk; 0 of what is no file."""
    if not isinstance(source, str | Path):
        return 0
    return sum(path.stat().st_size for path in files_among(source, split) or ())
