"""Files read row after row, time and again, from any place that reading has come to."""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_engine.data.chunks import Chunk, Read, chunk_of, rows_of, some_of
from lora_engine.data.readers import file_kind
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


class Track:
    """Files that are read one after the other, in another order each time.

    seed, number: what the orders depend on. It keeps the last place's file open and nothing else.
    """

    def __init__(self, files: Sequence[Path], seed: int, number: int) -> None:
        self.files = list(files)
        self._seed = (seed, number)
        self._at: Reached | None = None
        self._rows: Generator[Read, None, None] | None = None

    def take(self, start: Reached, count: int, most: int) -> tuple[list[Chunk], Reached]:
        """The rows from `start` on, and the place behind them: `count` rows, or as many as have
        `most` bytes together, or are left until all files are read. Raises UserError for files
        without rows."""
        chunks: list[Chunk] = []
        at, left, room = start, count, most
        while left > 0 and room > 0:
            path = self._file(at)
            if self._rows is None or self._at != at:
                self.close()
                self._rows = _rows(path, at)
            self._at = None
            some = some_of(self._rows, left, room)
            if not some:
                before, at = at, self._next_file(at, start)
                if chunks and at.passes > before.passes:
                    break
                continue
            chunk = chunk_of(some, path, at.row + 1)
            offset = at.offset + (chunk.size if chunk.lines else 0)
            at = Reached(
                passes=at.passes,
                file=at.file,
                offset=offset,
                row=at.row + len(some),
                taken=at.taken + len(some),
            )
            self._at = at
            chunks.append(chunk)
            left, room = left - len(some), room - chunk.size
        return chunks, at

    def close(self) -> None:
        """Close the file that is open, if one is."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _next_file(self, at: Reached, start: Reached) -> Reached:
        if at.file + 1 < len(self.files):
            return Reached(passes=at.passes, file=at.file + 1, offset=0, row=0, taken=at.taken)
        if at.passes > start.passes and at.taken == start.taken:
            raise UserError(f"{self.files[0]}: holds no records; give a source that has some")
        return Reached(passes=at.passes + 1, file=0, offset=0, row=0, taken=at.taken)

    def _file(self, at: Reached) -> Path:
        order = np.random.default_rng([*self._seed, at.passes]).permutation(len(self.files))
        return self.files[int(order[at.file])]


def _rows(path: Path, at: Reached) -> Generator[Read, None, None]:
    try:
        if file_kind(path) in _LINES:
            with opened(path) as file:
                skip(file, at.offset)
                for line in file:
                    yield Read(line, len(line))
        else:
            yield from rows_of(path, at.row)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
