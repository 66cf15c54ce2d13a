"""Files read row after row, time and again, from any place that reading has come to."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_engine.data.chunks import Chunk
from lora_engine.data.readers import Row, RowError, file_kind, read_file
from lora_engine.data.unpack import opened, skip
from lora_engine.errors import UserError

_LINES = (".jsonl", ".ndjson")


class Reached(NamedTuple):
    """How far a track is read.

    passes: times that all its files were read. file: of the present pass, by its order. offset:
    unpacked bytes of it, of a file of lines. row: rows, or lines, of it. taken: rows in all.
    """

    passes: int = 0
    file: int = 0
    offset: int = 0
    row: int = 0
    taken: int = 0


@dataclass(frozen=True)
class _Read:
    """One row as it stands, and the bytes of it."""

    row: bytes | Row | RowError
    size: int


class Track:
    """Files that are read one after the other, in another order each time.

    seed, number: what the orders depend on. It keeps the last place's file open and nothing else.
    """

    def __init__(self, files: Sequence[Path], seed: int, number: int) -> None:
        self.files = list(files)
        self._seed = (seed, number)
        self._at: Reached | None = None
        self._rows: Generator[_Read, None, None] | None = None

    def take(self, start: Reached, count: int) -> tuple[list[Chunk], Reached]:
        """The `count` rows from `start` on, and the place behind them. Raises UserError for files
        without rows."""
        chunks: list[Chunk] = []
        at, left = start, count
        while left > 0:
            path = self._file(at)
            if self._rows is None or self._at != at:
                self.close()
                self._rows = _rows(path, at)
            some = list(islice(self._rows, left))
            if some:
                chunks.append(_chunk(path, some, at.row + 1))
                size = sum(read.size for read in some)
                at = Reached(
                    at.passes,
                    at.file,
                    at.offset + size,
                    at.row + len(some),
                    at.taken + len(some),
                )
            if len(some) < left:
                at = self._next_file(at, start)
            left -= len(some)
            self._at = at if len(some) and left <= 0 else None
        return chunks, at

    def close(self) -> None:
        """Close the file that is open, if one is."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _next_file(self, at: Reached, start: Reached) -> Reached:
        if at.file + 1 < len(self.files):
            return Reached(at.passes, at.file + 1, 0, 0, at.taken)
        if at.passes > start.passes and at.taken == start.taken:
            raise UserError(f"{self.files[0]}: holds no records; give a source that has some")
        return Reached(at.passes + 1, 0, 0, 0, at.taken)

    def _file(self, at: Reached) -> Path:
        order = np.random.default_rng([*self._seed, at.passes]).permutation(len(self.files))
        return self.files[int(order[at.file])]


def _rows(path: Path, at: Reached) -> Generator[_Read, None, None]:
    try:
        if file_kind(path) in _LINES:
            with opened(path) as file:
                skip(file, at.offset)
                for line in file:
                    yield _Read(line, len(line))
        else:
            for row in islice(read_file(path), at.row, None):
                yield _Read(row, 0)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _chunk(path: Path, some: Sequence[_Read], first: int) -> Chunk:
    lines = tuple(read.row for read in some if isinstance(read.row, bytes))
    if lines:
        return Chunk((), path, lines, first, sum(map(len, lines)))
    return Chunk(tuple(read.row for read in some if not isinstance(read.row, bytes)))
