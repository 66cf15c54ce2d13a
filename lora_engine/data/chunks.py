"""A source in chunks of rows, small enough to hold and large enough to hand to another process.

Lines of JSON stay bytes until whoever works on the chunk parses them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lora_engine.data.readers import Row, RowError, file_kind, parse_line, read_file
from lora_engine.data.sources import Part, files_among, open_parts
from lora_engine.data.unpack import opened, skip
from lora_engine.errors import UserError

ROWS = 256
BYTES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """A stretch of a source.

    rows: its rows, or, of a file of JSON lines, `lines` as they stand and the number of the first.
    size: bytes, as far as they are known.
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
    if isinstance(part, Path):
        if file_kind(part) in (".jsonl", ".ndjson"):
            yield from lines_of(part)
            return
        size, rows = part.stat().st_size, iter(read_file(part))
    else:
        size, rows = 0, iter(part)
    while some := tuple(islice(rows, ROWS)):
        yield Chunk(some)
    yield Chunk(size=size)


def lines_of(path: Path, offset: int = 0, first: int = 1) -> Iterator[Chunk]:
    """A file's lines in chunks. offset, first: where to begin, in unpacked bytes and as a line."""
    with opened(path) as file:
        skip(file, offset)
        while lines := file.readlines(BYTES):
            yield Chunk((), path, tuple(lines), first, sum(map(len, lines)))
            first += len(lines)


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
